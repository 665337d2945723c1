"""What one client sends back from a round, and the closed list of reasons to refuse it.

An update carries the trained factors, not their difference: the server knows the adapter that the
client started from by its digest, and forms ``s (B A - B0 A0)`` in product space, which is right
whatever happened to the global adapter's factors in the meantime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.errors import AggregationError

if TYPE_CHECKING:
    from aggregation.parcel import Parcel


class UpdateReason(StrEnum):
    """Why one client's update is not used. The round goes on without it."""

    NOT_FINITE = "not-finite"
    TOO_LARGE = "too-large"
    WRONG_SHAPE = "wrong-shape"
    WRONG_BASE = "wrong-base"
    UNKNOWN_START = "unknown-start"
    BAD_WEIGHT = "bad-weight"
    DUPLICATE = "duplicate"
    MALFORMED = "malformed"
    FROZEN_CHANGED = "frozen-changed"
    STALE = "stale"


class UpdateError(AggregationError):
    """One client's update is refused; ``reason`` says why, and the round goes on."""

    def __init__(self, reason: UpdateReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class Update:
    """One client's result of one round.

    Attributes:
        client: the client's stable name; never used as a seed.
        round: number of the round, from 1.
        start: digest of the adapter that training started from.
        adapter: the trained adapter, at the client's own ranks.
        weight: weight in the mean, usually the number of examples; positive.
        privacy_event: the record that floor 2 wrote about this training, carried unread; empty
            if the client trained without differential privacy.
        metrics: what the client measured, by name.
        parcel: what travels of the adapter, see :mod:`aggregation.parcel`; None for all of it.
        sketches: by module, float32 of shape (d_out, width): what the client sends in place of its
            factors, see :mod:`aggregation.sketching`; empty if it sends factors. The factors of
            ``adapter`` are then those of its start.
    """

    client: str
    round: int
    start: str
    adapter: Adapter
    weight: float
    privacy_event: Mapping[str, int | float | str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    parcel: Parcel | None = None
    # Arrays have no single truth value, so they stay out of ==.
    sketches: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict, compare=False)
