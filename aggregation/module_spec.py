"""The parts of a specification: one adapted module, one tensor that travels whole.

    >>> ModuleSpec("query", d_in=8, d_out=4, rank=9, alpha=16.0)
    Traceback (most recent call last):
    ...
    aggregation.module_spec.SpecError: query: rank=9 is outside 1..4 ...

PEFT's names for tensors are made here and nowhere else.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from aggregation.errors import AggregationError

PREFIX = "base_model.model."
MAX_RANK = 256
MAX_DIMENSION = 1 << 20
MICRO = 1_000_000

_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")


class SpecError(AggregationError):
    """A specification contradicts itself, or a PEFT configuration is outside what we accept."""


class Orientation(StrEnum):
    """How the base layer stores its weight, relative to the product B A of shape (d_out, d_in)."""

    LINEAR = "linear"  # weight is (d_out, d_in)
    CONV1D = "conv1d"  # weight is (d_in, d_out), as in GPT-2: the product is transposed on merge
    EMBEDDING = "embedding"  # weight is (num_embeddings = d_in, d_out): transposed on merge too


@dataclass(frozen=True)
class ModuleSpec:
    """One adapted module.

    Attributes:
        name: dotted path inside the base model.
        d_in: input width; for an embedding, the number of embeddings.
        d_out: output width.
        rank: r, the number of columns of B.
        alpha: LoRA's alpha; the scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
        orientation: how the base layer stores its weight.
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    alpha: float
    orientation: Orientation = Orientation.LINEAR

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise SpecError(f"module name {self.name!r} is not a dotted path of identifiers")
        for what, value in (("d_in", self.d_in), ("d_out", self.d_out)):
            if not 1 <= value <= MAX_DIMENSION:
                raise SpecError(f"{self.name}: {what}={value} is outside 1..{MAX_DIMENSION}")
        limit = min(MAX_RANK, self.d_in, self.d_out)
        if not 1 <= self.rank <= limit:
            raise SpecError(
                f"{self.name}: rank={self.rank} is outside 1..{limit} "
                f"(the smaller of {MAX_RANK} and the dimensions {self.d_out} x {self.d_in})"
            )
        micro = self.alpha * MICRO
        if not (
            math.isfinite(micro) and 0 < self.alpha <= 4096 and abs(micro - round(micro)) < 1e-3
        ):
            raise SpecError(
                f"{self.name}: alpha={self.alpha} must be above 0, at most 4096, "
                "in whole millionths"
            )

    @cached_property
    def keys(self) -> tuple[str, str]:
        """Names of the A and the B tensor, as PEFT writes them."""
        if self.orientation is Orientation.EMBEDDING:
            return (
                f"{PREFIX}{self.name}.lora_embedding_A",
                f"{PREFIX}{self.name}.lora_embedding_B",
            )
        return f"{PREFIX}{self.name}.lora_A.weight", f"{PREFIX}{self.name}.lora_B.weight"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is trained and sent whole, such as a classification head.

    Attributes:
        name: dotted path inside the base model, for example ``classifier.weight``.
        shape: its shape.
    """

    name: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not _NAME.match(self.name) or "." not in self.name:
            raise SpecError(f"tensor name {self.name!r} is not a dotted path module.parameter")
        if (
            not self.shape
            or len(self.shape) > 4
            or any(not 1 <= n <= MAX_DIMENSION for n in self.shape)
        ):
            raise SpecError(f"{self.name}: shape {self.shape} is not 1 to 4 positive dimensions")

    @property
    def key(self) -> str:
        """Name of the tensor, as PEFT writes it."""
        return PREFIX + self.name

    @property
    def module(self) -> str:
        """The module that owns the tensor; PEFT lists it in ``modules_to_save``."""
        return self.name.rpartition(".")[0]
