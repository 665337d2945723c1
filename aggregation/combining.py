"""One aggregation in progress: add updates as they come, then finish.

Every update is checked on its own and refused on its own, before anything of it enters a sum: a
refused update leaves no trace but its reason in the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.admission import MAX_VALUE, MAX_WEIGHT, Admission
from aggregation.client_dp import CentralPiece
from aggregation.clipped_sum import Noise
from aggregation.core_basis import settle
from aggregation.errors import AggregationError, RecipeError
from aggregation.reducing import Accumulator, Factors, Reduced
from aggregation.report import AggregationReport, ModuleReport
from aggregation.robust import Trusting
from aggregation.server_optimizer import is_nothing, nothing
from aggregation.sketches import Sketches
from aggregation.sketching import SketchSum
from aggregation.state import GlobalState
from aggregation.update import Update, UpdateError

if TYPE_CHECKING:
    from aggregation.recipe import Recipe

__all__ = ["MAX_VALUE", "MAX_WEIGHT", "Reduction"]
UNANSWERED = "late"


class Reduction:
    """The running state of one aggregation; made by ``recipe.begin``."""

    def __init__(
        self,
        recipe: Recipe,
        state: GlobalState,
        starts: Mapping[str, Adapter] | None,
        measure: bool,
        trusted: str = "",
        noise: Noise | None = None,
    ) -> None:
        _check_trusted(recipe, trusted)
        self._recipe = recipe
        self._state = state
        self._admission = Admission(recipe, state, starts)
        needed = recipe.refactor.needs_products
        # Sums of each client's products would be seen in the clear and without any noise.
        hidden = any(getattr(recipe.private, name, False) for name in ("secure", "central"))
        measured = needed or (measure and not hidden)
        self._central = isinstance(recipe.private, CentralPiece)
        self._sum: Accumulator = (
            recipe.private.open(state, recipe.train.assignment(state.round + 1), noise)
            if self._central
            else recipe.reduce.accumulator(state.adapter.spec, measure=measured)
        )
        self._refused: dict[str, str] = {}
        self._used, self._weight = 0, 0.0
        self._trusted, self._has_trusted = trusted, False
        self._shares: dict[str, float] = {}  # weight times discount, by client
        self._basis: Sketches = {}
        self._order: list[str] = []  # the clients whose updates entered the sum
        self._changed = False
        self._closed = False

    def add(self, update: Update) -> None:
        """Fold one update in.

        Raises:
            UpdateError: if it cannot be used; the reduction is as it was before the call.
        """
        self._open()
        try:
            start = self._admission.start_of(update)
        except UpdateError as error:
            self._refused[update.client] = error.reason.value
            raise
        weight = self._recipe.weigh.weight(update)
        share = weight * self._recipe.weigh.discount(self._admission.behind(update))
        changed = self._fold(update, start, share)
        self._changed = self._changed or changed
        self._used, self._weight = self._used + 1, self._weight + weight
        self._shares[update.client] = self._shares.get(update.client, 0.0) + share

    def _fold(self, update: Update, start: Adapter, share: float) -> bool:
        """Add an update to the sum; whether it changes anything."""
        reduce = self._recipe.reduce
        if update.sketches:
            self._sketch_sum().add_first(
                update.client, update.round, update.sketches, update.adapter, start, share
            )
            moved = any(sketch.any() for sketch in update.sketches.values())
            return moved or not update.adapter.same_values(start)
        origin = start if reduce.delta else self._state.adapter
        changed = not update.adapter.same_values(origin)
        if self._trusted and update.client == self._trusted:
            cast(Trusting, self._sum).trust(update.adapter, origin)
            self._has_trusted = True
        elif changed or reduce.counts_unchanged or self._central:
            self._sum.add(update.adapter, origin, share)
            self._order.append(update.client)
        return changed

    def question(self) -> Sketches:
        """What the clients that have sent sketches have to answer before :meth:`finish`.

        Returns:
            By module, the basis of the second pass, see :mod:`aggregation.sketching`; empty if
            there is no second pass.
        """
        self._open()
        if not isinstance(self._sum, SketchSum):
            return {}
        self._basis = self._sum.basis()
        return self._basis

    def waiting(self) -> tuple[str, ...]:
        """The clients that have not answered :meth:`question`, in the order of their updates."""
        return tuple(self._sum.unanswered()) if isinstance(self._sum, SketchSum) else ()

    def answer(self, client: str, sketches: Sketches) -> None:
        """What a client answers to :meth:`question`; without one its update does not count.

        Raises:
            UpdateError: if the answer cannot be used.
            AggregationError: if this client was not asked, or has answered before.
        """
        self._open()
        if not self._basis or client not in self.waiting():
            raise AggregationError(f"client {client} has nothing to answer")
        try:
            self._admission.check_answer(client, sketches, self._basis)
        except UpdateError as error:
            self._refused[client] = error.reason.value
            raise
        self._sketch_sum().add_second(client, sketches)

    def _sketch_sum(self) -> SketchSum:
        return cast(SketchSum, self._sum)

    def _leave_out_unanswered(self) -> None:
        """Who sent a first sketch and no second one is not in the result."""
        if not isinstance(self._sum, SketchSum):
            return
        for client, weight in self._sum.drop_unanswered().items():
            self._refused.setdefault(client, UNANSWERED)
            self._used, self._weight = self._used - 1, self._weight - weight
            del self._shares[client]

    @property
    def in_any_case(self) -> bool:
        """Whether this has to be finished even if nobody came: that nobody did is not to be told.

        It is so with noise at the server, which is then all that is released.
        """
        return self._central

    def lacks(self) -> str:
        """Why what has come so far is too little to finish, with the remedy; empty if it is enough.

        Too few updates for a robust rule, or none from the client that it trusts.
        """
        if self._trusted and not self._has_trusted:
            return (
                f"the trusted client {self._trusted} has sent no usable update, and reduce="
                f"{self._recipe.reduce} measures all others against it; see that it takes part in "
                "every round"
            )
        return str(self._recipe.reduce.needs(self._used))

    def keep(self) -> tuple[GlobalState, AggregationReport]:
        """Close the round without a step, because of what it :meth:`lacks`.

        Returns:
            The old state, and a report that says who was refused and why nothing changed.

        Raises:
            AggregationError: if this reduction was finished before.
        """
        self._open()
        self._closed = True
        return self._state, replace(self._report(self._state, {}), unchanged=self.lacks())

    def finish(self) -> tuple[GlobalState, AggregationReport]:
        """Close the round.

        Returns:
            The new state and the report. Without a single usable update the state is the old one,
            unless the sum is noised; if no client changed anything, only its round number and what
            the server optimiser still has in motion move on.

        Raises:
            RecipeError: if the recipe cannot make anything sound of what has come, see
                :meth:`lacks`; the reduction stays open.
            AggregationError: if this reduction was finished before.
        """
        self._open()
        self._leave_out_unanswered()
        reason = self.lacks() if self._used else ""
        if reason:
            raise RecipeError(f"{self._recipe.name}: {reason}")
        self._closed = True
        if not self._used and not self._central:
            return self._state, self._report(self._state, {})
        recipe, old, number = self._recipe, self._state, self._state.round + 1
        learnt = self._central or bool(self._changed and self._weight)
        if not learnt and not recipe.optimise.stateful:
            same = replace(old, round=number)
            return same, self._report(same, {})
        reduced = self._sum.finish(self._weight) if learnt else nothing(old, recipe.reduce.factors)
        task = recipe.train.assignment(number)
        change, buffers = recipe.optimise.step(old, reduced, task.sends)
        buffers = {**buffers, **reduced.buffers}
        influence = self._influence(reduced) if learnt else {}
        if is_nothing(change):
            same = replace(old, round=number, buffers=buffers)
            silent = influence and not any(influence.values())
            why = recipe.reduce.silence if silent else ""
            return same, replace(self._report(same, {}), influence=influence, unchanged=why)
        split = recipe.refactor.apply(old, change)
        adapter = _assemble(old.adapter, split.factors, change)
        if task.trains == "core":
            adapter = settle(adapter, task.seed)
        buffers = recipe.optimise.transport(adapter.spec, buffers, split.transport)
        state = GlobalState(adapter, split.residual, number, buffers)
        report = self._report(state, _with_lost(split.modules, reduced.lost))
        measured = bool(split.modules) or not state.adapter.spec.modules
        return state, replace(report, influence=influence, measured=measured)

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

    def _influence(self, reduced: Reduced) -> dict[str, float]:
        """What each client's share in the result is."""
        if not reduced.shares:
            return {client: share / self._weight for client, share in self._shares.items()}
        shares = dict.fromkeys(self._shares, 0.0)
        for client, share in zip(self._order, reduced.shares, strict=True):
            shares[client] += share
        return shares


def _with_lost(
    modules: Mapping[str, ModuleReport], lost: Mapping[str, float]
) -> dict[str, ModuleReport]:
    """The measurements against the exact mean, where the reduce knows only a part of it.

    Distances add up at most, so what is said is never too good.
    """
    return {
        name: replace(
            module,
            distance=module.distance + lost.get(name, 0.0),
            dropped=module.dropped + lost.get(name, 0.0),
        )
        for name, module in modules.items()
    }


def _check_trusted(recipe: Recipe, trusted: str) -> None:
    if recipe.reduce.trusts and not trusted:
        raise RecipeError(
            f"{recipe.name}: reduce={recipe.reduce} measures updates against that of a client that "
            "the server trusts, with data known to be clean; name that client with trusted=... "
            "(off line --trusted FOLDER)"
        )
    if trusted and not recipe.reduce.trusts:
        raise RecipeError(
            f"{recipe.name}: trusted={trusted!r} means nothing to reduce={recipe.reduce}; leave it "
            "out, or choose reduce=fltrust"
        )


def _assemble(old: Adapter, factors: Mapping[str, Factors], change: Reduced) -> Adapter:
    tensors: dict[str, npt.NDArray[np.floating]] = {}
    for module in old.spec.modules:
        key_a, key_b = module.keys
        tensors[key_b], tensors[key_a] = factors[module.name]
    for key, move in change.others.items():
        tensors[key] = old.tensors[key] + move
    return Adapter(old.spec, tensors)
