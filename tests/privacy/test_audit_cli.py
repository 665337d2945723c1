"""``airpeft privacy audit`` as its user runs it, on a base of a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import airpeft
from privacy.calibration import epsilon, noise_multiplier
from privacy.events import SgdEvent
from privacy.ledger_report import report
from simulations.run import simulate
from simulations.scenario import load
from tests.simulations.world import make_world

SHAPE = ["--sample-rate", "0.25", "--steps", "6", "--delta", "1e-5"]


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(airpeft.app, ["privacy", "audit", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def data_of(*arguments: str, code: int = 0) -> dict[str, Any]:
    found, output, _ = invoke(*arguments, "--format", "json")
    assert found == code
    document = json.loads(output)
    assert document["schema"] == "airpeft.v1.privacy-audit"
    data: dict[str, Any] = document["data"]
    return data


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scenario, its base and its rows."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def own(world: Path) -> list[str]:
    """The options that name a base and rows of one's own."""
    return ["--base", str(world.parent / "tiny-base"), "--data", str(world.parent / "rows.csv")]


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """A finished simulation."""
    out = world.parent / "run"
    simulate(load(world, overrides=["federation.rounds=2"]), out)
    return out


def test_the_default_training_is_audited_on_own_rows(own: list[str]) -> None:
    data = data_of(*own, *SHAPE, "--epsilon", "4", "--rows", "60", "--rounds", "2")
    sigma = noise_multiplier(4.0, 1e-5, 0.25, 12)
    event = SgdEvent(noise_multiplier=sigma, sample_rate=0.25, steps=12, max_grad_norm=1.0)
    assert data["claimed"] == epsilon([event], 1e-5)
    assert 0 <= data["measured"] < data["claimed"]
    assert (data["broken"], data["faults"], data["refutable"]) == (False, [], True)
    assert (data["steps"], data["noise_claimed"], data["unit"]) == (12, sigma, "example")
    assert data["canaries"] == data["parameters"] > 2000  # as many as there is room for
    assert data["noise_seen"] == pytest.approx(sigma, rel=0.05)
    assert "60 rows" in data["subject"]
    assert data_of(*own, *SHAPE, "--epsilon", "4", "--rows", "60", "--rounds", "2") == data


def test_the_table_says_the_same_as_the_document(own: list[str]) -> None:
    arguments = [*own, *SHAPE, "--noise-multiplier", "1.5", "--canaries", "500"]
    data = data_of(*arguments)
    code, output, errors = invoke(*arguments)
    assert code == 0
    assert f"epsilon at most {data['claimed']:.4f} at delta 1e-05, by the rdp acc" in output
    assert f"epsilon at least {data['measured']:.4f}, with 95% confidence" in output
    assert f"500, {data['planted']} of them planted" in output
    assert "The claim was not refuted. That is no proof" in output
    assert errors.splitlines()[-1] == "step 6 of 6"


def test_a_claim_that_is_too_good_is_refuted_with_status_1(own: list[str]) -> None:
    arguments = [*own, *SHAPE, "--noise-multiplier", "0.3", "--epsilon", "0.5"]
    data = data_of(*arguments, code=1)
    assert (data["claimed"], data["claimed_by"], data["broken"]) == (0.5, "--epsilon", True)
    assert data["measured"] > 1.0
    code, output, _ = invoke(*arguments)
    assert code == 1
    assert "This mechanism is broken: it gives away an epsilon of at least" in output


def test_a_claim_that_is_out_of_reach_is_said_to_be(own: list[str]) -> None:
    code, output, _ = invoke(*own, *SHAPE, "--epsilon", "8", "--canaries", "300")
    assert code == 0
    assert "could not have refuted so large a claim: 300 canaries show an epsilon of" in output
    code, output, _ = invoke(*own, *SHAPE, "--epsilon", "5", "--canaries", "100")
    assert "With --canaries 2114 it could." in output


def test_the_central_mechanism(own: list[str]) -> None:
    arguments = ["--mechanism", "central", *own[:2], *SHAPE]
    data = data_of(*arguments, "--epsilon", "3")
    assert (data["mechanism"], data["unit"], data["broken"]) == ("central", "client", False)
    assert 0 <= data["measured"] < 3
    broken = data_of(*arguments, "--noise-multiplier", "0.3", "--epsilon", "0.5", code=1)
    assert broken["measured"] > 1.0
    assert "2,114 parameters" in invoke(*arguments, "--epsilon", "3")[1]


def test_a_run_is_audited_against_what_it_says_of_itself(run: Path, tmp_path: Path) -> None:
    statement = json.loads((run / "adapter" / "privacy.json").read_text())
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "sqlite" not in p.name}
    data = data_of("--run", str(run))
    assert data["claimed"] == statement["example"]["epsilon"]
    assert data["delta"] == statement["example"]["delta"]
    assert (data["claimed_by"], data["noise_claimed"]) == ("privacy.json", 0.8)
    rows = report(run / "ledger.sqlite", delta=data["delta"]).rows
    worst = max(rows, key=lambda row: row.epsilon)
    assert (data["claimed"], data["steps"]) == (worst.epsilon, worst.steps)
    assert worst.client in data["subject"]
    assert (data["broken"], data["measured"] < data["claimed"]) == (False, True)
    assert data["noise_seen"] == pytest.approx(0.8, rel=0.1)
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "sqlite" not in p.name}
    assert after == before
    other = data_of("--run", str(run), "--client", "client-00000", "--delta", "1e-6")
    assert "client-00000" in other["subject"]
    assert (other["claimed_by"], other["delta"]) == ("the run's ledger", 1e-6)


def test_a_run_whose_statement_says_too_little_is_refuted(run: Path) -> None:
    path = run / "adapter" / "privacy.json"
    honest = path.read_bytes()
    statement = json.loads(honest)
    statement["example"]["epsilon"] = 0.02
    path.write_text(json.dumps(statement))
    try:
        data = data_of("--run", str(run), code=1)
    finally:
        path.write_bytes(honest)
    assert data["measured"] > 0.02


def test_what_is_no_finished_run_is_refused(world: Path, run: Path, tmp_path: Path) -> None:
    code, output, errors = invoke("--run", str(tmp_path))
    assert (code, output) == (2, "")
    assert "holds no run: give the folder of a finished simulation" in errors
    assert not list(tmp_path.iterdir())
    (tmp_path / "plain").mkdir()
    plain = load(world, overrides=["federation.rounds=1"]).model_copy(update={"privacy": None})
    (tmp_path / "plain" / "scenario.resolved.toml").write_text(plain.to_toml())
    code, _, errors = invoke("--run", str(tmp_path / "plain"))
    assert code == 2
    assert "give a run whose scenario has a [privacy] section" in errors
    (tmp_path / "begun").mkdir()
    text = (run / "scenario.resolved.toml").read_text()
    (tmp_path / "begun" / "scenario.resolved.toml").write_text(text)
    code, _, errors = invoke("--run", str(tmp_path / "begun"))
    assert code == 2
    assert "there is no privacy statement" in errors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--noise-multiplier", "0"], "promises nothing that could be audited"),
        (["--noise-multiplier", "0", "--epsilon", "1"], "leave --noise-multiplier out"),
        (["--epsilon", "-1"], "--epsilon -1 must be above 0"),
        (["--delta", "0"], "--delta 0 must be above 0"),
        (["--delta", "0.1"], "is not below 1/n"),
        (["--sample-rate", "2"], "--sample-rate 2 must be above 0"),
        (["--steps", "0"], "--steps 0 must be"),
        (["--rows", "0"], "--rows 0 must be at least 1"),
        (["--canaries", "5"], "plant at least 100"),
        (["--canaries", "1000000"], "plant at most 2114"),
        (["--confidence", "1"], "confidence=1.0 must be"),
        (["--max-grad-norm", "0"], "max_grad_norm=0.0 must be above 0"),
        (["--client", "client-00001"], "give its folder with --run"),
        (["--text", "words"], "no column 'words'"),
        (["--base", "no-such-base"], "no-such-base"),
        (["--mechanism", "central"], "--data is of no use to --mechanism central"),
        (["--run", "runs/none"], "--sample-rate is taken from the run: leave it out"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(
    own: list[str], more: list[str], message: str
) -> None:
    code, output, errors = invoke(*own, *SHAPE, *more)
    assert (code, output) == (2, "")
    assert message in errors


def test_what_a_run_promises_to_whole_clients(world: Path, tmp_path: Path, run: Path) -> None:
    central = ["client_privacy.noise_multiplier=1.5", "client_privacy.delta=1e-2"]
    poisson = ["federation.sampling=poisson", "federation.fraction=0.7"]
    poisson.append("federation.recipe=ffa-lora")
    scenario = load(world, overrides=["federation.rounds=4", *central, *poisson])
    simulate(scenario.model_copy(update={"privacy": None}), tmp_path / "run")
    statement = json.loads((tmp_path / "run" / "adapter" / "privacy.json").read_text())
    data = data_of("--run", str(tmp_path / "run"), "--mechanism", "central")
    assert data["claimed"] == statement["client"]["epsilon"]
    assert (data["steps"], data["unit"], data["sample_rate"]) == (4, "client", 0.7)
    assert (data["broken"], data["measured"] < data["claimed"]) == (False, True)
    assert data["noise_seen"] == pytest.approx(1.5, rel=0.1)
    other = data_of("--run", str(tmp_path / "run"), "--mechanism", "central", "--delta", "1e-6")
    assert other["claimed"] > data["claimed"]
    for arguments, message in (
        (["--run", str(tmp_path / "run")], "audit it with --mechanism central"),
        (["--run", str(run), "--mechanism", "central"], "audit it with --mechanism local"),
        (["--run", str(run), "--mechanism", "central", "--client", "a"], "of no use to --mech"),
    ):
        code, _, errors = invoke(*arguments)
        assert code == 2
        assert message in errors


def test_noise_that_is_taken_back_is_not_audited(world: Path, tmp_path: Path) -> None:
    central = ["client_privacy.noise_multiplier=1.5", "client_privacy.delta=1e-2"]
    tree = ["client_privacy.mechanism=tree", "federation.rounds=2", "federation.recipe=ffa-lora"]
    simulate(load(world, overrides=[*central, *tree]), tmp_path / "run")
    code, _, errors = invoke("--run", str(tmp_path / "run"), "--mechanism", "central")
    assert code == 2
    assert "audit mechanism='gaussian'" in errors


def test_help_has_examples() -> None:
    code, output, _ = invoke("--help")
    assert code == 0
    assert "airpeft privacy audit --run runs/quick" in output
    assert "audit" in CliRunner().invoke(airpeft.app, ["privacy", "--help"]).stdout
