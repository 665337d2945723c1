"""A training that does not train is refused in its first steps, also where noise would hide it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from privacy.local import MechanismError, PrivateSgd
from privacy.movement import STEPS
from privacy.per_example import HOOKS, LINEAR, MODES
from privacy.randomness import Stream, seeded_key

ROWS = 6


class Adapted(nn.Module):
    """A frozen layer, a low-rank detour that starts at zero, a head that starts at zero.

    Args:
        through: what the detour's output goes through.
    """

    def __init__(self, through: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.head = nn.Linear(4, 2)
        for weight in (self.up.weight, self.head.weight, self.head.bias):
            nn.init.zeros_(weight)
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x) + self.through(self.up(self.down(x)))))


class Dead(torch.autograd.Function):  # type: ignore[misc]
    """The identity, and a backward pass that gives zeros, as some quantised layers do."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad)


def train(
    model: nn.Module, *, mode: str, sigma: float, batches: int, scale: float = 1.0
) -> dict[str, Tensor]:
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    draw = torch.Generator().manual_seed(1)
    with PrivateSgd(
        model,
        torch.optim.SGD(parameters.values(), lr=0.1),
        max_grad_norm=1.0,
        noise_multiplier=sigma,
        expected_batch=ROWS,
        noise=Stream(seeded_key(0)),
        mode=mode,
    ) as private:
        for _ in range(batches):
            x = torch.randn(ROWS, 3, 4, generator=draw)
            target = torch.arange(ROWS) % 2
            logits = model(x).mean(dim=1)
            loss = nn.functional.cross_entropy(logits, target, reduction="none")
            private.step([scale * loss])
            private.step([])
    return {name: p.detach() - before[name] for name, p in parameters.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_what_starts_at_zero_is_given_the_steps_that_it_needs(mode: str, sigma: float) -> None:
    moved = train(Adapted(), mode=mode, sigma=sigma, batches=STEPS + 1)
    assert all(bool(change.any()) for change in moved.values())


@pytest.mark.parametrize("mode", MODES)
def test_a_part_that_moves_by_noise_alone_is_found(mode: str) -> None:
    model = Adapted(Dead.apply)
    # Two batches are too few to tell, and the noise alone does move it.
    assert all(bool(c.any()) for c in train(model, mode=mode, sigma=1.0, batches=2).values())
    with pytest.raises(MechanismError, match=r"(?s)down\.weight had no gradient.*noise alone.*820"):
        train(Adapted(Dead.apply), mode=mode, sigma=1.0, batches=STEPS)


@pytest.mark.parametrize(("mode", "says"), [(LINEAR, "no example's loss"), (HOOKS, "initialized")])
def test_a_part_that_no_gradient_leaves_is_found_at_once(mode: str, says: str) -> None:
    with pytest.raises((MechanismError, ValueError), match=says):
        train(Adapted(Tensor.detach), mode=mode, sigma=1.0, batches=1)


@pytest.mark.parametrize("mode", MODES)
def test_examples_that_are_learnt_to_the_last_bit_are_no_failure(mode: str) -> None:
    """Nothing has a gradient any more: that says nothing of what reaches what."""
    train(Adapted(), mode=mode, sigma=1.0, batches=STEPS, scale=0.0)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_an_optimiser_that_does_not_move_what_trains_is_found_with_the_cause(sigma: float) -> None:
    model = Adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for group in optimizer.param_groups:  # as an engine that copies the parameters does
        group["step_on"] = [p.detach().clone() for p in group["params"]]

    def step(closure: object = None) -> None:
        for group in optimizer.param_groups:
            for copy, parameter in zip(group["step_on"], group["params"], strict=True):
                copy.sub_(0.1 * parameter.grad)

    optimizer.step = step  # type: ignore[method-assign]
    with (
        pytest.raises(MechanismError, match=r"did not move in the first private step.*820"),
        PrivateSgd(
            model,
            optimizer,
            max_grad_norm=1.0,
            noise_multiplier=sigma,
            expected_batch=ROWS,
            noise=Stream(seeded_key(0)),
        ) as private,
    ):
        private.step([model(torch.randn(ROWS, 4)).sum(dim=1)])
