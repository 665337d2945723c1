"""Which updates may enter an aggregation: each is looked at by itself and refused by itself.

A client may be broken, late or hostile; none of that may reach a sum. The floors on values are far
above anything that trains and far below anything that overflows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.distributing import kinship
from aggregation.errors import RecipeError
from aggregation.sketches import Sketches, sketch_shapes
from aggregation.sketching import Sketch
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState
from aggregation.update import Update, UpdateError, UpdateReason

if TYPE_CHECKING:
    from aggregation.recipe import Recipe

MAX_WEIGHT = 1e12
MIN_WEIGHT = 1e-12  # the inverse of a denormal weight would be infinite
MAX_VALUE = 1e6


class Admission:
    """The checks of one aggregation.

    Args:
        recipe: how the updates will be used.
        state: the global state that they change.
        starts: adapters by digest that clients may have started from, besides the current one and
            what the recipe hands out of it.
    """

    def __init__(
        self, recipe: Recipe, state: GlobalState, starts: Mapping[str, Adapter] | None
    ) -> None:
        self._recipe = recipe
        self._state = state
        self._current = {state.adapter.digest: state.adapter}
        self._earlier = dict(starts or {})
        self._seen: set[tuple[str, int, str]] = set()
        self._clients: set[str] = set()
        self._sketched: int | None = None  # the round that all sketches must be of
        self._task = state.round + 1, recipe.train.assignment(state.round + 1)

    def behind(self, update: Update) -> int:
        """How many versions were closed since the update's start was handed out."""
        return max(0, self._state.round + 1 - update.round)

    def start_of(self, update: Update) -> Adapter:
        """Where the update started, if it can be used; it then counts as seen.

        Raises:
            UpdateError: if it cannot; nothing is remembered of it.
        """
        self._check_kind(update)
        self._check_weight(update)
        start = self._known_start(update)
        self._check_values(update)
        self._check_frozen(update, start)
        if update.sketches:
            self._check_sketches(update)
            self._sketched = update.round
        self._seen.add((update.client, update.round, update.start))
        self._clients.add(update.client)
        return start

    def check_answer(self, client: str, sketches: Sketches, basis: Sketches) -> None:
        """Refuse what a client sends in the second pass if it does not fit.

        Raises:
            UpdateError: saying what does not.
        """
        spec = self._state.adapter.spec
        shapes = {m.name: (m.d_in, basis[m.name].shape[1]) for m in spec.modules}
        _check_arrays(client, sketches, shapes)

    def _check_kind(self, update: Update) -> None:
        ours, theirs = self._state.adapter.spec, update.adapter.spec
        if theirs.base_digest != ours.base_digest:
            detail = f"trained on base {theirs.base_digest}, expected {ours.base_digest}"
            raise _refused(UpdateReason.WRONG_BASE, update.client, detail)
        if theirs == ours:
            return
        difference = kinship(ours, theirs) or self._rank_difference(theirs)
        if difference:
            raise _refused(UpdateReason.WRONG_SHAPE, update.client, difference)

    def _rank_difference(self, theirs: AdapterSpec) -> str:
        ours, reduce = self._state.adapter.spec, self._recipe.reduce
        if reduce.mixed_ranks and not reduce.factors:
            return ""
        for mine, other in zip(ours.modules, theirs.modules, strict=True):
            scales = ours.scale(mine.name), theirs.scale(mine.name)
            said = f"module {mine.name} has rank {other.rank} and scale {scales[1]:g}, expected"
            if reduce.mixed_ranks and other.rank > mine.rank:
                return f"{said} a rank of at most {mine.rank}, that of the global adapter"
            same = mine.rank == other.rank and scales[0] == scales[1]
            if not same and not reduce.mixed_ranks:
                return (
                    f"{said} {mine.rank} and {scales[0]:g}; recipe svd-warm-start takes mixed ranks"
                )
        return ""

    def _check_weight(self, update: Update) -> None:
        if not MIN_WEIGHT <= update.weight <= MAX_WEIGHT:  # NaN is neither
            detail = (
                f"weight={update.weight} must lie in {MIN_WEIGHT:g}..{MAX_WEIGHT:g}; only ratios "
                "count, so scale the weights of all clients alike"
            )
            raise _refused(UpdateReason.BAD_WEIGHT, update.client, detail)
        bounded = getattr(self._recipe.private, "central", False)
        once = self._recipe.reduce.robust or update.sketches or bounded
        if once and update.client in self._clients:
            detail = "has already sent an update, and a robust rule or a clipped sum counts heads"
            raise _refused(UpdateReason.DUPLICATE, update.client, detail)
        if (update.client, update.round, update.start) in self._seen:
            detail = f"has already sent its update of round {update.round}"
            raise _refused(UpdateReason.DUPLICATE, update.client, detail)

    def _known_start(self, update: Update) -> Adapter:
        if (
            getattr(self._recipe.private, "central", False)
            and self._state.round + 1 != update.round
        ):
            detail = f"was made for round {update.round}, and the sum to be noised is another one's"
            raise _refused(UpdateReason.STALE, update.client, detail)
        limit = self._recipe.weigh.max_staleness
        if limit is not None and self.behind(update) > limit:
            detail = f"is {self.behind(update)} versions behind; at most {limit} are taken"
            raise _refused(UpdateReason.STALE, update.client, detail)
        start = self._handed_out(update.start, update.adapter.spec)
        if start is not None:
            return start
        if update.start not in self._earlier:
            detail = f"started from {update.start}, which is not an adapter of this round"
            raise _refused(UpdateReason.UNKNOWN_START, update.client, detail)
        if self._recipe.reduce.factors and self._recipe.refactor.turns:
            detail = (
                f"started before refactor={self._recipe.refactor} turned the factors; their mean "
                "takes only what started from the current adapter (reduce=product-sum takes more)"
            )
            raise _refused(UpdateReason.STALE, update.client, detail)
        return self._earlier[update.start]

    def _handed_out(self, digest: str, spec: AdapterSpec) -> Adapter | None:
        """What the current state hands out to clients with this specification, if it is that."""
        if digest not in self._current and digest not in self._earlier:
            try:
                handed = self._recipe.hand_out(self._state, spec)
            except RecipeError:
                return None
            if handed.digest == digest:  # kept only if it is one: a liar must not fill the memory
                self._current[digest] = handed
        return self._current.get(digest)

    def _check_values(self, update: Update) -> None:
        if not update.adapter.within(MAX_VALUE):
            for key, value in update.adapter:
                _check_largest(update.client, key, float(np.max(np.abs(value))))

    def _check_frozen(self, update: Update, start: Adapter) -> None:
        """What a client does not send is, bit for bit, what it started from."""
        if update.round != self._task[0]:
            self._task = update.round, self._recipe.train.assignment(update.round)
        frozen = _frozen(update.adapter.spec, self._task[1], sketched=bool(update.sketches))
        for key in frozen:
            if not np.array_equal(update.adapter.tensors[key], start.tensors[key]):
                detail = (
                    f"tensor {key} is frozen in round {update.round} of train="
                    f"{self._recipe.train} and differs from its start"
                )
                raise _refused(UpdateReason.FROZEN_CHANGED, update.client, detail)

    def _check_sketches(self, update: Update) -> None:
        reduce = self._recipe.reduce
        if not isinstance(reduce, Sketch):
            detail = f"sent sketches, and reduce={reduce} takes adapters"
            raise _refused(UpdateReason.MALFORMED, update.client, detail)
        if self._sketched not in (None, update.round):
            detail = f"sent sketches of round {update.round}, expected round {self._sketched}"
            raise _refused(UpdateReason.MALFORMED, update.client, detail)
        spec = self._state.adapter.spec
        _check_arrays(update.client, update.sketches, sketch_shapes(spec, reduce.columns(spec)))


def _frozen(spec: AdapterSpec, assignment: Assignment, *, sketched: bool) -> Iterable[str]:
    """Names of the tensors that an update may not change.

    A core travels as its r x r numbers and arrives as ``left R``, in B; A stays as it is.
    """
    for module in spec.modules:
        key_a, key_b = module.keys
        if sketched or assignment.sends in ("B", "core"):
            yield key_a
        if sketched or assignment.sends == "A":
            yield key_b
    if assignment.keeps == "B":
        yield from (tensor.key for tensor in spec.others)


def _check_arrays(
    client: str,
    arrays: Mapping[str, npt.NDArray[np.float32]],
    shapes: Mapping[str, tuple[int, int]],
) -> None:
    if set(arrays) != set(shapes):
        odd = sorted(set(arrays) ^ set(shapes))
        detail = f"sketches are missing or unknown for modules {odd[:3]}"
        raise _refused(UpdateReason.MALFORMED, client, detail)
    for name, shape in shapes.items():
        if arrays[name].shape != shape or arrays[name].dtype != np.float32:
            detail = (
                f"the sketch of module {name} is {arrays[name].dtype} of shape "
                f"{arrays[name].shape}, expected float32 of shape {shape}"
            )
            raise _refused(UpdateReason.WRONG_SHAPE, client, detail)
        _check_largest(client, f"sketch of {name}", float(np.max(np.abs(arrays[name]))))


def _check_largest(client: str, what: str, largest: float) -> None:
    if not math.isfinite(largest):
        detail = f"tensor {what} has values that are NaN or infinite"
        raise _refused(UpdateReason.NOT_FINITE, client, detail)
    if largest > MAX_VALUE:
        detail = (
            f"tensor {what} has a value of size {largest:g} (> {MAX_VALUE:g}): training has "
            "diverged, or the adapter is no adapter; lower the learning rate"
        )
        raise _refused(UpdateReason.TOO_LARGE, client, detail)


def _refused(reason: UpdateReason, client: str, detail: str) -> UpdateError:
    return UpdateError(reason, f"client {client}: {detail}")
