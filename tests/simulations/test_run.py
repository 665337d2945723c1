from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from peft import PeftModel

from aggregation import peft_layout
from clients.base import find_base
from clients.client_app import resident
from clients.model import build, read_tensors
from privacy.ledger import Ledger
from simulations import datasets
from simulations.events import ClientDone, Event, Finished, Prepared, RoundDone, RoundStarted
from simulations.folder import RunError, locked
from simulations.run import simulate
from simulations.scenario import ScenarioError
from simulations.server_app import RunResult
from tests.simulations.world import world_scenario


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, list[Event]]:
    """One run from start to end, and what it told."""
    events: list[Event] = []
    out = tmp_path_factory.mktemp("runs") / "whole"
    return simulate(world_scenario(world), out, progress=events.append), events


def comparable(result: RunResult) -> list[dict[str, object]]:
    """The lines without what differs from run to run: the time that it took."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in result.metrics]


def test_the_run_folder_has_everything(whole: tuple[RunResult, list[Event]]) -> None:
    result, _ = whole
    there = {p.relative_to(result.out).as_posix() for p in result.out.rglob("*") if p.is_file()}
    assert there >= {
        "scenario.resolved.toml",
        "metrics.jsonl",
        "ledger.sqlite",
        "curves.png",
        "report.html",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/README.md",
        "adapter/privacy.json",
        "partitions/client-00000.jsonl",
        "partitions/heldout.jsonl",
        "checkpoints/round-00003/round.json",
    }
    lines = [json.loads(x) for x in (result.out / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(result.metrics)
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    last = lines[-1]
    assert last["used"] == last["cohort"] == 3
    assert last["bytes_up"] == last["bytes_down"] == 3 * result.adapter.nbytes
    assert last["adapter"] == result.adapter.digest
    assert 0 <= last["accuracy"] <= 1
    assert set(last) >= {"accuracy:bad", "accuracy:<good>", "loss", "aggregation_error", "seconds"}
    assert tomllib.loads((result.out / "scenario.resolved.toml").read_text())["train"]["rank"] == 2


def test_progress_is_told_in_order(whole: tuple[RunResult, list[Event]]) -> None:
    result, events = whole
    kinds = [type(event) for event in events]
    rounds = [RoundStarted, ClientDone, ClientDone, ClientDone, RoundDone]
    assert kinds == [Prepared, RoundDone, *rounds, *rounds, *rounds, Finished]
    assert events[0].done == 0  # type: ignore[union-attr]
    assert sum(sum(c) for c in events[0].clients.values()) == 90  # type: ignore[union-attr]
    assert events[-1].adapter_digest == result.adapter.digest  # type: ignore[union-attr]


def test_the_ledger_has_each_round_of_each_client_once_and_agrees(
    whole: tuple[RunResult, list[Event]],
) -> None:
    result, _ = whole
    ledger = Ledger(result.out / "ledger.sqlite")
    entries = [(e.client, e.round) for e in ledger.table()]
    assert sorted(entries) == sorted((f"client-{c:05d}", r) for c in range(3) for r in (1, 2, 3))
    told = result.metrics[-1]["epsilon"]
    assert told == pytest.approx({c: ledger.spent(c, 1e-3) for c in ledger.clients()})
    assert result.privacy["example"]["epsilon"] == pytest.approx(max(told.values()))
    assert result.metrics[1]["epsilon_max"] < result.metrics[3]["epsilon_max"]


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(
    whole: tuple[RunResult, list[Event]], world: Path, tmp_path: Path
) -> None:
    result, _ = whole
    again = simulate(world_scenario(world), tmp_path / "again")
    assert again.adapter.digest == result.adapter.digest
    assert comparable(again) == comparable(result)
    assert (again.out / "curves.png").read_bytes() == (result.out / "curves.png").read_bytes()
    other = simulate(world_scenario(world, seed=4), tmp_path / "other")
    assert other.adapter.digest != result.adapter.digest


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    whole: tuple[RunResult, list[Event]], world: Path, tmp_path: Path, kind: type[BaseException]
) -> None:
    result, _ = whole

    def stop(event: Event) -> None:
        # In the middle of round 2: one client has trained and spent.
        if isinstance(event, ClientDone) and event.round == 2:
            raise kind

    with pytest.raises(kind):
        simulate(world_scenario(world), tmp_path / "run", progress=stop)
    events: list[Event] = []
    again = simulate(world_scenario(world), tmp_path / "run", progress=events.append)
    assert isinstance(events[0], Prepared)
    assert events[0].done == 1
    assert [e.round for e in events if isinstance(e, RoundDone)] == [2, 3]
    assert again.adapter.digest == result.adapter.digest
    assert comparable(again) == comparable(result)
    entries = [(e.client, e.round) for e in Ledger(again.out / "ledger.sqlite").table()]
    assert len(entries) == len(set(entries)) == 9
    # A third time there is nothing to train.
    events.clear()
    simulate(world_scenario(world), tmp_path / "run", progress=events.append)
    assert [type(e) for e in events] == [Prepared, Finished]


def test_peft_loads_the_adapter_and_finds_the_same_accuracy(
    whole: tuple[RunResult, list[Event]], world: Path
) -> None:
    result, _ = whole
    base = find_base(world.parent / "tiny-base")
    model = PeftModel.from_pretrained(build(base, 2), str(result.adapter_folder)).eval()
    assert read_tensors(model, result.adapter.spec).digest == result.adapter.digest
    assert peft_layout.read(result.adapter_folder).digest == result.adapter.digest
    heldout = datasets.read(result.out / "partitions" / "heldout.jsonl", ("bad", "<good>"))
    trainer = resident(str(base.path), result.out / "ledger.sqlite", False, 1)
    measured = trainer.evaluate(result.adapter, heldout, max_length=16)
    assert measured.accuracy == pytest.approx(result.metrics[-1]["accuracy"])
    assert measured.loss == pytest.approx(result.metrics[-1]["loss"])


def test_the_report_stands_alone_and_escapes_what_comes_from_data(
    whole: tuple[RunResult, list[Event]],
) -> None:
    result, _ = whole
    page = result.report.read_text()
    assert "<good>" not in page
    assert "&lt;good&gt;" in page
    assert "client-00002" in page
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page)
    assert "<script" not in page
    assert str(result.out) not in page
    card = (result.adapter_folder / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card
    assert "differential privacy" in card or "epsilon" in card
    config = json.loads((result.adapter_folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-base"


def test_the_snippet_of_the_model_card_is_python_that_runs(
    whole: tuple[RunResult, list[Event]], world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, _ = whole
    card = (result.adapter_folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace('"tiny-base"', repr(str(world.parent / "tiny-base")))
    code = code.replace("path/to/this/folder", str(result.adapter_folder))
    exec(compile(code, "card", "exec"), {})  # noqa: S102 - our own card is what is tested
    assert capsys.readouterr().out.strip() in ("bad", "<good>")


def test_without_privacy_nothing_is_spent_and_the_report_says_so(
    world: Path, tmp_path: Path
) -> None:
    path = tmp_path / "open.toml"
    text = world.read_text().replace("[privacy]\nnoise_multiplier = 0.8\ndelta = 1e-3\n", "")
    path.write_text(text.replace("rows.csv", str(world.parent / "rows.csv")))
    result = simulate(world_scenario(path, "federation.rounds=1"), tmp_path / "run")
    assert result.metrics[-1]["epsilon_max"] is None
    assert result.metrics[-1]["epsilon"] == {}
    assert "without differential privacy" in result.report.read_text()
    assert result.privacy["example"] is None


def test_natural_groups_from_a_column(world: Path, tmp_path: Path) -> None:
    scenario = world_scenario(
        world, "partition.scheme=natural", "partition.column=shop", "federation.rounds=1"
    )
    result = simulate(scenario, tmp_path / "run")
    assert result.metrics[-1]["used"] == 3
    with pytest.raises(datasets.DatasetError, match="no column 'city'"):
        simulate(
            world_scenario(world, "partition.scheme=natural", "partition.column=city"),
            tmp_path / "other",
        )


def test_a_foreign_or_busy_or_unwritable_folder_is_refused(
    whole: tuple[RunResult, list[Event]], world: Path, tmp_path: Path
) -> None:
    result, _ = whole
    with pytest.raises(RunError, match=r"holds the run tiny-.*choose another"):
        simulate(world_scenario(world, "train.rank=4"), result.out)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("dear")
    with pytest.raises(RunError, match=r"not empty and holds no run \(mother\.txt"):
        simulate(world_scenario(world), tmp_path / "letters")
    with pytest.raises(RunError, match="a part of the path is a file"):
        simulate(world_scenario(world), tmp_path / "letters" / "mother.txt" / "run")
    with locked(tmp_path / "busy"), pytest.raises(RunError, match="another process"):
        simulate(world_scenario(world), tmp_path / "busy")
    with pytest.raises(RunError, match="backend 'spark' is not one of local, ray"):
        simulate(world_scenario(world), tmp_path / "x", backend="spark")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["base.name=no-such-base"], "no base model 'no-such-base'.*minilm"),
        (["partition.clients=50"], "90 training rows cannot give 50 clients 12 rows"),
        (["data.path=none.csv"], "no such file"),
        (["data.text=sentence"], "no column 'sentence'.*label, shop, text"),
        (["data.label=shop"], "label|class"),
        (['train.targets=["query", "output"]'], "'output' is not one of"),
    ],
)
def test_what_cannot_run_is_said_before_anything_starts(
    world: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises((ScenarioError, datasets.DatasetError), match=message):
        simulate(world_scenario(world, *overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_residual_is_not_merged_into_a_quantised_base(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "quantised"
    shutil.copytree(world.parent / "tiny-base", base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    words = [f"base.name={base}", "federation.recipe=flora", "federation.rounds=1"]
    scenario = world_scenario(world, *words, "federation.pieces.refactor=fresh(fold=true)")
    with pytest.raises(ScenarioError, match="choose fold=false"):
        simulate(scenario, tmp_path / "run")
