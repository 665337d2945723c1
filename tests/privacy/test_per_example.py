"""Gradients per example: what the linear mode forms, refuses, costs; and when it is chosen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from privacy.local import PrivateSgd
from privacy.per_example import (
    HOOKS,
    LINEAR,
    MODES,
    SAMPLE_BYTES,
    MechanismError,
    choose,
    linear_gradients,
)
from privacy.randomness import Stream, seeded_key

ROWS = 5


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def reference(model: nn.Module, x: Tensor) -> list[Tensor]:
    """One backward pass for each example."""
    each = [torch.autograd.grad(model(row[None]).square().sum(), trainable(model)) for row in x]
    return [torch.stack(grads) for grads in zip(*each, strict=True)]


def formed(model: nn.Module, x: Tensor) -> list[Tensor]:
    with linear_gradients(model) as gradients:
        model(x).square().sum().backward()
        gradients.collect(len(x))
    found = [p.grad_sample for p in trainable(model)]
    for parameter in trainable(model):
        del parameter.grad_sample
    return found


class Twice(nn.Module):
    """One layer, used twice; a second one that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.same = nn.Linear(4, 4), nn.Linear(4, 4)
        self.same.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.same(self.layer(torch.tanh(self.layer(x))))


@pytest.mark.parametrize("shape", [(ROWS, 4), (ROWS, 3, 4), (ROWS, 2, 3, 4), (1, 3, 4)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        lambda: nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2)),
        Twice,
    ],
)
def test_they_are_those_of_one_example_at_a_time(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    for found, expected in zip(formed(model, x), reference(model, x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(module) for module in model.modules())


def test_of_a_layer_only_what_trains_has_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    assert choose(model).name == LINEAR
    x = torch.randn(ROWS, 4)
    for found, expected in zip(formed(model, x), reference(model, x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


class Past(nn.Linear):
    """Reads its inner layer's weight past that layer."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.requires_grad_(False)
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.inner.weight


class Crosswise(nn.Module):
    """Puts the batch into the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class Idle(Crosswise):
    """Has a layer that it does not use."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layer.weight.detach().sum() * torch.ones(1, requires_grad=True)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Past, "inner is used past its layer"),
        (Crosswise, "layer saw 3 rows for 5 examples"),
        (Idle, "layer trains, but no example"),
    ],
)
def test_what_would_not_be_one_examples_gradient_is_refused(
    make: Callable[[], nn.Module], says: str
) -> None:
    model = make()
    with (
        pytest.raises(MechanismError, match=says),
        PrivateSgd(
            model,
            torch.optim.SGD(trainable(model), lr=1.0),
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            expected_batch=2.0,
            noise=Stream(seeded_key(0)),
        ) as private,
    ):
        private.step(model(torch.randn(ROWS, 3, 4)).square().sum(dim=(1, 2)) for _ in range(1))
    assert not any("forward" in vars(module) for module in model.modules())


def changed() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].forward = model[0].forward
    return model


@pytest.mark.parametrize(
    ("make", "name", "says"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.ReLU()), LINEAR, "only linear layers"),
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)), HOOKS, "1, a LayerNorm, trains"),
        (lambda: nn.LayerNorm(2), HOOKS, "the model, a LayerNorm"),
        (changed, HOOKS, "0, a Linear"),
    ],
)
def test_the_mode_is_chosen_by_what_trains_and_says_why(
    make: Callable[[], nn.Module], name: str, says: str
) -> None:
    mode = choose(make())
    assert mode.name == name
    assert says in mode.reason
    assert "ghost clipping" in mode.reason


def test_every_method_of_ours_has_a_mode(tmp_path: Path) -> None:
    from clients.model import adapter_spec, attach, build
    from tests.device.tiny import LABELS, make_base

    base = make_base(tmp_path / "tiny")
    found = {}
    for method in ("lora", "ia3", "prompt", "prefix", "bottleneck"):
        spec = adapter_spec(base, LABELS, rank=2, alpha=4.0, method=method)
        found[method] = choose(attach(build(base, len(LABELS)), spec)).name
    assert found.pop("lora") == LINEAR
    assert set(found.values()) == {HOOKS}


def test_only_a_mode_that_is_right_can_be_asked_for() -> None:
    assert choose(nn.Linear(2, 2), HOOKS).reason.startswith("it was asked for")
    with pytest.raises(MechanismError, match="is for linear layers only: the model, a LayerNorm"):
        choose(nn.LayerNorm(2), LINEAR)
    with pytest.raises(MechanismError, match="'ghost' is not one of linear, hooks"):
        choose(nn.Linear(2, 2), "ghost")


def test_an_adapter_of_many_parameters_goes_through_in_small_parts() -> None:
    assert choose(nn.Linear(10, 10)).rows_at_once > 100_000
    wide = nn.Linear(2048, 2048)
    assert choose(wide).rows_at_once == SAMPLE_BYTES // (4 * (2048 * 2048 + 2048))
    assert choose(nn.Linear(8192, 4096, device="meta")).rows_at_once == 1


def peak() -> int:
    """Largest resident memory of this process since it was last reset, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.parametrize("mode", MODES)
def test_peak_memory_does_not_grow_with_the_logical_batch(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128))
    rows = 64
    gradients = rows * 4 * sum(p.numel() for p in model.parameters())  # of one part

    def losses(parts: int) -> Iterator[Tensor]:
        for _ in range(parts):
            yield model(torch.randn(rows, 16, 128)).square().sum(dim=(1, 2))

    peaks = {}
    with PrivateSgd(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        expected_batch=rows,
        noise=Stream(seeded_key(0)),
        mode=mode,
    ) as private:
        for parts in (3, 48):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            assert private.step(losses(parts)) == rows * parts
            peaks[parts] = peak()
    # Kept until the end, the gradients of the further parts alone would be 45 times one part's.
    assert peaks[48] - peaks[3] < 3 * gradients
