"""What cannot be kept is refused with the remedy, before a folder or a process exists."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from simulations.folder import LEDGER, SERVER_LEDGER, RunError
from simulations.preflight import draft
from simulations.run import simulate
from simulations.scenario import Scenario, ScenarioError
from tests.simulations.test_cli import invoke
from tests.simulations.world import world_scenario

CALIBRATED = ("privacy.noise_multiplier=0.8", "privacy.epsilon=8")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["privacy.delta=0"], "privacy.delta: delta=0.* above 0 and below 1, and at most 1/n"),
        (["privacy.delta=-1e-5"], "privacy.delta: delta=-1e-05 must be above 0"),
        (["privacy.delta=1"], "privacy.delta: delta=1"),
        (["privacy.delta=0.05"], r"client-0000\d: delta=0.05 is above 1/n = .*choose 0.00"),
        (["privacy.noise_multiplier=0"], "adds no noise.*give epsilon instead"),
        (["privacy.noise_multiplier=-1"], "adds no noise.*give epsilon instead"),
        (["privacy.epsilon=8"], "give either epsilon or noise_multiplier"),
        (["privacy.epsilon=8", "privacy.noise_multiplier=0"], "adds no noise"),
        (["train.batch_size=64"], r"client-0000\d: plan: batch_size=64 is larger than the data "),
        (["train.physical_batch=0"], "train.physical_batch = 0: must be greater"),
        (["privacy.accountant=gdp"], "must be 'rdp' or 'pld'"),
    ],
)
def test_privacy_that_cannot_be_had_is_refused_and_no_folder_is_made(
    world: Path, tmp_path: Path, changes: list[str], says: str
) -> None:
    with pytest.raises(ScenarioError, match=says):
        simulate(world_scenario(world, *changes), tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("epsilon", "says"),
    [
        ("0", "privacy.epsilon: epsilon=0.* must be above 0; usual values"),
        ("-1", "must be above 0"),
        ("1e-9", "cannot be reached in .* use fewer steps"),
    ],
)
def test_an_epsilon_that_is_none_is_refused(
    world: Path, tmp_path: Path, epsilon: str, says: str
) -> None:
    path = _with_epsilon(world, tmp_path)
    with pytest.raises(ScenarioError, match=says):
        simulate(world_scenario(path, f"privacy.epsilon={epsilon}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert draft(world_scenario(path)).mode is not None


def _with_epsilon(world: Path, folder: Path) -> Path:
    text = world.read_text().replace("noise_multiplier = 0.8", "epsilon = 8.0")
    path = folder / "epsilon.toml"
    path.write_text(text.replace("rows.csv", str(world.parent / "rows.csv")))
    return path


def test_a_base_with_batch_normalisation_is_refused(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "resnet"
    shutil.copytree(world.parent / "tiny-base", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "resnet"}))
    code, output, errors = invoke(
        str(world), "--set", f"base.name={base}", "--out", str(tmp_path / "run")
    )
    assert (code, output) == (2, "")
    assert "model_type 'resnet' is not supported; allowed: bert" in errors
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scenario]:
    """A run of one round."""
    out = tmp_path_factory.mktemp("finished") / "run"
    scenario = world_scenario(world, "federation.rounds=1")
    simulate(scenario, out)
    with sqlite3.connect(out / LEDGER) as connection:  # the trainer of this process has it open
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return out, scenario


def _edit(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE events SET event = replace(event, '0.8', '9.8')")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:9000])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "edited": (_edit, "was edited or damaged: event 1 does not fit its hash.*backup"),
    "truncated": (_truncate, "edited or damaged.*backup"),
    "emptied": (lambda path: path.write_bytes(b""), "tells of 0 events of client-00000.*backup"),
    "removed": (Path.unlink, "tells of 0 events of client-00000.*backup"),
    "another file": (lambda path: path.write_text("dear diary"), "not a ledger.*backup"),
}


def _times(out: Path) -> dict[str, int]:
    """When each file was written; not those that SQLite has beside one that is being read."""
    files = [p for p in out.rglob("*") if p.is_file() and p.suffix[-4:] not in ("-wal", "-shm")]
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in files}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_does_not_go_on_with_a_ledger_that_is_not_whole(
    finished: tuple[Path, Scenario], tmp_path: Path, damage: str
) -> None:
    done, scenario = finished
    out = tmp_path / "run"
    shutil.copytree(done, out)
    for left in out.glob(f"{LEDGER}-*"):
        left.unlink()
    spoil, says = DAMAGE[damage]
    spoil(out / LEDGER)
    before = _times(out)
    with pytest.raises(RunError, match=f"(?s){LEDGER}.*({says})"):
        simulate(scenario, out, workers=1)
    assert _times(out) == before


def test_a_whole_ledger_is_gone_on_with(finished: tuple[Path, Scenario], tmp_path: Path) -> None:
    done, scenario = finished
    out = tmp_path / "run"
    shutil.copytree(done, out)
    (out / SERVER_LEDGER).touch()  # as a process leaves it that was killed while it made the file
    assert simulate(scenario, out).metrics[-1]["round"] == 1


def test_the_way_to_gradients_is_told_where_the_run_is_told(
    finished: tuple[Path, Scenario], world: Path, tmp_path: Path
) -> None:
    out, scenario = finished
    said = "linear: only linear layers train; an example's gradient takes"
    assert draft(scenario).mode is not None
    mechanism = json.loads((out / "adapter" / "privacy.json").read_text())["example"]["mechanism"]
    assert mechanism["gradients"].startswith(said)
    assert "only linear layers train" in (out / "report.html").read_text()
    words = ["--set", "federation.rounds=1", "--set", "train.method=ia3"]
    again = ["--set", "federation.recipe=fedit", *words]
    code, _, errors = invoke(str(world), *again, "--out", str(tmp_path / "ia3"), "--workers", "0")
    assert code == 0, errors
    assert "gradients per example by hooks: " in errors
    assert "no linear layer, trains too" in errors
