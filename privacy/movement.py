"""Whether a private training trains: each parameter must move, and not by noise alone.

Noise hides the failure that matters: a tensor that no gradient reaches still wanders, so a training
that learns nothing looks like one that is private. Two things are watched in the first steps: that
what the optimiser holds is what the model uses (it moved), and that every parameter has had a part
in the clipped sum before the noise.

    >>> from torch import nn
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> movement = Movement({"layer.weight": layer.weight}, {}, noisy=True, clip=1.0)
    >>> movement.begin()
    >>> movement.check(examples=3)
    Traceback (most recent call last):
    privacy.per_example.MechanismError: layer.weight did not move in the first private step: ...
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from privacy.per_example import MechanismError

# A head that starts at zero lets a gradient through from the second step on, and a zero B from the
# third: after so many batches that were not empty, everything that trains has had one.
STEPS = 3
# Where the others' sum is below this share of the clip, a zero beside it may be an underflow.
LEAST = 1e-3


class Movement:
    """Watches the first steps of one training.

    Args:
        parameters: all that trains, by name.
        masks: by parameter name, 1 where an entry trains; one that is zero everywhere is not
            watched.
        noisy: whether noise is added.
        clip: of an example's gradient.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        *,
        noisy: bool,
        clip: float,
    ) -> None:
        idle = {name for name, mask in masks.items() if not mask.any()}
        self._parameters = {name: p for name, p in parameters.items() if name not in idle}
        self._noisy, self._clip = noisy, clip
        self._before: dict[str, Tensor] | None = None
        self._moved = False
        self._batches = 0
        self._reached: dict[str, float] = {}

    def begin(self) -> None:
        """Before a step: remember where the parameters are."""
        if not self._moved and self._before is None:
            self._before = {name: p.detach().clone() for name, p in self._parameters.items()}

    def see(self, examples: int) -> None:
        """Before the noise: look at each parameter's ``summed_grad``.

        Args:
            examples: how many are in the batch; an empty one tells nothing.
        """
        if not examples or self._batches >= STEPS:
            return
        self._batches += 1
        for name, parameter in self._parameters.items():
            total = getattr(parameter, "summed_grad", None)
            size = 0.0 if total is None else float(total.norm())
            self._reached[name] = max(size, self._reached.get(name, 0.0))

    def check(self, examples: int) -> None:
        """After a step.

        Args:
            examples: how many were in the batch.

        Raises:
            MechanismError: if a parameter did not move in the first step, or moved by noise alone
                until enough batches were seen; names the parameter and the usual causes.
        """
        if self._before is not None and (examples or self._noisy):
            self._check_moved(self._before)
            self._before, self._moved = None, True
        if self._batches == STEPS:
            self._batches += 1  # looked at once
            self._check_reached()

    def _check_moved(self, before: Mapping[str, Tensor]) -> None:
        still = [n for n, p in self._parameters.items() if torch.equal(p.detach(), before[n])]
        # Without noise A has a gradient of exactly zero while B is zero, so one mover is enough.
        if still and (self._noisy or len(still) == len(self._parameters)):
            raise MechanismError(
                f"{still[0]} did not move in the first private step: its gradient does not reach "
                "the optimiser. The usual cause is a model that was wrapped, or moved to a "
                "device, after the adapter was attached, or an optimiser that is older than the "
                "adapter (opacus issue 820): load, move, attach, then build the optimiser"
            )

    def _check_reached(self) -> None:
        silent = [name for name, size in self._reached.items() if size == 0.0]
        if silent and max(self._reached.values()) > LEAST * self._clip:
            raise MechanismError(
                f"{silent[0]} had no gradient in the first {STEPS} batches, while others had: it "
                "would move by noise alone. The usual causes are a model that was wrapped, or "
                "moved to a device, after the adapter was attached (opacus issue 820), and layers "
                "of a quantised base that let no gradient through: attach the adapter last, to a "
                "base that does"
            )
