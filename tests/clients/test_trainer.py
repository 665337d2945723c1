from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aggregation.adapter import Adapter
from aggregation.init import initial_adapter
from aggregation.update import Update
from clients.base import BaseRef
from clients.data import DataError, DataSource, Examples
from clients.faults import JobFailure, JobFault
from clients.model import adapter_spec
from clients.trainer import ResidentTrainer, private_event
from clients.training import ClientJob, Owner, TrainingPlan
from clients.trunk import TrunkCache
from privacy import local
from privacy.budget import BudgetExceeded, LocalPrivacy
from privacy.calibration import epsilon
from privacy.events import SgdEvent
from privacy.ledger import Ledger, Terms
from privacy.randomness import DEVICE, SEEDED
from tests.device.tiny import LABELS, make_base

PLAN = TrainingPlan(sample_rate=0.25, steps=4, learning_rate=0.02, head_learning_rate=0.1)
PRIVATE = LocalPrivacy(epsilon=8.0, delta=1e-3, rounds=3)


@pytest.fixture(scope="module")
def trainer(base: BaseRef) -> ResidentTrainer:
    return ResidentTrainer(base, threads=1)


def job(base: BaseRef, data: Examples | DataSource, **change: Any) -> ClientJob:
    layers = change.pop("layers", (1,))
    start = initial_adapter(adapter_spec(base, LABELS, rank=2, alpha=4.0, layers=layers), seed=1)
    values = {"client": "ann", "run": "r", "round": 1, "adapter": start, "data": data, "plan": PLAN}
    return ClientJob(**{**values, **change})


def update(trainer: ResidentTrainer, one: ClientJob) -> Update:
    (result,) = trainer.train([one])
    assert isinstance(result, Update), result
    return result


@pytest.mark.parametrize("layers", [(1,), (0, 1)])  # with a trunk in memory, and without
def test_plain_training_learns(
    trainer: ResidentTrainer, base: BaseRef, examples: Examples, layers: tuple[int, ...]
) -> None:
    one = job(base, examples, layers=layers, plan=replace(PLAN, steps=30))
    before = trainer.evaluate(one.adapter, examples)
    found = update(trainer, one)
    after = trainer.evaluate(found.adapter, examples)
    assert after.accuracy >= 0.9 > before.accuracy
    assert after.loss < before.loss
    assert (found.weight, found.start, after.examples) == (60.0, one.adapter.digest, 60)
    assert found.privacy_event == {}
    moved = [k for k, v in found.adapter if not np.array_equal(v, one.adapter.tensors[k])]
    assert set(moved) == set(one.adapter.tensors)


def test_plain_training_is_what_a_loop_over_single_examples_would_do(
    trainer: ResidentTrainer, base: BaseRef, examples: Examples
) -> None:
    """One full-batch step of gradient descent, against autograd on the whole model."""
    from clients import model as models

    plan = TrainingPlan(sample_rate=1.0, steps=1, learning_rate=0.5, optimizer="sgd")
    one = job(base, examples, plan=plan)
    rng = np.random.default_rng(0)
    start = Adapter(one.adapter.spec, {k: rng.normal(0, 0.3, v.shape) for k, v in one.adapter})
    found = update(trainer, replace(one, adapter=start))
    peft_model = models.attach(models.build(base, 2), start.spec)
    models.load_tensors(peft_model, start)
    slots = models.parameter_slots(peft_model, start.spec)
    rows = models.tokenizer(base)(list(examples.texts), padding=True, return_tensors="pt")
    logits = peft_model(rows["input_ids"], rows["attention_mask"])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(examples.labels))
    grads = torch.autograd.grad(loss, list(slots.values()))
    for (key, slot), grad in zip(slots.items(), grads, strict=True):
        expected = (slot - 0.5 * grad).detach().numpy()
        assert np.allclose(found.adapter.tensors[key], expected, atol=1e-5), key
    assert found.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_private_training_spends_first_and_tells_nothing(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    trainer = ResidentTrainer(base, ledger, threads=1)
    found = update(trainer, job(base, examples, privacy=PRIVATE))
    event = SgdEvent.from_mapping(found.privacy_event)
    assert event == private_event(PLAN, PRIVATE, 60)
    assert ledger.table()[0].event == event
    assert set(found.metrics) == {"epsilon", "noise_multiplier", "sample_rate", "steps"}
    assert found.metrics["epsilon"] == epsilon([event], 1e-3) < 8.0
    assert found.adapter.is_finite()
    assert trainer.randomness == SEEDED


def test_the_whole_run_stays_within_its_budget_and_the_next_round_is_refused(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    trainer = ResidentTrainer(base, ledger, threads=1)
    jobs = [job(base, examples, privacy=PRIVATE, round=n) for n in (1, 2, 3, 4)]
    results = trainer.train(jobs)
    assert [type(r) for r in results] == [Update, Update, Update, JobFailure]
    failure = results[-1]
    assert isinstance(failure, JobFailure)
    assert (failure.fault, failure.client, failure.round) == (JobFault.BUDGET_EXCEEDED, "ann", 4)
    assert 7.9 < ledger.spent("ann", 1e-3) <= 8.0
    assert ledger.head().count == 3


def test_a_client_refuses_by_its_own_ledger_whatever_the_server_asks(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.set_limit(Terms(delta=1e-3, epsilon=7.0))
    trainer = ResidentTrainer(base, ledger, threads=1)
    generous = replace(PRIVATE, epsilon=500.0)
    asked = [
        job(base, examples, privacy=PRIVATE),
        job(base, examples, privacy=generous, round=2),
        job(base, examples, privacy=None, round=3),
        job(base, examples, privacy=PRIVATE, round=4),
    ]
    first, greedy, bare, last = trainer.train(asked)
    assert isinstance(first, Update)
    assert isinstance(last, Update)
    for refused in (greedy, bare):
        assert isinstance(refused, JobFailure)
        assert refused.fault is JobFault.BUDGET_EXCEEDED
    assert [entry.round for entry in ledger.table("ann")] == [1, 4]
    assert ledger.spent("ann", 1e-3) <= 7.0
    assert [entry.terms.model for entry in ledger.table() if entry.terms] == [
        asked[0].adapter.spec.digest
    ] * 2
    # Accuracy and loss of any adapter on its own rows would tell them without any bound.
    with pytest.raises(BudgetExceeded, match="measuring on its own rows"):
        trainer.evaluate(asked[0].adapter, examples, owner=Owner(client="ann", run="r", round=1))
    assert trainer.evaluate(asked[0].adapter, examples).examples == len(examples)


def test_the_mode_of_private_steps_is_told_with_its_reason(
    base: BaseRef, examples: Examples, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="airpeft.clients.loop"):
        update(ResidentTrainer(base, threads=1), job(base, examples, privacy=PRIVATE))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("private steps by linear gradients per example: only linear layers")


def test_nothing_is_computed_when_the_ledger_refuses(
    base: BaseRef, examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = ResidentTrainer(base, Ledger(tmp_path / "ledger.sqlite"), threads=1)
    steps: list[int] = []
    take = local.PrivateSgd.step

    def counted(self: local.PrivateSgd, losses: Any) -> int:
        steps.append(1)
        return take(self, losses)

    monkeypatch.setattr(local.PrivateSgd, "step", counted)
    greedy = replace(PRIVATE, noise_multiplier=0.3, epsilon=1.0)
    (result,) = trainer.train([job(base, examples, privacy=greedy)])
    assert isinstance(result, JobFailure)
    assert steps == []
    trainer.train([job(base, examples, privacy=PRIVATE)])
    assert len(steps) == 4


def test_empty_batches_are_steps_too(trainer: ResidentTrainer, base: BaseRef) -> None:
    few = Examples(("good", "bad"), (1, 0), LABELS)
    plan = replace(PLAN, sample_rate=0.02, steps=6)  # 6 batches, all empty with p = 0.78
    found = update(trainer, job(base, few, plan=plan, privacy=replace(PRIVATE, delta=0.1)))
    assert found.metrics["steps"] == 6.0
    assert found.adapter.is_finite()
    assert found.adapter.digest != found.start


def test_equal_jobs_give_equal_bits_whatever_went_before(base: BaseRef, examples: Examples) -> None:
    one = job(base, examples, privacy=PRIVATE, seed=5)
    other = job(base, examples, client="bob", layers=(0, 1), privacy=None, seed=6)
    first, second = (ResidentTrainer(base, threads=1) for _ in range(2))
    digest = update(first, one).adapter.digest
    update(second, other)
    second.evaluate(other.adapter, examples)
    assert update(second, one).adapter.digest == digest
    assert update(first, one).adapter.digest == digest
    torch.manual_seed(99)
    for change in ({"seed": 6}, {"round": 2}, {"client": "eve"}, {"run": "s"}):
        assert update(first, replace(one, **change)).adapter.digest != digest  # type: ignore[arg-type]


def test_a_devices_noise_is_its_own_and_repeats_only_for_the_same_inputs(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    mine = ResidentTrainer(base, ledger, threads=1, device_key=b"m" * 32)
    theirs = ResidentTrainer(base, threads=1, device_key=b"t" * 32)
    one = job(base, examples, privacy=PRIVATE, seed=5)
    digest = update(mine, one).adapter.digest
    assert mine.randomness == DEVICE
    assert update(mine, one).adapter.digest == digest  # a round repeated after a crash
    assert ledger.head().count == 1
    assert update(mine, replace(one, seed=6)).adapter.digest == digest  # the server's seed is moot
    assert update(theirs, one).adapter.digest != digest
    # The same round from another start is another release: it is spent again.
    moved = Adapter(one.adapter.spec, {k: v + 1e-6 for k, v in one.adapter})
    after = update(mine, replace(one, adapter=moved)).adapter
    assert ledger.head().count == 2
    # And with noise of its own: the difference of the two would else give the gradients away.
    before = update(mine, one).adapter
    assert float(np.abs(after.pack() - before.pack()).max()) > 1e-2


def test_data_may_be_a_file(
    trainer: ResidentTrainer, base: BaseRef, data_file: Path, examples: Examples
) -> None:
    by_path = update(trainer, job(base, DataSource(data_file)))
    by_value = update(trainer, job(base, examples))
    assert by_path.adapter.digest == by_value.adapter.digest
    data_file.write_text(json.dumps({"text": "good", "label": "positive"}) + "\n")
    assert update(trainer, job(base, DataSource(data_file))).weight == 1.0  # not the old content


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"data": Examples((), (), LABELS)}, JobFault.BAD_DATA),
        ({"data": Examples(("x",), (0,), ("other", "names"))}, JobFault.BAD_DATA),
        ({"data": DataSource(Path("/nowhere.jsonl"))}, JobFault.BAD_DATA),
        ({"privacy": replace(PRIVATE, delta=0.5)}, JobFault.BAD_PLAN),
        (
            {"privacy": PRIVATE, "plan": TrainingPlan(batch_size=61)},
            JobFault.BAD_PLAN,
        ),
    ],
)  # fmt: skip
def test_a_job_that_cannot_be_done_has_a_fault_and_stops_no_other(
    trainer: ResidentTrainer, base: BaseRef, examples: Examples, change: dict[str, Any], fault: Any
) -> None:
    bad = replace(job(base, examples), **change)
    results = trainer.train([bad, job(base, examples, client="bob")])
    assert isinstance(results[0], JobFailure)
    assert results[0].fault is fault
    assert isinstance(results[1], Update)
    assert results[1].client == "bob"


def test_an_adapter_of_another_base_is_refused(
    trainer: ResidentTrainer, examples: Examples, tmp_path: Path
) -> None:
    other = make_base(tmp_path / "other", seed=1)
    (result,) = trainer.train([job(other, examples)])
    assert isinstance(result, JobFailure)
    assert result.fault is JobFault.WRONG_BASE
    with pytest.raises(DataError, match="no such file"):
        trainer.evaluate(job(trainer.base, examples).adapter, DataSource(Path("/nowhere.csv")))


def test_the_trunk_is_computed_once_per_content_and_bounded(
    trainer: ResidentTrainer, base: BaseRef, examples: Examples
) -> None:
    from clients import model as models

    model, tokenizer = models.build(base, 1), models.tokenizer(base)
    runs: list[int] = []
    compute = model.trunk
    model.trunk = lambda *args: runs.append(1) or compute(*args)  # type: ignore[func-returns-value]
    cache = TrunkCache(model, tokenizer, limit=100_000)

    def features(texts: tuple[str, ...], split: int = 1) -> Any:
        few = Examples(texts, (0,) * len(texts), LABELS)
        return cache.features(texts, few.texts_digest, max_length=16, split=split)

    first = features(examples.texts[:30])
    assert features(examples.texts[:30]) is first
    assert len(runs) == 1
    for row in (0, 7):  # what the model computes for one text alone
        ids, mask = first.tokens.batch(np.array([row]))
        start, length = first.tokens.starts[row], first.tokens.lengths[row]
        assert torch.allclose(
            first.hidden[start : start + length], compute(ids, mask, 1)[0], atol=1e-5
        )
    features(examples.texts[30:])
    features(examples.texts[10:40])  # the limit holds two such sets
    assert features(examples.texts[:30]) is not first
    assert features(examples.texts[:30], split=0).hidden is None
    tiny = TrunkCache(model, tokenizer, limit=1000)
    assert tiny.features(examples.texts, "d", max_length=16, split=1).hidden is None


def test_training_gives_the_same_with_and_without_the_trunk(
    base: BaseRef, examples: Examples
) -> None:
    with_trunk = ResidentTrainer(base, threads=1)
    without = ResidentTrainer(base, threads=1, cache_bytes=0)
    for privacy in (None, PRIVATE):
        one = job(base, examples, privacy=privacy, plan=replace(PLAN, optimizer="sgd"))
        a, b = update(with_trunk, one).adapter, update(without, one).adapter
        assert all(np.allclose(a.tensors[k], b.tensors[k], atol=1e-5) for k in a.tensors)
