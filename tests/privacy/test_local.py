"""The mechanism against a reference that takes one example at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from privacy.local import MechanismError, PrivateSgd, check_model, poisson_batch
from privacy.per_example import MODES
from privacy.randomness import Stream, derive, seeded_key
from tests.device.tiny import LABELS, TEXTS, make_base

KEY = seeded_key(0)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny BERT with an adapter that is not at its start, and six tokenised texts."""
    from clients.model import adapter_spec, attach, build, tokenizer

    torch.set_num_threads(1)
    base = make_base(tmp_path_factory.mktemp("base") / "tiny")
    spec = adapter_spec(base, LABELS, rank=3, alpha=6.0, targets=("query", "key", "value"))
    peft_model = attach(build(base, len(LABELS)), spec)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.5)
    rows = tokenizer(base)([*TEXTS, "a"], padding=True, return_tensors="pt")
    inputs = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    return peft_model, inputs, torch.tensor([1, 0, 1, 1, 0, 0])


def losses(setting: Any, rows: list[int]) -> torch.Tensor:
    peft_model, inputs, labels = setting
    logits = peft_model(**{key: value[rows] for key, value in inputs.items()})
    return nn.functional.cross_entropy(logits, labels[rows], reduction="none")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def reference(setting: Any, rows: list[int], clip: float) -> dict[str, torch.Tensor]:
    """Clip the gradient of each example by itself, and sum."""
    parameters = trainable(setting[0])
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        grads = torch.autograd.grad(losses(setting, [row])[0], list(parameters.values()))
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        for name, grad in zip(parameters, grads, strict=True):
            total[name] += grad * min(1.0, clip / float(norm))
    return total


@pytest.fixture
def restored(setting: Any) -> Any:
    """The setting, its adapter put back afterwards."""
    before = {name: p.detach().clone() for name, p in trainable(setting[0]).items()}
    yield setting
    with torch.no_grad():
        for name, parameter in trainable(setting[0]).items():
            parameter.copy_(before[name])


class Recorder(torch.optim.SGD):  # type: ignore[misc]
    """Keeps the gradients it was given: parameters subtracted afterwards lose digits."""

    def step(self, closure: Any = None) -> None:
        self.grads = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        super().step(closure)


def stepped(
    setting: Any,
    batches: list[list[list[int]]],
    *,
    clip: float,
    sigma: float,
    expected: float,
    mode: str | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters before and after some private steps of plain gradient descent at rate 1."""
    parameters = trainable(setting[0])
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    with PrivateSgd(
        setting[0],
        optimizer,
        max_grad_norm=clip,
        noise_multiplier=sigma,
        expected_batch=expected,
        noise=Stream(derive(KEY, "noise")),
        mode=mode,
    ) as private:
        for parts in batches:
            private.step(losses(setting, rows) for rows in parts)
    return before, {name: p.detach().clone() for name, p in parameters.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [0.05, 1.0, 1e6])
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4, 5]], [[5], [0, 3], [1, 2, 4]]])
def test_without_noise_the_step_is_the_clipped_sum_over_the_expected_batch(
    restored: Any, clip: float, parts: list[list[int]], mode: str
) -> None:
    rows = [row for part in parts for row in part]
    expected = reference(restored, rows, clip)
    optimizer = Recorder(trainable(restored[0]).values(), lr=1.0)
    with PrivateSgd(
        restored[0],
        optimizer,
        max_grad_norm=clip,
        noise_multiplier=0.0,
        expected_batch=4.0,
        noise=Stream(KEY),
        mode=mode,
    ) as private:
        assert private.mode.name == mode
        assert private.step(losses(restored, rows) for rows in parts) == 6
    scale = float(torch.cat([total.ravel() for total in expected.values()]).norm())
    for (name, total), grad in zip(expected.items(), optimizer.grads, strict=True):
        # Opacus divides by the norm plus 1e-6; the rest is single precision.
        assert float((grad - total / 4.0).norm()) <= 1e-5 * scale, name
    if clip == 0.05:  # every example is clipped, so the clip matters in this test
        assert not torch.allclose(
            next(iter(expected.values())), next(iter(reference(restored, rows, 1e6).values()))
        )


def test_an_empty_batch_is_a_step_of_noise_alone(restored: Any) -> None:
    before, after = stepped(restored, [[]], clip=0.5, sigma=2.0, expected=4.0)
    moved = torch.cat([((before[n] - after[n]) * 4.0).ravel() for n in before])
    assert moved.numel() > 400
    assert float(moved.std()) == pytest.approx(0.5 * 2.0, rel=0.1)
    assert abs(float(moved.mean())) < 0.15


def test_noise_is_added_once_per_step_however_many_parts(restored: Any) -> None:
    start = {name: p.detach().clone() for name, p in trainable(restored[0]).items()}
    results = []
    for parts in ([[0, 1, 2, 3]], [[3], [1], [0, 2]]):
        with torch.no_grad():
            for name, parameter in trainable(restored[0]).items():
                parameter.copy_(start[name])
        results.append(stepped(restored, [parts], clip=0.5, sigma=1.0, expected=4.0)[1])
    assert all(torch.allclose(results[0][n], results[1][n], atol=1e-5) for n in start)


def test_the_noise_is_the_streams_and_nobody_elses(restored: Any) -> None:
    start = {name: p.detach().clone() for name, p in trainable(restored[0]).items()}

    def run(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in trainable(restored[0]).items():
                parameter.copy_(start[name])
        return stepped(restored, [[[0, 1]], []], clip=0.5, sigma=1.0, expected=2.0)[1]

    first, second = run(1), run(2)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trains", ["lora_A", "lora_B"])
def test_what_is_frozen_is_neither_clipped_nor_noised(
    restored: Any, trains: str, mode: str
) -> None:
    """With one factor frozen the step is that of a model in which it is a constant."""
    model, rows = restored[0], [0, 1, 2, 3, 4, 5]
    frozen = [p for n, p in trainable(model).items() if trains not in n and "classifier" not in n]
    start = [p.detach().clone() for p in frozen]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        expected = reference(restored, rows, 0.05)
        optimizer = Recorder(trainable(model).values(), lr=1.0)
        with PrivateSgd(
            model,
            optimizer,
            max_grad_norm=0.05,
            noise_multiplier=0.0,
            expected_batch=4.0,
            noise=Stream(KEY),
            mode=mode,
        ) as private:
            private.step([losses(restored, rows)])
        scale = float(torch.cat([total.ravel() for total in expected.values()]).norm())
        for (name, total), grad in zip(expected.items(), optimizer.grads, strict=True):
            assert float((grad - total / 4.0).norm()) <= 1e-5 * scale, name
        stepped(restored, [[[0, 1]], []], clip=0.5, sigma=9.0, expected=2.0)
        assert all(torch.equal(p, before) for p, before in zip(frozen, start, strict=True))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def ranks(model: nn.Module, kept: int) -> dict[str, torch.Tensor]:
    """Masks that let the first rank indices of every module train."""
    found = {}
    for name, parameter in trainable(model).items():
        if "lora_" in name:
            rank = min(parameter.shape)
            mask = (torch.arange(rank) < kept).float()
            found[name] = mask[:, None] if "lora_A" in name else mask[None, :]
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4, 5]], [[5], [0, 3], [1, 2, 4]]])
def test_a_masked_entry_counts_in_no_norm(restored: Any, parts: list[list[int]], mode: str) -> None:
    model, clip = restored[0], 0.05
    masks = ranks(model, 2)
    parameters = trainable(model)
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in range(6):
        grads = torch.autograd.grad(losses(restored, [row])[0], list(parameters.values()))
        grads = [g * masks.get(n, 1.0) for n, g in zip(parameters, grads, strict=True)]
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        for name, grad in zip(parameters, grads, strict=True):
            expected[name] += grad * min(1.0, clip / float(norm))
    optimizer = Recorder(parameters.values(), lr=1.0)
    with PrivateSgd(
        model,
        optimizer,
        max_grad_norm=clip,
        noise_multiplier=0.0,
        expected_batch=4.0,
        noise=Stream(KEY),
        masks=masks,
        mode=mode,
    ) as private:
        private.step(losses(restored, rows) for rows in parts)
    scale = float(torch.cat([total.ravel() for total in expected.values()]).norm())
    unmasked = reference(restored, list(range(6)), clip)
    for (name, total), grad in zip(expected.items(), optimizer.grads, strict=True):
        assert float((grad - total / 4.0).norm()) <= 1e-5 * scale, name
    head = next(name for name in expected if "classifier" in name)
    assert not torch.allclose(expected[head], unmasked[head])  # the norm is another


def test_a_masked_entry_gets_no_noise_in_any_step_and_any_optimiser(restored: Any) -> None:
    model = restored[0]
    masks, parameters = ranks(model, 1), trainable(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.0)
    with PrivateSgd(
        model,
        optimizer,
        max_grad_norm=1.0,
        noise_multiplier=50.0,
        expected_batch=2.0,
        noise=Stream(KEY),
        masks=masks,
    ) as private:
        for rows in ([0, 1], [2], [3, 4]):
            private.step([losses(restored, rows)])
        private.step([])
    for name, parameter in parameters.items():
        still = parameter.detach() == before[name]
        mask = masks.get(name, torch.ones(1)).expand(parameter.shape)
        assert bool((still == (mask == 0)).all()), name


@pytest.mark.parametrize("name", ["nothing.of.the.kind", "frozen", "shape"])
def test_a_mask_that_fits_nothing_is_refused(restored: Any, name: str) -> None:
    model = restored[0]
    known = {
        "frozen": next(n for n, p in model.named_parameters() if not p.requires_grad),
        "shape": next(iter(trainable(model))),
    }
    with pytest.raises(MechanismError, match="fits no trainable parameter"):
        PrivateSgd(
            model,
            torch.optim.SGD(trainable(model).values(), lr=1.0),
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            expected_batch=2.0,
            noise=Stream(KEY),
            masks={known.get(name, name): torch.ones(7, 7)},
        )


def test_a_factor_that_is_masked_whole_need_not_move(restored: Any) -> None:
    model = restored[0]
    masks = {name: torch.zeros(1) for name in ranks(model, 1)}
    with PrivateSgd(
        model,
        torch.optim.SGD(trainable(model).values(), lr=1.0),
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        expected_batch=2.0,
        noise=Stream(KEY),
        masks=masks,
    ) as private:
        assert private.step([losses(restored, [0, 1])]) == 2


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_the_mechanism_stays_on_the_model(restored: Any, mode: str) -> None:
    from peft import get_peft_model_state_dict

    model = restored[0]
    names = list(get_peft_model_state_dict(model))
    hooks = sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())
    stepped(restored, [[[0, 1]], []], clip=0.5, sigma=1.0, expected=2.0, mode=mode)
    assert not any("forward" in vars(m) for m in model.modules())
    assert list(get_peft_model_state_dict(model)) == names
    assert not any("_module." in name for name in names)
    assert hooks == sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())
    assert not model.training
    left = {"grad_sample", "summed_grad", "_forward_counter"}
    assert not any(left & set(vars(p)) for p in model.parameters())
    losses(restored, [0, 1]).sum().backward()  # plain training works as before
    assert all(p.grad is not None for p in trainable(model).values())
    model.zero_grad()


def test_a_model_that_does_not_move_is_found_at_the_first_step(restored: Any) -> None:
    model = restored[0]
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
    with (
        pytest.raises(MechanismError, match="820"),
        PrivateSgd(
            model,
            optimizer,
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            expected_batch=2.0,
            noise=Stream(KEY),
        ) as private,
    ):
        private.step([losses(restored, [0, 1])])


def test_an_optimiser_over_other_tensors_is_refused(restored: Any) -> None:
    stale = [p.detach().clone().requires_grad_() for p in trainable(restored[0]).values()]
    with pytest.raises(MechanismError, match="exactly the model's trainable"):
        PrivateSgd(
            restored[0],
            torch.optim.SGD(stale, lr=1.0),
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            expected_batch=2.0,
            noise=Stream(KEY),
        )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "batch normalisation"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), "no trainable parameter"),
        (lambda: nn.Bilinear(2, 2, 2), "no gradient per example for Bilinear"),
    ],
)
def test_models_that_cannot_be_private_are_refused(
    make: Callable[[], nn.Module], says: str
) -> None:
    with pytest.raises(MechanismError, match=says):
        check_model(make())


def test_an_embedding_adapter_is_refused_by_name(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(MechanismError, match="linear layers only"):
        check_model(peft_model)


def test_poisson_batches_have_the_right_rate_and_are_sometimes_empty() -> None:
    stream = Stream(derive(KEY, "sampling"))
    batches = [poisson_batch(200, 0.01, stream) for _ in range(2000)]
    sizes = np.array([len(batch) for batch in batches])
    assert sizes.mean() == pytest.approx(2.0, abs=0.15)
    assert sizes.var() == pytest.approx(2.0, abs=0.3)
    assert (sizes == 0).mean() == pytest.approx(0.134, abs=0.03)
    share = np.bincount(np.concatenate(batches), minlength=200) / 2000
    assert share.max() < 0.025


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e36])
def test_an_example_without_a_finite_gradient_moves_nothing(
    restored: Any, mode: str, factor: float
) -> None:
    """Its presence must not show: NaN and infinity survive every clip."""

    parameters = trainable(restored[0])
    start = {name: p.detach().clone() for name, p in parameters.items()}

    def release(weights: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
        optimizer = Recorder(parameters.values(), lr=1e-3)
        with PrivateSgd(
            restored[0], optimizer, max_grad_norm=1.0, noise_multiplier=0.0, expected_batch=1.0,
            noise=Stream(KEY), mode=mode,
        ) as private:  # fmt: skip
            private.step([losses(restored, [0, 1, 2, 3]) * weights])
        return optimizer.grads

    without = release(torch.tensor([1.0, 1.0, 0.0, 1.0]))
    found = release(torch.tensor([1.0, 1.0, factor, 1.0]))
    pairs = zip(found, without, strict=True)
    moved = math.sqrt(sum(float((a - b).double().norm()) ** 2 for a, b in pairs))
    assert moved <= 1.0 + 1e-5
    if not math.isfinite(factor):
        assert moved < 1e-6
