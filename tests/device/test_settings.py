from __future__ import annotations

from pathlib import Path

import pytest

from clients.data import DataError
from clients.device_settings import DeviceError, DeviceSettings
from clients.probe import HeldOut


def test_flag_before_environment_before_file_before_default(home: Path, monkeypatch):
    (home / "device.toml").write_text('port = 1111\nthreads = 2\nbase = "from-file"\n')
    monkeypatch.setenv("AIRPEFT_DEVICE_PORT", "2222")
    monkeypatch.setenv("AIRPEFT_DEVICE_THREADS", "3")
    settings = DeviceSettings.read(home, {"port": 3333, "base": None})
    assert (settings.port, settings.threads, settings.base) == (3333, 3, "from-file")
    assert settings.max_length == 128


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = -1", ["'port'", "-1", "AIRPEFT_DEVICE_PORT", "device.toml"]),
        ('colour = "red"', ["'colour'", "red"]),
        ("quality_tolerance = 2", ["'quality_tolerance'", "less than or equal to 1"]),
        ('log_level = "LOUD"', ["'log_level'", "LOUD"]),
        ("port = = 1", ["not TOML"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_place(home: Path, text, words):
    (home / "device.toml").write_text(text)
    with pytest.raises(DeviceError) as error:
        DeviceSettings.read(home, {})
    for word in words:
        assert word in str(error.value)


def test_held_out_examples_by_name_or_by_index(tmp_path: Path):
    named = tmp_path / "named.csv"
    named.write_text("text,label\ngood,positive\nbad,negative\n")
    found = HeldOut.read(named, limit=10)
    assert found.truth(("negative", "positive")) == ("positive", "negative")
    assert found.truth(("cat", "dog")) is None
    indexed = tmp_path / "indexed.jsonl"
    indexed.write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n')
    found = HeldOut.read(indexed, limit=10)
    assert found.truth(("negative", "positive")) == ("positive", "negative")
    assert found.truth(("only",)) is None
    assert HeldOut.read(indexed, limit=1).texts == ("good",)
    with pytest.raises(DataError, match="no column 'review'"):
        HeldOut.read(named, text="review", limit=1)
