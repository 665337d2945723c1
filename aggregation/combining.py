"""One aggregation in progress: add updates as they come, then finish.

Every update is checked on its own and refused on its own, before anything of it enters a sum: a
refused update leaves no trace but its reason in the report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.distributing import kinship
from aggregation.errors import AggregationError
from aggregation.reducing import Factors, Reduced
from aggregation.report import AggregationReport, ModuleReport
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState
from aggregation.update import Update, UpdateError, UpdateReason

if TYPE_CHECKING:
    from aggregation.recipe import Recipe

MAX_WEIGHT = 1e12
MAX_VALUE = 1e6


class Reduction:
    """The running state of one aggregation; made by ``recipe.begin``."""

    def __init__(
        self,
        recipe: Recipe,
        state: GlobalState,
        starts: Mapping[str, Adapter] | None,
        measure: bool,
    ) -> None:
        self._recipe = recipe
        self._state = state
        self._starts = {state.adapter.digest: state.adapter, **(starts or {})}
        needed = recipe.refactor.beside  # a residual is what the exact products leave over
        self._sum = recipe.reduce.accumulator(state.adapter.spec, measure=measure or needed)
        self._seen: set[tuple[str, int, str]] = set()
        self._refused: dict[str, str] = {}
        self._used, self._weight = 0, 0.0
        self._changed = False
        self._closed = False

    def add(self, update: Update) -> None:
        """Fold one update in.

        Raises:
            UpdateError: if it cannot be used; the reduction is as it was before the call.
        """
        self._open()
        try:
            start = self._check(update)
        except UpdateError as error:
            self._refused[update.client] = error.reason.value
            raise
        weight = self._recipe.weigh.weight(update)
        reduce = self._recipe.reduce
        origin = start if reduce.delta else self._state.adapter
        changed = not _unchanged(update.adapter, origin)
        if changed or reduce.counts_unchanged:
            self._sum.add(update.adapter, origin, weight)
        self._changed = self._changed or changed
        self._seen.add((update.client, update.round, update.start))
        self._used, self._weight = self._used + 1, self._weight + weight

    def finish(self) -> tuple[GlobalState, AggregationReport]:
        """Close the round.

        Returns:
            The new state and the report. Without a single usable update the state is the old one;
            if no client changed anything, only its round number moves on.

        Raises:
            AggregationError: if this reduction was finished before.
        """
        self._open()
        self._closed = True
        if not self._used:
            return self._state, self._report(self._state, {})
        if not self._changed:
            same = replace(self._state, round=self._state.round + 1)
            return same, self._report(same, {})
        change = self._recipe.optimise.step(self._sum.finish(self._weight))
        split = self._recipe.refactor.apply(self._state, change)
        adapter = _assemble(self._state.adapter, split.factors, change)
        state = GlobalState(adapter, split.residual, self._state.round + 1)
        return state, self._report(state, split.modules)

    def _open(self) -> None:
        if self._closed:
            raise AggregationError("this aggregation is finished; begin another one")

    def _report(self, state: GlobalState, modules: Mapping[str, ModuleReport]) -> AggregationReport:
        return AggregationReport(
            state.round,
            self._used,
            dict(self._refused),
            self._weight,
            modules,
        )

    def _check(self, update: Update) -> Adapter:
        """Where the update started, if it can be used."""
        ours, theirs = self._state.adapter.spec, update.adapter.spec
        who = f"client {update.client}"
        if theirs.base_digest != ours.base_digest:
            detail = f"{who} trained on base {theirs.base_digest}, expected {ours.base_digest}"
            raise UpdateError(UpdateReason.WRONG_BASE, detail)
        difference = kinship(ours, theirs) or self._mixed(theirs)
        if difference:
            raise UpdateError(UpdateReason.WRONG_SHAPE, f"{who}: {difference}")
        if not (math.isfinite(update.weight) and 0 < update.weight <= MAX_WEIGHT):
            detail = f"{who}: weight={update.weight} must be above 0 and at most {MAX_WEIGHT:g}"
            raise UpdateError(UpdateReason.BAD_WEIGHT, detail)
        if (update.client, update.round, update.start) in self._seen:
            detail = f"{who} has already sent its update of round {update.round}"
            raise UpdateError(UpdateReason.DUPLICATE, detail)
        start = self._start(update.start, theirs)
        if start is None:
            detail = f"{who} started from {update.start}, which is not an adapter of this round"
            raise UpdateError(UpdateReason.UNKNOWN_START, detail)
        for key, value in update.adapter:
            largest = float(np.max(np.abs(value)))
            if not math.isfinite(largest):
                detail = f"{who}: tensor {key} has values that are NaN or infinite"
                raise UpdateError(UpdateReason.NOT_FINITE, detail)
            if largest > MAX_VALUE:
                detail = f"{who}: tensor {key} has a value of size {largest:g} (> {MAX_VALUE:g})"
                raise UpdateError(UpdateReason.TOO_LARGE, detail)
        return start

    def _mixed(self, theirs: AdapterSpec) -> str:
        ours = self._state.adapter.spec
        if self._recipe.reduce.mixed_ranks or theirs == ours:
            return ""
        for mine, other in zip(ours.modules, theirs.modules, strict=True):
            if (mine.rank, ours.scale(mine.name)) != (other.rank, theirs.scale(mine.name)):
                return (
                    f"module {mine.name} has rank {other.rank} and alpha {other.alpha}, expected "
                    f"{mine.rank} and {mine.alpha}; recipe svd-warm-start takes mixed ranks"
                )
        return ""

    def _start(self, digest: str, spec: AdapterSpec) -> Adapter | None:
        """A known start, or what this round hands out to clients with this specification."""
        if digest not in self._starts and spec != self._state.adapter.spec:
            handed = self._recipe.hand_out(self._state, spec)
            if handed.digest == digest:  # kept only if it is one: a liar must not fill the memory
                self._starts[digest] = handed
        return self._starts.get(digest)


def _unchanged(adapter: Adapter, start: Adapter) -> bool:
    """Whether a client sends back exactly what it started from: its change is exactly zero."""
    return adapter.spec == start.spec and all(
        np.array_equal(value, start.tensors[key]) for key, value in adapter
    )


def _assemble(old: Adapter, factors: Mapping[str, Factors], change: Reduced) -> Adapter:
    tensors: dict[str, npt.NDArray[np.floating]] = {}
    for module in old.spec.modules:
        key_a, key_b = module.keys
        tensors[key_b], tensors[key_a] = factors[module.name]
    for key, move in change.others.items():
        tensors[key] = old.tensors[key] + move
    return Adapter(old.spec, tensors)
