"""The small pieces of a recipe that need no algebra: private.

A piece is a frozen value; a recipe holds one of each kind. A further choice is a further class
here (or in reducing, refactoring, ...), listed in :mod:`aggregation.choices`.

    >>> str(ByExamples()), str(NoPrivacy())
    ('examples', 'none')
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aggregation.errors import RecipeError
from aggregation.piece import Piece
from aggregation.weighing import ByExamples, Uniform

__all__ = ["ByExamples", "FactorNoise", "NoPrivacy", "Uniform"]


@dataclass(frozen=True)
class NoPrivacy(Piece):
    """Private: nothing at the server; clients may train with example-level privacy on their own."""

    kind = "none"
    warning = ""


@dataclass(frozen=True)
class FactorNoise(Piece):
    """Private: each client clips its A and its B and adds Gaussian noise to both before sending.

    DP-FedLoRA (2509.09097): each factor is scaled down to a Frobenius norm of at most ``clip``, and
    every entry gets noise of standard deviation ``sigma = noise_multiplier * clip``; ours does the
    same to the tensors outside the modules, without which nothing would be protected. It is here
    as a control and not as advice. What the model gets is the product of two noisy factors, and
    with N_B, N_A the noise,

        E ||(B + N_B)(A + N_A) - B A||_F^2
            = sigma^2 (d_out ||A||^2 + d_in ||B||^2) + sigma^4 r d_out d_in,

    whose last term grows with the square of the noise and with the size of the weight. The clip
    does not bound the update either: the same product comes in factors of any norms. And every
    tensor of a client adds to what is spent, so the usual noise buys next to no privacy. Noise on
    one trained factor (train=only-b with example-level privacy) has none of these problems.

    Attributes:
        noise_multiplier: standard deviation of the noise, over ``clip``.
        clip: Frobenius norm to which each client scales each factor down.

    Raises:
        RecipeError: if a number is out of its bounds.
    """

    kind = "factor-noise"
    noise_multiplier: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("noise_multiplier", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value <= 1e6):
                raise RecipeError(
                    f"factor-noise: {name}={value:g} must be above 0 and at most 1e6; choose "
                    "private=none for no noise at all"
                )

    @property
    def warning(self) -> str:
        """What whoever chooses it should know."""
        return (
            "noise on both factors multiplies: the model gets a noise of sigma^4 r d_out d_in on "
            "top of the linear one (2509.09097), the clip does not bound the product, and what is "
            "spent adds up over all tensors; it is a control: for privacy choose fedsvd or "
            "ffa-lora with [privacy]"
        )
