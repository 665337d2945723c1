from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import airpeft
from simulations.folder import locked


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(airpeft.app, ["simulate", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_json_is_an_envelope_and_progress_goes_elsewhere(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [str(world), "--out", str(out), "--workers", "0", "--set", "federation.rounds=1"]
    code, output, errors = invoke(*arguments, "--format", "json")
    assert code == 0
    document = json.loads(output)
    assert document["schema"] == "airpeft.v1.simulation"
    assert document["data"]["out"] == str(out)
    assert [line["round"] for line in document["data"]["rounds"]] == [0, 1]
    assert "round   1" in errors
    assert "\x1b" not in errors
    code, output, errors = invoke(*arguments)
    assert code == 0
    assert document["data"]["adapter"]["digest"] in output
    assert "going on after round 1" in errors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "train.rnak=4"], "did you mean train.rank?"),
        (["--set", "base.name=nope"], "no base model 'nope'"),
        (["--seed", "-1"], "--seed seed = -1"),
        (["--set", "partition.clients=99"], "use at most"),
    ],
)
def test_bad_input_is_status_2_and_one_message(
    world: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    code, output, errors = invoke(str(world), "--out", str(tmp_path / "run"), *more)
    assert (code, output) == (2, "")
    assert errors.startswith("airpeft simulate: ")
    assert message in errors


def test_a_personal_run_without_privacy_shows_what_clients_have(
    world: Path, tmp_path: Path
) -> None:
    path = tmp_path / "open.toml"
    text = world.read_text().replace("[privacy]\nnoise_multiplier = 0.8\ndelta = 1e-3\n", "")
    path.write_text(text.replace("rows.csv", str(world.parent / "rows.csv")))
    words = ["--set", "federation.rounds=1", "--set", "federation.recipe=fedsa-lora"]
    out = ["--out", str(tmp_path / "run"), "--workers", "0"]
    code, output, errors = invoke(str(path), *words, *out)
    assert code == 0, errors
    assert "own" in output
    assert "own " in errors
    noisy = ["--set", "federation.recipe=dp-fedlora", "--set", "federation.rounds=1"]
    code, _, errors = invoke(str(path), *noisy, "--out", str(tmp_path / "noisy"), "--workers", "0")
    assert code == 0
    assert "warning: recipe dp-fedlora: noise on both factors multiplies" in errors
    assert "**Warning.** Noise" in (tmp_path / "noisy" / "adapter" / "README.md").read_text()


def test_a_missing_scenario_and_a_busy_folder_are_status_2(world: Path, tmp_path: Path) -> None:
    assert invoke(str(tmp_path / "none.toml"))[0] == 2
    with locked(tmp_path / "run"):
        code, _, errors = invoke(str(world), "--out", str(tmp_path / "run"), "--workers", "0")
    assert code == 2
    assert "another process is working on this run" in errors
