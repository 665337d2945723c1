"""Every assignment is true: what is frozen does not move, what is not sent does not travel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aggregation import core_basis, sketches
from aggregation.adapter import Adapter
from aggregation.aligning import align
from aggregation.low_rank import LowRank
from aggregation.rank_selection import importance, random_ranks, select
from aggregation.spec import AdapterSpec
from aggregation.train import Assignment
from clients import model as models
from clients.attachments import applied, attached, frozen
from clients.base import BaseRef
from clients.data import DataError, Examples, held_out
from clients.faults import JobFailure, JobFault
from clients.memory import ClientMemory, MissingTensors
from clients.model import adapter_spec
from clients.outgoing import noised, second_sketch
from clients.spending import noise_event
from clients.trainer import ResidentTrainer
from clients.training import Owner, TrainingPlan
from privacy.budget import LocalPrivacy
from privacy.events import SgdEvent
from privacy.ledger import Ledger
from privacy.randomness import Stream, seeded_key
from tests.clients.jobs import PLAN, job, keys, moved, started, update
from tests.device.tiny import LABELS

PRIVATE = LocalPrivacy(noise_multiplier=1.0, delta=1e-3)
ONE_STEP = TrainingPlan(sample_rate=1.0, steps=1, learning_rate=0.5, optimizer="sgd", momentum=0.0)


@pytest.fixture(scope="module")
def trainer(base: BaseRef) -> ResidentTrainer:
    return ResidentTrainer(base, threads=1)


def on_basis(start: Adapter, seed: int) -> Adapter:
    rng = np.random.default_rng(5)
    cores = {m.name: rng.normal(0, 0.3, (m.rank, m.rank)) for m in start.spec.modules}
    others = {t.key: start.tensors[t.key] for t in start.spec.others}
    return core_basis.settle(core_basis.with_core(start.spec, cores, seed, others), seed)


# --- frozen factors -------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [None, PRIVATE])
@pytest.mark.parametrize(
    ("assignment", "moves", "travels"),
    [
        (Assignment(), "A B head", "A B head"),
        (Assignment(trains="B", sends="B"), "B head", "B head"),
        (Assignment(trains="A", sends="A"), "A head", "A head"),
        (Assignment(sends="A", keeps="B"), "A", "A"),
        (Assignment(keeps="overlay"), "A B head", "A B head"),
        (Assignment(align=0.5, align_to="A"), "A B head", "A B head"),
        (Assignment(trains="B", sends="B", select="importance", share=0.5), "B head", "B head"),
        (Assignment(select="random", share=0.5, seed=3), "A B head", "A B head"),
    ],
)
def test_what_is_not_sent_is_the_start_bit_for_bit(
    trainer: ResidentTrainer,
    base: BaseRef,
    examples: Examples,
    tmp_path: Path,
    assignment: Assignment,
    moves: str,
    travels: str,
    private: LocalPrivacy | None,
) -> None:
    one = job(base, examples, assignment=assignment, memory=tmp_path, privacy=private)
    found = update(trainer, one)
    names = keys(one.adapter)
    assert moved(one.adapter, found.adapter) == set().union(*(names[k] for k in moves.split()))
    assert found.parcel is not None
    assert set(found.parcel.keys) == set().union(*(names[k] for k in travels.split()))
    assert found.start == one.adapter.digest


@pytest.mark.parametrize("trains", ["A", "B"])
def test_a_frozen_factor_has_no_gradient_and_does_not_move_on_the_model(
    base: BaseRef, trains: str
) -> None:
    start = started(base)
    peft_model = models.attach(models.build(base, 2), start.spec)
    before = {n: p.requires_grad for n, p in peft_model.named_parameters()}
    with attached(peft_model, start, Assignment(trains=trains, sends=trains)) as attachment:
        wanted = {n for n, p in peft_model.named_parameters() if p.requires_grad}
        assert all(f"lora_{trains}" in n or "classifier" in n for n in wanted)
        assert len(attachment.factors) == len(start.spec.modules)
        optimizer = torch.optim.AdamW([*attachment.factors, *attachment.whole], lr=0.1)
        logits = peft_model(torch.tensor([[2, 5, 6, 3]]), torch.ones(1, 4))
        logits.square().sum().backward()
        optimizer.step()
        frozen_keys = keys(start)["A" if trains == "B" else "B"]
        assert not moved(start, attachment.read()) & frozen_keys
    assert {n: p.requires_grad for n, p in peft_model.named_parameters()} == before


# --- rank indices ---------------------------------------------------------------------------------


def split(adapter: Adapter, start: Adapter, masks: Any) -> tuple[list[Any], list[Any]]:
    """The changes of chosen and of other rank indices, one array for each."""
    chosen, others = [], []
    for module in adapter.spec.modules:
        left, right = adapter.factors(module.name)
        left0, right0 = start.factors(module.name)
        for j, taken in enumerate(masks[module.name]):
            pair = (left[:, j] - left0[:, j], right[j] - right0[j])
            (chosen if taken else others).append(np.concatenate(pair))
    return chosen, others


@pytest.mark.parametrize("private", [None, LocalPrivacy(noise_multiplier=50.0, delta=1e-3)])
def test_random_ranks_move_and_no_other_not_even_by_noise(
    trainer: ResidentTrainer, base: BaseRef, examples: Examples, private: LocalPrivacy | None
) -> None:
    assignment = Assignment(select="random", share=0.5, seed=3)
    one = job(base, examples, assignment=assignment, privacy=private, round=2)
    masks = random_ranks(one.adapter.spec, 0.5, 3, "ann", 2)
    # On the model itself, before anything is put back.
    peft_model = trainer.shelf.model(one.adapter.spec)
    found = update(trainer, one)
    raw = models.read_tensors(peft_model, one.adapter.spec)
    for adapter in (raw, found.adapter):
        chosen, others = split(adapter, one.adapter, masks)
        assert len(chosen) == len(others) == 4
        assert all(np.abs(change).min() > 0 for change in chosen)
        assert all((change == 0).all() for change in others)


def test_importance_sends_the_indices_that_changed_the_product_most(
    trainer: ResidentTrainer, base: BaseRef, examples: Examples
) -> None:
    whole = update(trainer, job(base, examples, assignment=Assignment(trains="B", sends="B")))
    start = started(base)
    assignment = Assignment(trains="B", sends="B", select="importance", share=0.25)
    found = update(trainer, job(base, examples, assignment=assignment))
    masks = select(importance(whole.adapter, start), 0.25)
    chosen, others = split(found.adapter, start, masks)
    assert len(chosen) == 2
    assert all((change == 0).all() for change in others)
    for module in start.spec.modules:
        mask = masks[module.name]
        kept = found.adapter.factors(module.name)[0][:, mask]
        assert np.array_equal(kept, whole.adapter.factors(module.name)[0][:, mask])


# --- core -----------------------------------------------------------------------------------------


def test_the_cores_gradient_is_that_of_autograd(
    trainer: ResidentTrainer, base: BaseRef, examples: Examples
) -> None:
    """R - lr dR, with dR = left^T dB from a model that knows nothing of cores."""
    start = on_basis(started(base), 9)
    assignment = Assignment(trains="core", sends="core", seed=9)
    plan = replace(ONE_STEP, learning_rate=50.0, head_learning_rate=0.5)
    found = update(trainer, job(base, examples, adapter=start, assignment=assignment, plan=plan))
    peft_model = models.attach(models.build(base, 2), start.spec)
    models.load_tensors(peft_model, start)
    slots = models.parameter_slots(peft_model, start.spec)
    rows = models.tokenizer(base)(list(examples.texts), padding=True, return_tensors="pt")
    logits = peft_model(rows["input_ids"], rows["attention_mask"])
    torch.nn.functional.cross_entropy(logits, torch.tensor(examples.labels)).backward()
    basis, cores = core_basis.basis(start.spec, 9), core_basis.core_of(start, 9)
    for module in start.spec.modules:
        left, right = basis[module.name]
        gradient = left.T @ slots[module.keys[1]].grad.double().numpy()
        expected = cores[module.name] - 50.0 * gradient
        got = core_basis.core_of(found.adapter, 9)[module.name]
        assert np.abs(50.0 * gradient).max() > 1e-3
        assert np.allclose(got, expected, atol=2e-6), module.name
        assert np.array_equal(found.adapter.factors(module.name)[1], np.float32(right))
        # B has not left the span of the basis.
        b = found.adapter.factors(module.name)[0].astype(np.float64)
        assert np.allclose(left @ (left.T @ b), b, atol=1e-6)
    for tensor in start.spec.others:
        expected = (slots[tensor.key] - 0.5 * slots[tensor.key].grad).detach().numpy()
        assert np.allclose(found.adapter.tensors[tensor.key], expected, atol=1e-5)


def test_a_core_trains_privately_and_leaves_the_model_as_it_was(
    trainer: ResidentTrainer, base: BaseRef, examples: Examples
) -> None:
    start = on_basis(started(base), 9)
    assignment = Assignment(trains="core", sends="core", seed=9)
    plain = update(trainer, job(base, examples, adapter=start)).adapter.digest
    one = job(base, examples, adapter=start, assignment=assignment, privacy=PRIVATE)
    found = update(trainer, one)
    assert found.parcel is not None
    numbers = sum(m.rank**2 for m in start.spec.modules)
    numbers += sum(int(np.prod(t.shape)) for t in start.spec.others)
    assert found.parcel.nbytes <= 4 * numbers
    assert update(trainer, one).adapter.digest == found.adapter.digest
    assert update(trainer, job(base, examples, adapter=start)).adapter.digest == plain


def test_a_start_off_the_basis_is_refused(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    one = job(base, examples, assignment=Assignment(trains="core", sends="core"), privacy=PRIVATE)
    (result,) = ResidentTrainer(base, ledger, threads=1).train([one])
    assert isinstance(result, JobFailure)
    assert result.fault is JobFault.BAD_PLAN
    assert "public basis" in result.detail
    assert ledger.head().count == 0  # nothing was trained, so nothing was spent


# --- adapters beside ------------------------------------------------------------------------------


def residual(base: BaseRef, layers: tuple[int, ...], seed: int = 3) -> Adapter:
    spec = adapter_spec(base, LABELS, rank=3, alpha=6.0, targets=("query", "key"), layers=layers)
    spec = AdapterSpec(base.digest, spec.modules)
    rng = np.random.default_rng(seed)
    return Adapter(spec, {k: rng.normal(0, 0.3, s) for k, s in spec.shapes().items()})


def logits_of(peft_model: Any) -> torch.Tensor:
    with torch.inference_mode():
        ids = torch.tensor([[2, 5, 6, 9, 3], [2, 7, 8, 3, 0]])
        return peft_model(ids, (ids > 0).long())


def test_an_adapter_beside_adds_its_product_to_the_base_and_comes_off(base: BaseRef) -> None:
    start, extra = started(base), residual(base, (0, 1))
    peft_model = models.attach(models.build(base, 2), start.spec)
    models.load_tensors(peft_model, start)
    before = logits_of(peft_model)
    with applied(peft_model, extra):
        got = logits_of(peft_model)
        assert peft_model.get_base_model().split == 0  # it touches the lowest layer
    assert torch.equal(logits_of(peft_model), before)
    assert peft_model.get_base_model().split == 1
    dense = models.build(base, 2)
    for module in extra.spec.modules:
        change = LowRank.of(extra, module.name).dense().astype(np.float32)
        dense.get_submodule(module.name).weight.data += torch.from_numpy(change)
    other = models.attach(dense, start.spec)
    models.load_tensors(other, start)
    assert torch.allclose(got, logits_of(other), atol=1e-5)
    assert float((got - before).abs().max()) > 1e-3


def test_training_and_measuring_see_what_is_beside_below_the_trunk_too(
    base: BaseRef, examples: Examples
) -> None:
    extra = (residual(base, (0,)), residual(base, (1,), seed=4))
    kept, bare = ResidentTrainer(base, threads=1), ResidentTrainer(base, threads=1, cache_bytes=0)
    for private in (None, PRIVATE):
        one = job(
            base, examples, beside=extra, privacy=private, plan=replace(PLAN, optimizer="sgd")
        )
        first, second = update(kept, one).adapter, update(bare, one).adapter
        assert all(np.allclose(first.tensors[k], second.tensors[k], atol=1e-5) for k, _ in first)
        without = update(kept, replace(one, beside=())).adapter
        assert not np.allclose(first.pack(), without.pack(), atol=1e-4)
    found = kept.evaluate(one.adapter, examples, beside=extra)
    assert found.loss == pytest.approx(bare.evaluate(one.adapter, examples, beside=extra).loss)
    assert found.loss != kept.evaluate(one.adapter, examples).loss


def test_two_models_of_one_process_do_not_see_each_others_adapters(
    trainer: ResidentTrainer, base: BaseRef
) -> None:
    one, two = started(base), started(base, rank=2)
    first, second = (trainer.shelf.model(a.spec) for a in (one, two))
    models.load_tensors(second, two)
    before = logits_of(second)
    with attached(first, one, Assignment(), beside=frozen([residual(base, (1,))])):
        assert torch.equal(logits_of(second), before)


# --- what stays on the device ---------------------------------------------------------------------

SHARE_A = Assignment(sends="A", keeps="B")


def test_kept_b_and_head_go_on_from_round_to_round_and_never_leave(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    trainer = ResidentTrainer(base, threads=1)
    start = started(base)
    one = job(base, examples, assignment=SHARE_A, memory=tmp_path)
    update(trainer, one)
    own = ClientMemory(tmp_path, "r", "ann").of(1).adapters["own"]
    names = keys(start)
    assert moved(start, own) == names["A"] | names["B"] | names["head"]
    # The second round starts from the own B and the new A: the same as a plain training from there.
    rng = np.random.default_rng(2)
    handed = Adapter(start.spec, {k: v + rng.normal(0, 0.05, v.shape) for k, v in start})
    mixed = {k: handed.tensors[k] if k in names["A"] else own.tensors[k] for k, _ in start}
    two = replace(one, round=2, adapter=handed)
    found = update(trainer, two)
    plain = update(trainer, job(base, examples, round=2, adapter=Adapter(start.spec, mixed)))
    assert all(
        np.array_equal(found.adapter.tensors[k], plain.adapter.tensors[k]) for k in names["A"]
    )
    assert moved(handed, found.adapter) == names["A"]
    # Repeated, here and after a restart, it is the same round.
    assert update(trainer, two).adapter.digest == found.adapter.digest
    assert update(ResidentTrainer(base, threads=1), two).adapter.digest == found.adapter.digest
    # A client without memory of its own starts with what is handed out.
    other = update(trainer, replace(two, client="bob"))
    assert other.adapter.digest != found.adapter.digest


def test_a_personal_model_is_measured_with_what_is_kept(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    trainer = ResidentTrainer(base, threads=1)
    plan = replace(PLAN, steps=30)
    one = job(base, examples, assignment=SHARE_A, memory=tmp_path, plan=plan)
    found = update(trainer, one)
    owner = Owner(client="ann", run="r", round=1, assignment=SHARE_A, memory=tmp_path)
    mine = trainer.evaluate(found.adapter, examples, owner=owner)
    alone = trainer.evaluate(found.adapter, examples)
    own = ClientMemory(tmp_path, "r", "ann").of(1).adapters["own"]
    assert mine == trainer.evaluate(own, examples)
    assert mine.accuracy >= 0.9 > alone.accuracy
    stranger = replace(owner, client="bob")
    assert trainer.evaluate(found.adapter, examples, owner=stranger) == alone


OVERLAY = Assignment(keeps="overlay", mix=0.5)


def test_an_overlay_leaves_no_trace_in_what_is_sent(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    trainer = ResidentTrainer(base, threads=1)
    for private in (None, PRIVATE):
        for number in (1, 2):
            one = job(base, examples, round=number, privacy=private)
            plain = update(trainer, one)
            found = update(trainer, replace(one, assignment=OVERLAY, memory=tmp_path))
            assert found.adapter.digest == plain.adapter.digest
            assert (found.metrics, found.privacy_event) == (plain.metrics, plain.privacy_event)
    memory = ClientMemory(tmp_path, "r", "ann")
    first, second = (memory.of(n).adapters["overlay"] for n in (1, 2))
    assert moved(first, second) >= keys(first)["A"] | keys(first)["B"]


def test_an_overlay_trains_beside_the_frozen_shared_adapter(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    """One step of gradient descent on W0 + (1 - w) dW_g + w dW_l."""
    from clients import overlay as overlays
    from clients.loop import LocalRound
    from clients.memory import Memories

    trainer = ResidentTrainer(base, threads=1)
    shared = started(base)
    rng = np.random.default_rng(8)
    own = Adapter(shared.spec, {k: rng.normal(0, 0.2, v.shape) for k, v in shared})
    peft_model = trainer.shelf.model(shared.spec)
    features = trainer.shelf.features(peft_model, examples, 32)
    labels = torch.tensor(examples.labels)
    with attached(peft_model, shared, Assignment()) as attachment:
        run = LocalRound(peft_model, attachment, ONE_STEP, features, labels, seeded_key(1))
    found = overlays.train_own(
        run, shared, Memories({"overlay": own}), 0.3,
        beside=(), hidden=trainer.shelf.hidden(peft_model),
    ).adapters["overlay"]  # fmt: skip
    dense = models.build(base, 2)
    for module in shared.spec.modules:
        change = 0.7 * LowRank.of(shared, module.name).dense().astype(np.float32)
        dense.get_submodule(module.name).weight.data += torch.from_numpy(change)
    scaled = replace(own.spec, modules=tuple(replace(m, alpha=0.3 * 8) for m in own.spec.modules))
    other = models.attach(dense, scaled)
    start = {**own.tensors, **{t.key: shared.tensors[t.key] for t in shared.spec.others}}
    models.load_tensors(other, Adapter(scaled, start))
    slots = models.parameter_slots(other, scaled)
    rows = models.tokenizer(base)(list(examples.texts), padding=True, return_tensors="pt")
    logits = other(rows["input_ids"], rows["attention_mask"])
    torch.nn.functional.cross_entropy(logits, labels).backward()
    names = keys(shared)
    for key in names["A"] | names["B"]:
        expected = (slots[key] - 0.5 * slots[key].grad).detach().numpy()
        assert np.allclose(found.tensors[key], expected, atol=1e-5), key
    for key in names["head"]:
        assert np.array_equal(found.tensors[key], shared.tensors[key])


def test_a_text_is_answered_by_its_own_mixture(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    from clients import overlay as overlays
    from clients.measuring import measure

    trainer = ResidentTrainer(base, threads=1)
    shared = started(base)
    rng = np.random.default_rng(8)
    own = Adapter(shared.spec, {k: rng.normal(0, 0.5, v.shape) for k, v in shared})
    peft_model = trainer.shelf.model(shared.spec)
    few = examples.rows([0, 1, 2])
    features = trainer.shelf.features(peft_model, few, 32)
    weights = torch.tensor([0.0, 0.4, 1.0])
    whole = measure(
        peft_model, shared, features, torch.tensor(few.labels), own=overlays.Own(own, weights)
    )
    total = 0.0
    for row, weight in enumerate(weights.tolist()):
        dense = models.build(base, 2)
        for module in shared.spec.modules:
            change = (1 - weight) * LowRank.of(shared, module.name).dense()
            change += weight * LowRank.of(own, module.name).dense()
            dense.get_submodule(module.name).weight.data += torch.from_numpy(np.float32(change))
        for t in shared.spec.others:
            dense.get_parameter(t.name).data.copy_(torch.tensor(shared.tensors[t.key]))
        one = models.tokenizer(base)([few.texts[row]], return_tensors="pt")
        logits = dense(one["input_ids"], one["attention_mask"])
        truth = torch.tensor([few.labels[row]])
        total += float(torch.nn.functional.cross_entropy(logits, truth).detach())
    assert whole.loss == pytest.approx(total / 3, rel=1e-5)


def test_the_weight_of_a_text_is_its_mean_cosine_with_the_clients_own(
    base: BaseRef, examples: Examples
) -> None:
    from clients import overlay as overlays

    model, tokens = models.build(base, 2), models.tokenizer(base)

    def vector(text: str) -> torch.Tensor:
        row = tokens([text], return_tensors="pt")
        return model.trunk(row["input_ids"], row["attention_mask"], 1)[0].mean(0).detach()

    for cache_bytes in (1 << 30, 0):
        trainer = ResidentTrainer(base, threads=1, cache_bytes=cache_bytes)
        peft_model = trainer.shelf.model(started(base).spec)
        hidden = trainer.shelf.hidden(peft_model)
        own, asked = examples.rows(range(20)), examples.rows(range(20, 24))
        middle = overlays.centre(trainer.shelf.features(peft_model, own, 32), hidden)
        features = trainer.shelf.features(peft_model, asked, 32)
        found = overlays.weights(features, hidden, middle, 0.5)
        for text, weight in zip(asked.texts, found.tolist(), strict=True):
            cosines = [torch.cosine_similarity(vector(text), vector(o), dim=0) for o in own.texts]
            assert weight == pytest.approx(0.5 * max(0.0, float(sum(cosines)) / 20), abs=1e-5)


def test_personal_models_do_better_on_skewed_clients(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    """The labels of one client are turned round: no shared model can serve both."""
    turned = Examples(examples.texts, tuple(1 - x for x in examples.labels), LABELS)
    trainer = ResidentTrainer(base, threads=1)
    assignment = Assignment(keeps="overlay", mix=1.0)
    plan = replace(PLAN, steps=40)
    one = job(base, turned, assignment=assignment, memory=tmp_path, plan=plan)
    update(trainer, one)
    straight = update(trainer, job(base, examples, plan=plan)).adapter
    owner = Owner(client="ann", run="r", round=1, assignment=assignment, memory=tmp_path)
    mine, shared = (
        trainer.evaluate(straight, turned, owner=owner),
        trainer.evaluate(straight, turned),
    )
    assert shared.accuracy < 0.2
    assert mine.loss < shared.loss


@pytest.mark.parametrize(
    "change",
    [
        {"assignment": SHARE_A},
        {"assignment": OVERLAY},
        {"assignment": Assignment(sketch=4)},
        {"codec": "int8(error_feedback=true)"},
    ],
)
def test_what_needs_a_memory_is_refused_without_one(
    trainer: ResidentTrainer, base: BaseRef, examples: Examples, change: dict[str, Any]
) -> None:
    (result,) = trainer.train([job(base, examples, **change)])
    assert isinstance(result, JobFailure)
    assert (result.fault, "memory=" in result.detail) == (JobFault.BAD_PLAN, True)


# --- what is done before sending ------------------------------------------------------------------


def test_an_aligned_update_is_the_same_product_turned_to_the_start(
    trainer: ResidentTrainer, base: BaseRef, examples: Examples
) -> None:
    start, plain = started(base), update(trainer, job(base, examples)).adapter
    assignment = Assignment(align=0.5, align_to="B")
    found = update(trainer, job(base, examples, assignment=assignment)).adapter
    assert found.digest == align(plain, start, "B", 0.5).digest
    for module in start.spec.modules:
        change = LowRank.of(found, module.name) - LowRank.of(plain, module.name)
        assert change.norm() < 1e-5 * LowRank.of(plain, module.name).norm()
    assert found.digest != plain.digest


def test_the_two_sketches_are_those_of_the_trained_adapter(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    trainer = ResidentTrainer(base, threads=1)
    assignment = Assignment(sketch=6, seed=11)
    one = job(base, examples, assignment=assignment, memory=tmp_path, round=3)
    plain = update(trainer, replace(one, assignment=Assignment(), memory=None)).adapter
    found = update(trainer, one)
    names = keys(one.adapter)
    assert moved(one.adapter, found.adapter) == names["head"]
    assert found.parcel is not None
    assert set(found.parcel.keys) == names["head"]
    first = sketches.first_pass(plain, one.adapter, 6, 11, 3)
    assert all(np.array_equal(found.sketches[k], first[k]) for k in first)
    basis = {k: np.linalg.qr(v)[0].astype(np.float32) for k, v in first.items()}
    second = second_sketch(ClientMemory(tmp_path, "r", "ann"), 3, basis)
    expected = sketches.second_pass(plain, one.adapter, basis)
    assert all(np.array_equal(second[k], expected[k]) for k in expected)
    with pytest.raises(MissingTensors, match="round 4"):
        second_sketch(ClientMemory(tmp_path, "r", "ann"), 4, basis)


def test_factor_noise_is_clipped_drawn_once_and_accounted(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    trainer = ResidentTrainer(base, ledger, threads=1)
    assignment = Assignment(clip=0.5, noise_multiplier=2.0)
    one = job(base, examples, assignment=assignment)
    plain = update(trainer, job(base, examples)).adapter
    found = update(trainer, one)
    noise = []
    for key, value in found.adapter:
        exact = plain.tensors[key] * min(1.0, 0.5 / np.linalg.norm(plain.tensors[key]))
        noise.append((value - exact).ravel())
    assert np.concatenate(noise).std() == pytest.approx(2.0 * 0.5, rel=0.1)
    event = SgdEvent.from_mapping(found.privacy_event)
    tensors = len(one.adapter.spec.shapes())
    assert event.noise_multiplier * event.max_grad_norm == pytest.approx(2.0 * 0.5)
    assert event.max_grad_norm == pytest.approx(2 * np.sqrt(tensors) * 0.5)
    assert (event.sample_rate, event.steps) == (1.0, 1)
    assert [entry.event for entry in ledger.table()] == [event]
    assert set(found.metrics) == {"epsilon", "noise_multiplier", "steps"}
    assert update(trainer, one).adapter.digest == found.adapter.digest
    assert ledger.head().count == 1
    assert update(trainer, replace(one, round=2)).adapter.digest != found.adapter.digest
    (result,) = trainer.train([replace(one, privacy=PRIVATE)])
    assert isinstance(result, JobFailure)
    assert "two mechanisms" in result.detail


def test_clipping_bounds_what_any_data_can_move(base: BaseRef) -> None:
    """The event's sensitivity, from the two farthest adapters there are."""
    start = started(base)
    assignment = Assignment(clip=0.5, noise_multiplier=1.0)
    event = noise_event(start.spec, assignment)
    assert event is not None
    silent = replace(assignment, noise_multiplier=0.0)
    assert noise_event(start.spec, silent) is None
    huge = Adapter(start.spec, {k: 1e6 * v for k, v in start})
    far = Adapter(start.spec, {k: -v for k, v in huge})
    one, two = (noised(a, silent, Stream(seeded_key(0))).pack() for a in (huge, far))
    distance = float(np.linalg.norm(one.astype(np.float64) - two))
    assert distance == pytest.approx(event.max_grad_norm, rel=1e-5)


def test_error_feedback_telescopes_over_the_rounds_of_the_real_trainer(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    trainer = ResidentTrainer(base, threads=1)
    codec = "int4(error_feedback=true)"
    start = started(base)
    trained, arrived = np.zeros(start.spec.size), np.zeros(start.spec.size)
    rng = np.random.default_rng(3)
    for number in range(1, 5):
        handed = Adapter(start.spec, {k: v + rng.normal(0, 0.02, v.shape) for k, v in start})
        one = job(base, examples, round=number, adapter=handed)
        exact = update(trainer, one).adapter
        lossy = replace(one, codec=codec, memory=tmp_path)
        found = update(trainer, lossy)
        assert update(trainer, lossy).adapter.digest == found.adapter.digest  # repeated
        trained += exact.pack().astype(np.float64) - handed.pack()
        arrived += found.adapter.pack().astype(np.float64) - handed.pack()
        assert found.parcel is not None
        assert found.parcel.nbytes < 0.2 * 4 * start.spec.size
    left = ClientMemory(tmp_path, "r", "ann").of(4).vectors["feedback"]
    assert float(np.abs(left).max()) > 1e-4
    assert np.allclose(arrived + left, trained, atol=1e-5)


# --- holding out ----------------------------------------------------------------------------------


def test_held_out_rows_never_train_and_are_what_is_measured(
    trainer: ResidentTrainer, base: BaseRef, examples: Examples
) -> None:
    kept, out = held_out(examples, "ann", 0.3)
    assert 0.1 < len(out) / len(examples) < 0.5
    assignment = Assignment(holdout=0.3)
    found = update(trainer, job(base, examples, assignment=assignment))
    assert found.weight == len(kept)
    assert found.adapter.digest == update(trainer, job(base, kept)).adapter.digest
    owner = Owner(client="ann", run="r", round=1, assignment=assignment)
    assert trainer.evaluate(found.adapter, examples, owner=owner) == trainer.evaluate(
        found.adapter, out
    )
    few = examples.rows([0])
    side = JobFault.BAD_DATA
    ends = [isinstance(r, JobFailure) and r.fault is side for r in trainer.train(
        [job(base, few, client=f"c{i}", assignment=Assignment(holdout=0.5)) for i in range(8)]
    )]  # fmt: skip
    assert 0 < sum(ends) < 8
    lonely = [replace(owner, client=f"c{i}", assignment=Assignment(holdout=0.5)) for i in range(8)]
    for one, all_held in zip(lonely, ends, strict=True):
        if all_held:
            assert trainer.evaluate(found.adapter, few, owner=one).examples == 1
        else:
            with pytest.raises(DataError, match="none of the 1 examples"):
                trainer.evaluate(found.adapter, few, owner=one)


def test_a_row_falls_on_its_side_whatever_other_rows_there_are(examples: Examples) -> None:
    kept, out = held_out(examples, "ann", 0.3)
    assert set(kept.texts).isdisjoint(out.texts)  # equal texts stay together
    fewer = examples.rows(range(0, 60, 2))
    assert set(held_out(fewer, "ann", 0.3)[1].texts) <= set(out.texts)
    assert held_out(examples, "bob", 0.3)[1].texts != out.texts
    assert held_out(examples, "ann", 0.0)[0] is examples


# --- as before ------------------------------------------------------------------------------------


def test_an_assignment_of_everything_changes_no_bit(base: BaseRef, examples: Examples) -> None:
    """Frozen values of runs before assignments existed would be machine-bound; equality is not."""
    for private in (None, PRIVATE):
        for key in (None, b"d" * 32):
            trainer = ResidentTrainer(base, threads=1, device_key=key)
            plain = job(base, examples, privacy=private, seed=4)
            said = replace(plain, assignment=Assignment(), codec="float32", beside=())
            assert update(trainer, plain).adapter.digest == update(trainer, said).adapter.digest


def test_a_devices_randomness_depends_on_what_it_is_asked_to_do(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    trainer = ResidentTrainer(base, ledger, threads=1, device_key=b"d" * 32)
    one = job(base, examples, privacy=PRIVATE)
    update(trainer, one)
    only = replace(one, assignment=Assignment(trains="B", sends="B"))
    update(trainer, only)
    update(trainer, replace(one, beside=(residual(base, (1,)),)))
    update(trainer, only)
    assert ledger.head().count == 3
    update(trainer, replace(only, codec="int8"))  # only encodes what was released anyway
    assert ledger.head().count == 3
