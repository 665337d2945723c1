"""What the client behind each folder would have sent: the part of a recipe before the server.

Off line nobody trains, so there is no round and no common start: an adapter counts with its whole
update, as if training had begun at zero. Where a recipe freezes a factor, all folders must share
it, and it is what they began with. What happens after training happens here as well, so that
the result is what a server would make of these adapters: alignment, the choice of rank
indices by importance, and the codec.

    >>> from aggregation.recipes import recipe
    >>> refusal(recipe("fedsa-lora"))[:62]
    'recipe fedsa-lora makes one model for each client, of which th'
    >>> refusal(recipe("fedit"))
    ''
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from aggregation.adapter import Adapter
from aggregation.aligning import align
from aggregation.assignment import Assignment
from aggregation.codec import CodecError
from aggregation.core_basis import settle
from aggregation.offline_folders import OfflineError
from aggregation.parcel import pack, sent_keys, turn_of
from aggregation.rank_selection import importance, keep_only, select
from aggregation.recipe import Recipe

REFERENCE = 0  # the folder that stands for what a round would have handed out


@dataclass(frozen=True, eq=False)
class Sent:
    """What one client would have sent.

    Attributes:
        name: its folder.
        start: what its training is taken to have begun at.
        adapter: as it arrives at the server.
        weight: in the mean, before normalising.
        nbytes: bytes that travelled.
    """

    name: str
    start: Adapter
    adapter: Adapter
    weight: float
    nbytes: int


def refusal(chosen: Recipe) -> str:
    """Why a recipe makes no sense without clients, with the nearest that does; empty if it does."""
    if chosen.train.personal:
        return (
            f"recipe {chosen.name} makes one model for each client, of which the folders are the "
            "parts; there is no common one to write; choose fedit or svd-warm-start for a model "
            "that all share"
        )
    if chosen.private.kind != "none":
        return (
            f"recipe {chosen.name} protects what clients send (private={chosen.private}) before "
            "it leaves them, and folders hold it unprotected: the result would promise what is not "
            "so; choose flora or svd-warm-start"
        )
    if chosen.optimise.element_wise:
        return (
            f"optimise={chosen.optimise} learns its step sizes over rounds, and off line there is "
            "one step, of a size that has nothing to do with the adapters'; choose fedit"
        )
    return ""


def sent(chosen: Recipe, members: Sequence[tuple[str, Adapter, float]]) -> tuple[list[Sent], int]:
    """What the clients behind these folders would have sent.

    Args:
        chosen: the recipe.
        members: name of the folder, adapter and weight of each.

    Returns:
        One for each member, and the number of the round that it is: recipes that freeze A in one
        round and B in the next get the one that the folders fit.

    Raises:
        OfflineError: naming folder and tensor, if a factor that the recipe freezes is not the same
            in all folders, or a value cannot travel.
    """
    number, asked = _round(chosen, members)
    frozen = _frozen(members[REFERENCE][1], asked)
    _check_shared(chosen, members, frozen)
    out: list[Sent] = []
    starts: dict[str, Adapter] = {}
    for name, adapter, weight in members:
        if asked.trains == "core":
            adapter = _in_basis(name, adapter, asked.seed)
        # What is frozen is the same in all folders, so those of one specification share a start.
        if adapter.spec.digest not in starts:
            starts[adapter.spec.digest] = _start(adapter, frozen)
        start = starts[adapter.spec.digest]
        if asked.align:
            reference = members[REFERENCE][1]
            if reference.spec != adapter.spec:
                raise OfflineError(
                    f"{name}: its ranks are not those of {members[REFERENCE][0]}, towards which "
                    f"recipe {chosen.name} turns all others; choose svd-warm-start for mixed ranks"
                )
            adapter = align(adapter, reference, asked.align_to, asked.align)
        if asked.select == "importance":
            masks = select(importance(adapter, start), asked.share)
            adapter = keep_only(adapter, start, masks)
        keys = sent_keys(adapter.spec, replace(asked, sketch=0))
        try:
            turn = turn_of(name, number)
            parcel, arrived, _ = pack(chosen.codec, adapter, start, keys, turn=turn)
        except CodecError as error:
            raise OfflineError(f"{name}: codec={chosen.codec}: {error}") from None
        if arrived.same_values(adapter):
            arrived = adapter  # there once, not twice
        out.append(Sent(name, start, arrived, weight, parcel.nbytes))
    return out, number


def _round(chosen: Recipe, members: Sequence[tuple[str, Adapter, float]]) -> tuple[int, Assignment]:
    """The round whose assignment the folders fit: the first, unless only the second does."""
    spec = members[REFERENCE][1].spec
    found = [(number, chosen.assignment(number, spec)) for number in (1, 2)]
    for number, asked in found:
        frozen = _frozen(members[REFERENCE][1], asked)
        if _first_difference(members, frozen) is None:
            return number, asked
    return found[0]


def _frozen(adapter: Adapter, asked: Assignment) -> tuple[str, ...]:
    """Names of the tensors that do not train."""
    if asked.trains == "both":
        return ()
    pairs = [module.keys for module in adapter.spec.modules]
    return tuple(b if asked.trains == "A" else a for a, b in pairs)


def _first_difference(
    members: Sequence[tuple[str, Adapter, float]], keys: Sequence[str]
) -> tuple[str, str] | None:
    """The first folder and tensor in which a folder differs from the first one."""
    _, first, _ = members[REFERENCE]
    for name, adapter, _ in members:
        for key in keys:
            mine, other = first.tensors[key], adapter.tensors[key]
            if mine.shape != other.shape or not np.array_equal(mine, other):
                return name, key
    return None


def _check_shared(
    chosen: Recipe, members: Sequence[tuple[str, Adapter, float]], keys: Sequence[str]
) -> None:
    found = _first_difference(members, keys)
    if found is not None:
        name, key = found
        raise OfflineError(
            f"{name}: tensor {key} differs from that of {members[REFERENCE][0]}, and recipe "
            f"{chosen.name} (train={chosen.train}) needs it to be the same everywhere; choose "
            "svd-warm-start, which combines any adapters exactly"
        )


def _start(adapter: Adapter, frozen: Sequence[str]) -> Adapter:
    """Zero, but for what does not train."""
    tensors = dict(Adapter.zeros(adapter.spec).tensors)
    return Adapter(adapter.spec, tensors | {key: adapter.tensors[key] for key in frozen})


def _in_basis(name: str, adapter: Adapter, seed: int) -> Adapter:
    """The adapter in the public basis of a recipe that trains cores, if it lies in it."""
    settled = settle(adapter, seed)
    for module in adapter.spec.modules:
        for key in module.keys:
            if not np.allclose(settled.tensors[key], adapter.tensors[key], rtol=1e-4, atol=1e-6):
                raise OfflineError(
                    f"{name}: tensor {key} is not of the public basis of seed {seed} in which "
                    "train=core trains; give the folders of such a run, or choose svd-warm-start"
                )
    return settled
