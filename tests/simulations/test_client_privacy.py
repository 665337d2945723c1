"""Client-level privacy from a scenario: real clients on a tiny base, both levels at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from airpeft import app
from federation.provenance import read_provenance
from privacy.cohort_account import SERVER
from privacy.ledger_report import report
from privacy.randomness import SEEDED
from privacy.statement import explain, read
from simulations import folder
from simulations.events import Event, RoundDone
from simulations.run import simulate
from simulations.scenario import Scenario, ScenarioError
from simulations.server_app import RunResult
from tests.simulations.world import world_scenario

PROMISED = (
    "federation.recipe=fedsvd",
    "federation.sampling=poisson",
    "federation.fraction=0.7",
    "client_privacy.epsilon=9",
    "client_privacy.delta=0.01",
    "client_privacy.clip=0.5",
    "client_privacy.quantile=0.5",
)


class StopHereError(Exception):
    pass


def stop_after(number: int) -> object:
    def watch(event: Event) -> None:
        if isinstance(event, RoundDone) and event.round == number:
            raise StopHereError

    return watch


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Scenario, RunResult]:
    """A run that was interrupted after its second round."""
    scenario = world_scenario(world, *PROMISED)
    out = tmp_path_factory.mktemp("client-privacy") / "run"
    with pytest.raises(StopHereError):
        simulate(scenario, out, progress=stop_after(2))  # type: ignore[arg-type]
    return scenario, simulate(scenario, out)


def test_both_levels_are_shown_by_round_and_end_within_the_budget(
    done: tuple[Scenario, RunResult],
) -> None:
    scenario, result = done
    spent = [line["client_epsilon"] for line in result.metrics]
    assert spent[0] == 0.0
    assert spent == sorted(spent)
    assert 8.5 < spent[-1] <= 9.0
    assert all(line["epsilon_max"] > 0 for line in result.metrics[1:] if line["used"])
    assert all(line["aggregation_error"] is None for line in result.metrics)
    chosen = scenario.chosen()
    assert (chosen.weigh.kind, chosen.private.kind) == ("uniform", "client-dp")


def test_an_interruption_spends_nothing(
    done: tuple[Scenario, RunResult], tmp_path: Path, world: Path
) -> None:
    _, result = done
    whole = simulate(world_scenario(world, *PROMISED), tmp_path / "whole")
    assert whole.adapter.digest == result.adapter.digest
    assert whole.privacy == result.privacy
    (row,) = report(result.out / "server-ledger.sqlite", delta=0.01).rows
    assert (row.client, row.events, row.last.unit) == ("every-client", 3, "client")
    assert row.epsilon == result.metrics[-1]["client_epsilon"]


def test_the_statement_the_card_the_report_and_the_release_say_it(
    done: tuple[Scenario, RunResult],
) -> None:
    _, result = done
    doc = read(result.adapter_folder)
    assert doc == result.privacy
    assert doc["client"]["epsilon"] == result.metrics[-1]["client_epsilon"]
    assert doc["client"]["budget"] == 9.0
    assert doc["example"]["unit"] == "example"
    card = (result.adapter_folder / "README.md").read_text("utf-8")
    page = result.report.read_text("utf-8")
    for line in explain(doc).splitlines():
        assert line in card
    assert "One client: epsilon" in page
    assert "for each client as a whole" in page
    assert "bytes up" not in card  # it would tell how often clients took part
    known = read_provenance(result.adapter_folder)
    assert known.client is not None
    assert known.client.epsilon_micro >= doc["client"]["epsilon"] * 1e6


def test_the_command_shows_and_explains_it(done: tuple[Scenario, RunResult], world: Path) -> None:
    _, result = done
    sets = [word for override in PROMISED for word in ("--set", override)]
    runner = CliRunner()
    words = ["simulate", str(world), *sets, "--out", str(result.out), "--workers", "0"]
    shown = runner.invoke(app, words, env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.output
    assert "client ε" in shown.output
    found = runner.invoke(app, ["privacy", "explain", str(result.adapter_folder)])
    assert "Who has to be trusted: the server" in found.output
    path = str(result.out / "server-ledger.sqlite")
    ledger = runner.invoke(app, ["privacy", "ledger", path, "--delta", "0.01", "--format", "json"])
    assert json.loads(ledger.output)["data"]["unit"] == "client"


def test_without_the_section_nothing_is_what_it_was_before(world: Path) -> None:
    plain = world_scenario(world)
    assert plain.client_privacy is None
    assert "client_privacy" not in plain.to_toml()
    promised = world_scenario(world, *PROMISED)
    assert promised.digest != plain.digest
    written = world.with_name("written.toml")
    written.write_text(promised.to_toml())
    assert world_scenario(written).digest == promised.digest


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["client_privacy.delta=0.5"], "client_privacy: delta=0.5 is above 1/n = 0.333"),
        (["client_privacy.epsilon=0"], "client_privacy.epsilon = 0: must be greater than 0"),
        (["client_privacy.noise=1"], "unknown key; did you mean client_privacy"),
        (["federation.recipe=krum"], "choose private=none, or reduce=factor-mean"),
        (["federation.min_updates=2"], "leave min_updates out"),
        (["federation.pieces.weigh=examples"], "choose weigh=uniform"),
        (["client_privacy.mechanism=tree"], "choose sampling='fixed'"),
        (["client_privacy.noise_multiplier=0.01"], "leave noise_multiplier out"),
    ],
)
def test_nonsense_is_refused_with_its_key(
    world: Path, tmp_path: Path, overrides: list[str], says: str
) -> None:
    with pytest.raises(ScenarioError, match=says):
        simulate(world_scenario(world, *PROMISED, *overrides), tmp_path / "run")


def test_where_clients_are_devices_the_servers_noise_is_its_own_secret(
    world: Path, tmp_path: Path
) -> None:
    """Devices are told the run's seed in every task."""
    scenario = world_scenario(world, *PROMISED)
    seeds = []
    for name in ("here", "fleet", "other"):
        with folder.locked(tmp_path / name) as where:
            run = folder.prepare(scenario, where, clients_here=name == "here")
        for _ in range(2):  # the same again after a restart
            with run.account() as account:
                assert account is not None
                assert account.randomness == (SEEDED if name == "here" else SERVER)
                seeds.append(account.sampling_seed)
    assert seeds[::2] == seeds[1::2]
    assert len(set(seeds)) == 3
