"""Every PEFT type on our classifier: the same logits as peft's own, trained, privately too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from aggregation import peft_layout
from aggregation.adapter import Adapter
from aggregation.init import initial_adapter
from aggregation.spec import AdapterSpec, SpecError
from aggregation.update import Update
from clients import model as models
from clients.base import BaseRef, BaseUnsupported
from clients.data import Examples
from clients.faults import JobFailure
from clients.trainer import ResidentTrainer
from clients.training import ClientJob, TrainingPlan
from privacy.budget import LocalPrivacy
from privacy.ledger import Ledger
from privacy.local import MechanismError, PrivateSgd, check_model
from privacy.randomness import Stream, seeded_key
from tests.device.tiny import LABELS, TEXTS
from tests.device.typed import METHODS, random, spec_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def attached(base: BaseRef, spec: AdapterSpec, adapter: Adapter | None = None) -> Any:
    peft_model = models.attach(models.build(base, len(LABELS)), spec)
    models.load_tensors(peft_model, adapter or random(spec))
    return peft_model


def inputs(base: BaseRef) -> dict[str, torch.Tensor]:
    rows = models.tokenizer(base)(list(TEXTS), padding=True, return_tensors="pt")
    return {key: rows[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("method", [*METHODS, "dora", "biases", "norms"])
def test_a_stranger_gets_the_same_logits_from_the_folder(
    base: BaseRef, method: str, tmp_path: Path
) -> None:
    import peft

    spec = spec_of(base, method)
    adapter = random(spec)
    ours = attached(base, spec, adapter)
    peft_layout.write(tmp_path / "adapter", adapter, base_name=base.name)
    theirs = peft.PeftModel.from_pretrained(models.build(base, 2), tmp_path / "adapter").eval()
    batch = inputs(base)
    with torch.no_grad():
        assert torch.allclose(ours(**batch), theirs(**batch), atol=2e-6)
        plain = models.build(base, 2)
        head = {t.module.rpartition(".")[2]: adapter.tensors for t in spec.whole}
        assert "classifier" in head
        plain.classifier.weight.copy_(
            torch.tensor(adapter.tensors["base_model.model.classifier.weight"])
        )
        plain.classifier.bias.copy_(
            torch.tensor(adapter.tensors["base_model.model.classifier.bias"])
        )
        assert not torch.allclose(ours(**batch), plain(**batch), atol=1e-2)
    theirs.save_pretrained(tmp_path / "again")
    again = peft_layout.read(tmp_path / "again", base_digest=base.digest)
    assert all(np.array_equal(again.tensors[key], value) for key, value in adapter)


@pytest.mark.parametrize("method", [*METHODS, "dora", "biases"])
@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_the_trunk_below_the_adapter_is_exact(
    base: BaseRef, method: str, layers: tuple[int, ...]
) -> None:
    peft_model = attached(base, spec_of(base, method, layers))
    model = peft_model.get_base_model()
    lowest = {"prompt": 0, "dora": 1, "biases": 1}.get(method, layers[0])
    assert model.split == lowest
    batch = inputs(base)
    if method == "prompt":
        return  # everything lies above the virtual tokens
    with torch.no_grad():
        trunk = model.trunk(**batch)
        cached = peft_model(trunk=trunk, attention_mask=batch["attention_mask"])
        assert torch.equal(peft_model(**batch), cached)


def test_a_norm_that_is_saved_whole_is_not_frozen_below(base: BaseRef) -> None:
    assert models.first_trained_layer(spec_of(base, "norms"), base.layers) == 0
    assert models.first_trained_layer(spec_of(base, "biases"), base.layers) == 1


@pytest.mark.parametrize("method", [*METHODS, "dora", "biases", "norms"])
def test_tensors_go_in_and_come_out_and_they_alone_train(base: BaseRef, method: str) -> None:
    spec = spec_of(base, method)
    adapter = random(spec)
    peft_model = attached(base, spec, adapter)
    assert models.read_tensors(peft_model, spec).digest == adapter.digest
    slots = models.parameter_slots(peft_model, spec)
    training = {id(p) for p in peft_model.parameters() if p.requires_grad}
    assert training == {id(slot) for slot in slots.values()}
    other = spec_of(base, "prompt" if method != "prompt" else "ia3")
    with pytest.raises(BaseUnsupported, match="another specification"):
        models.load_tensors(peft_model, random(other))


@pytest.mark.parametrize("method", METHODS)
def test_the_start_changes_nothing_where_that_can_be(base: BaseRef, method: str) -> None:
    spec = spec_of(base, method)
    start = initial_adapter(spec, seed=3)
    assert start.digest == initial_adapter(spec, seed=3).digest
    peft_model = attached(base, spec, start)
    plain = models.build(base, 2)
    with torch.no_grad():
        for name in ("weight", "bias"):
            value = torch.tensor(start.tensors[f"base_model.model.classifier.{name}"])
            getattr(plain.classifier, name).copy_(value)
        found, expected = peft_model(**inputs(base)), plain(**inputs(base))
    if method in ("ia3", "bottleneck"):
        assert torch.allclose(found, expected, atol=1e-7)
    else:
        own = start.tensors[spec.own[0].key]
        assert 0.015 < own.std() < 0.025
        assert own.any(axis=1).all()


def test_a_start_that_needs_the_base_is_refused(base: BaseRef) -> None:
    for method in ("dora", "biases"):
        with pytest.raises(SpecError, match="an adapter folder that peft has made"):
            initial_adapter(spec_of(base, method), seed=0)


def test_the_specification_is_refused_where_it_cannot_be(base: BaseRef) -> None:
    with pytest.raises(BaseUnsupported, match="'adapters' is not one of lora, ia3"):
        spec_of(base, "adapters")
    with pytest.raises(BaseUnsupported, match="a prefix needs the uppermost ones"):
        spec_of(base, "prefix", (0,))
    with pytest.raises(SpecError, match=r"shape \(2000, 32\) is not \(tokens, n\)"):
        models.adapter_spec(base, LABELS, 2, 4.0, method="prompt", virtual_tokens=2000)


def losses(peft_model: Any, base: BaseRef, rows: list[int]) -> torch.Tensor:
    batch = {key: value[rows] for key, value in inputs(base).items()}
    labels = torch.tensor([1, 0, 1, 1, 0])[rows]
    return nn.functional.cross_entropy(peft_model(**batch), labels, reduction="none")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_private_gradients_are_those_of_one_example_at_a_time(
    base: BaseRef, method: str, clip: float
) -> None:
    peft_model = attached(base, spec_of(base, method))
    named = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) for name, p in named.items()}
    for row in range(5):
        grads = torch.autograd.grad(losses(peft_model, base, [row])[0], list(named.values()))
        norm = float(torch.sqrt(sum((g**2).sum() for g in grads)))
        for name, grad in zip(named, grads, strict=True):
            expected[name] += grad * min(1.0, clip / norm)
            assert float(grad.abs().max()) > 0, name
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = torch.optim.SGD(named.values(), lr=1.0)
    private = PrivateSgd(
        peft_model,
        optimizer,
        max_grad_norm=clip,
        noise_multiplier=0.0,
        expected_batch=1.0,
        noise=Stream(seeded_key(0)),
    )
    with private:
        assert private.step(losses(peft_model, base, rows) for rows in ([0, 3], [1, 2, 4])) == 5
    scale = float(torch.cat([g.ravel() for g in expected.values()]).norm())
    for name, parameter in named.items():
        moved = before[name] - parameter.detach()
        assert float((moved - expected[name]).norm()) < 2e-5 * max(scale, 1.0), name


def test_what_has_no_gradient_per_example_is_refused_before_training(base: BaseRef) -> None:
    import peft

    with pytest.raises(MechanismError, match="no DoRA"):
        check_model(attached(base, spec_of(base, "dora")))
    for config in (
        peft.IA3Config(target_modules=["key"], feedforward_modules=[]),
        peft.PeanutConfig(target_modules=["key"]),
    ):
        untouched = peft.get_peft_model(models.build(base, 2), config)
        with pytest.raises(MechanismError, match=r"clients\.model\.attach"):
            check_model(untouched)


def job(adapter: Adapter, examples: Examples, privacy: LocalPrivacy | None = None) -> ClientJob:
    plan = TrainingPlan(learning_rate=0.05, head_learning_rate=1e-6, steps=3, batch_size=16)
    return ClientJob(
        client="ann", run="r", round=1, adapter=adapter, data=examples, plan=plan, privacy=privacy
    )


@pytest.mark.parametrize("method", [*METHODS, "dora", "biases"])
def test_the_trainer_moves_the_types_own_tensors_at_their_own_rate(
    base: BaseRef, method: str, examples: Examples
) -> None:
    start = random(spec_of(base, method))
    (update,) = ResidentTrainer(base, threads=1).train([job(start, examples)])
    assert isinstance(update, Update), update
    own = {tensor.key for tensor in start.spec.own}
    for key, value in update.adapter:
        moved = float(np.abs(value - start.tensors[key]).max())
        assert moved > 1e-3 if key in own or "lora_" in key else 0 < moved < 1e-4, key


def test_dora_is_refused_privately_and_nothing_is_spent(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    privacy = LocalPrivacy(epsilon=8.0, delta=1e-3, rounds=1)
    trainer = ResidentTrainer(base, ledger, threads=1)
    (refused,) = trainer.train([job(random(spec_of(base, "dora")), examples, privacy)])
    assert isinstance(refused, JobFailure)
    assert "no DoRA" in refused.detail
    assert ledger.clients() == ()
    (update,) = trainer.train([job(random(spec_of(base, "ia3")), examples, privacy)])
    assert isinstance(update, Update)
    assert ledger.clients() == ("ann",)
