"""The doctor finds what is wrong and says what to do."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

import airpeft
from clients import doctor


def test_this_machine_is_fit(tmp_path: Path) -> None:
    result = CliRunner().invoke(airpeft.app, ["doctor", "--home", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for check in ("Python", "packages", "base model minilm", "clock", f"folder {tmp_path}"):
        assert check in result.output
    assert not list(tmp_path.iterdir())


def test_problems_are_named_with_their_remedy_and_end_with_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        arguments = ["doctor", "--home", str(tmp_path / "file" / "inside"), "--base", "nosuch"]
        arguments += ["--port", str(port), "--format", "json"]
        result = CliRunner().invoke(airpeft.app, arguments)
    assert result.exit_code == 1
    told = json.loads(result.output)
    assert told["schema"] == "airpeft.v1.doctor"
    assert told["data"]["ok"] is False
    found = {f["check"]: f for f in told["data"]["findings"]}
    for check in (f"port {port}", "base model nosuch", f"folder {tmp_path / 'file' / 'inside'}"):
        assert found[check]["status"] == "problem"
        assert found[check]["remedy"]


@pytest.mark.parametrize(
    ("years", "status"),
    [(-50, "problem"), (-1, "problem"), (0, "ok"), (1, "warning"), (9, "warning")],
)
def test_a_clock_years_off(years: int, status: str) -> None:
    installed = Path(doctor.__file__).stat().st_mtime
    finding = doctor.clock(installed + years * doctor.YEAR)
    assert finding.status == status
    assert bool(finding.remedy) == (status != "ok")


def test_a_wrong_format_is_refused_with_2() -> None:
    result = CliRunner().invoke(airpeft.app, ["doctor", "--format", "xml"])
    assert result.exit_code == 2
