"""Every recipe in rounds from a scenario file by name: real clients, a tiny base, mixed ranks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from aggregation.describing import takes_mixed_ranks
from aggregation.recipes import RECIPES
from aggregation.state import GlobalState
from clients.client_app import resident
from federation.strategy import Reply, TrainingResult
from simulations import evaluation
from simulations.run import simulate
from simulations.scenario import Scenario
from tests.simulations.rounds import CountingGrid, rounds_of
from tests.simulations.world import world_scenario


@pytest.fixture(scope="session")
def open_world(world: Path) -> Path:
    """The tiny scenario without privacy."""
    path = world.with_name("open.toml")
    private = "[privacy]\nnoise_multiplier = 0.8\ndelta = 1e-3\n"
    assert private in world.read_text()
    path.write_text(world.read_text().replace(private, ""))
    return path


def scenario_of(name: str, path: Path, *more: str) -> Scenario:
    """Two rounds of a recipe, with as many clients as it needs and ranks as mixed as it takes."""
    chosen = RECIPES[name]
    words = [f"federation.recipe={name}", "federation.rounds=2", *more]
    if chosen.reduce.needs(3):
        words += ["partition.clients=7", "partition.min_examples=8"]
    if chosen.reduce.trusts:
        words.append("federation.trusted=1")
    if takes_mixed_ranks(chosen) and "train.rank=2" not in more:
        words.append("train.ranks=[1, 2, 4]")
    return world_scenario(path, *words)


def check(name: str, scenario: Scenario, result: TrainingResult, grid: CountingGrid) -> None:
    rounds = result.rounds[1:]
    assert [r.number for r in rounds] == [1, 2]
    for record in rounds:
        assert record.refused == {}
        assert len(record.used) >= (1 if name == "fedbuff" else scenario.partition.clients)
        assert record.unchanged == ""
        assert record.adapter_out != record.adapter_in
        numbers = [*record.metrics.values(), record.aggregation_error, record.kept_energy]
        assert all(math.isfinite(number) for number in numbers)
        assert record.bytes_up > 0
        assert record.bytes_down > 0
        if scenario.holdout:
            assert set(record.personal) == set(record.used)
            assert 0 <= record.metrics["personal_accuracy"] <= 1
    assert result.adapter.is_finite()
    assert all(adapter.is_finite() for adapter in result.beside)
    # Bytes reported are bytes carried, to the last one, in both directions and passes.
    up, down = (sum(getattr(r, f"bytes_{way}") for r in rounds) for way in ("up", "down"))
    late = grid.carried["training up"] - up  # of clients at work when the last version closed
    assert late == 0 if name != "fedbuff" else late >= 0
    assert down == grid.carried["training down"]
    assert sum(r.bytes_measuring for r in rounds) == grid.carried["measuring down"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_in_rounds(name: str, open_world: Path, tmp_path: Path) -> None:
    scenario = scenario_of(name, open_world)
    run, result, grid = rounds_of(scenario, tmp_path / "run")
    check(name, scenario, result, grid)
    chosen, asked = RECIPES[name], RECIPES[name].train.assignment(2)
    before = GlobalState(run.initial).adapter
    moved = {
        key: not np.array_equal(value, before.tensors[key]) for key, value in result.adapter
    }  # fmt: skip
    if chosen.refactor.kind == "keep":
        for module in result.adapter.spec.modules:
            key_a, key_b = module.keys
            assert moved[key_b] == (asked.sends != "A" or asked.trains == "A")
            assert moved[key_a] == (name not in ("ffa-lora", "median", "trimmed-mean", "bulyan"))
    if asked.keeps != "B":
        assert any(moved[tensor.key] for tensor in result.adapter.spec.others)
    assert bool(result.beside) == chosen.refactor.beside


@pytest.mark.parametrize(
    "name", ["ffa-lora", "fedsvd", "fedex-lora", "fedask", "feddpa", "lora-a2", "krum"]
)
def test_recipes_run_with_dp_sgd_on_the_clients(name: str, world: Path, tmp_path: Path) -> None:
    scenario = scenario_of(name, world)
    _, result, grid = rounds_of(scenario, tmp_path / "run")
    check(name, scenario, result, grid)
    for record in result.rounds[1:]:
        assert set(record.privacy_events) == set(record.used)
        # With privacy nothing that a client measured on its training rows leaves it.
        assert all("loss" not in told for told in record.client_metrics.values())


class StopHereError(Exception):
    pass


STATEFUL = {
    "fedadam": ["federation.recipe=fedadam"],
    "momentum on products": ["federation.pieces.optimise=momentum"],
    "fedsa-lora": ["federation.recipe=fedsa-lora"],
    "feddpa": ["federation.recipe=feddpa"],
    "error feedback": [
        "federation.recipe=fedit",
        "federation.pieces.codec=int4(error_feedback=true)",
    ],
    "fedmomentum": ["federation.recipe=fedmomentum"],
    "fedask": ["federation.recipe=fedask"],
    "fedbuff": ["federation.recipe=fedbuff", "federation.buffer=2"],
}


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_run_that_is_killed_in_a_round_ends_as_an_undisturbed_one(
    kind: str, world: Path, tmp_path: Path
) -> None:
    words = [*STATEFUL[kind], "federation.rounds=3"]
    _, whole, _ = rounds_of(world_scenario(world, *words), tmp_path / "whole")

    def die(reply: Reply) -> None:
        if reply.round == 2:  # one client has trained, and kept what it keeps
            raise StopHereError

    with pytest.raises(StopHereError):
        rounds_of(world_scenario(world, *words), tmp_path / "killed", on_reply=die)
    asked: list[int] = []
    _, rest, _ = rounds_of(
        world_scenario(world, *words),
        tmp_path / "killed",
        on_reply=lambda reply: asked.append(reply.round),
    )
    assert min(asked) == (1 if kind == "fedbuff" else 2)  # or who was at work since the first
    assert rest.adapter.digest == whole.adapter.digest
    assert [one.digest for one in rest.beside] == [one.digest for one in whole.beside]
    for mine, theirs in zip(rest.rounds, whole.rounds, strict=True):
        assert (mine.adapter_out, mine.metrics) == (theirs.adapter_out, theirs.metrics)
        assert (mine.personal, mine.bytes_up) == (theirs.personal, theirs.bytes_up)


def test_the_state_that_resuming_rests_on_matters(world: Path, tmp_path: Path) -> None:
    """Without it the runs above would end elsewhere: the test would notice."""
    words = ["federation.recipe=fedsa-lora", "federation.rounds=2"]
    _, whole, _ = rounds_of(world_scenario(world, *words), tmp_path / "whole")
    with pytest.raises(StopHereError):
        rounds_of(world_scenario(world, *words), tmp_path / "lost", on_reply=_die_in_two)
    for path in sorted((tmp_path / "lost" / "memory").rglob("*.safetensors")):
        path.unlink()
    _, lost, _ = rounds_of(world_scenario(world, *words), tmp_path / "lost")
    assert lost.adapter.digest != whole.adapter.digest


def _die_in_two(reply: Reply) -> None:
    if reply.round == 2:
        raise StopHereError


def test_the_global_model_is_measured_with_what_is_beside_it(
    open_world: Path, tmp_path: Path
) -> None:
    result = simulate(scenario_of("flora", open_world), tmp_path / "run")
    assert (result.adapter_folder / "residual" / "adapter_model.safetensors").is_file()
    assert len(result.beside) == 1
    trainer = resident(str(open_world.parent / "tiny-base"), tmp_path / "x.sqlite", False, 1)
    from simulations import datasets

    rows = datasets.read(result.out / "partitions" / "heldout.jsonl", ("bad", "<good>"))
    measure = evaluation.by_class(trainer, rows, max_length=16)
    last = result.metrics[-1]
    assert measure(result.adapter, result.beside)["loss"] == pytest.approx(last["loss"])
    assert measure(result.adapter)["loss"] != pytest.approx(last["loss"], rel=1e-6)
    assert last["aggregation_error"] < 1e-6  # nothing is lost, though the adapter begins anew
    card = (result.adapter_folder / "README.md").read_text()
    for word in ("residual", "set_adapter", "flora: both | float32"):
        assert word in card
    assert "adapter/residual" in result.report.read_text()


def test_the_card_of_a_run_with_a_residual_loads_both(
    open_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = simulate(scenario_of("fedex-lora", open_world), tmp_path / "run")
    code = (result.adapter_folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('"tiny-base"', repr(str(open_world.parent / "tiny-base")))
    code = code.replace("path/to/this/folder", str(result.adapter_folder))
    space: dict[str, object] = {}
    exec(compile(code, "card", "exec"), space)  # noqa: S102 - our own card is what is tested
    assert capsys.readouterr().out.strip() in ("bad", "<good>")
    assert space["model"].active_adapters == ["default", "residual"]  # type: ignore[attr-defined]


def test_without_a_global_model_the_report_and_the_card_say_so(
    open_world: Path, tmp_path: Path
) -> None:
    result = simulate(scenario_of("fedsa-lora", open_world), tmp_path / "run")
    page, card = result.report.read_text(), (result.adapter_folder / "README.md").read_text()
    for text in (page, card):
        assert "There is no global model" in text
        assert "svd-warm-start" in text
    last = result.metrics[-1]
    assert set(last["personal"]) == {f"client-{i:05d}" for i in range(3)}
    rows = last["personal_examples"]
    assert 0 < rows < 30  # a fifth of 90
    assert f"{100 * last['personal_accuracy']:.1f} %" in page
    assert (result.adapter_folder / "version.json").read_text().count("one model for each") == 1
    assert "no part of what" not in page
    assert (result.out / "memory").is_dir()
