"""Adapters that were trained elsewhere, combined off line: PEFT folders in, PEFT folders out.

There is no round here and no common start: every adapter counts with its whole update, as if it
had started from zero. What a recipe keeps beside the trainable adapter is not lost but becomes
further adapters, so that all of them together apply the exact weighted mean::

    DIR                the trainable adapter
    DIR/residual       the rest; load both and make both active
    DIR/residual-2 ... only where a module's rest has a rank above 256, which no PEFT folder takes

Which base a folder belongs to is its ``airpeft.json``; a folder that other software wrote has
none, and its configuration's ``base_model_name_or_path`` is compared instead. If no folder has
one and no digest is given, the result is written without ``airpeft.json``, too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from aggregation import peft_layout
from aggregation.adapter import Adapter
from aggregation.distributing import kinship
from aggregation.errors import AggregationError
from aggregation.low_rank import LowRank
from aggregation.recipe import Recipe
from aggregation.refactoring import Svd
from aggregation.report import AggregationReport
from aggregation.spec import MAX_RANK, AdapterSpec, ModuleSpec
from aggregation.state import GlobalState
from aggregation.update import Update

# Residual directions below this share of a module's update are rounding: adapters are float32.
_ROUNDING = 1e-9
_ALL = 1 << 20


class OfflineError(AggregationError):
    """Folders that cannot be combined; the message names the folder, and the tensor if any."""


@dataclass(frozen=True, eq=False)
class Member:
    """One adapter to combine.

    Attributes:
        name: its folder, for messages.
        adapter: what it holds.
        weight: in the mean, before normalising; 0 leaves it out.
    """

    name: str
    adapter: Adapter
    weight: float


@dataclass(frozen=True, eq=False)
class Members:
    """The adapters to combine, checked against each other.

    Attributes:
        members: at least one, of the same base, modules and tensors.
        base_name: public name of the base model; empty if nobody says.
        base_known: whether the digest of the base is real, and not a stand-in for its name.
    """

    members: tuple[Member, ...]
    base_name: str
    base_known: bool


@dataclass(frozen=True, eq=False)
class Combined:
    """The result.

    Attributes:
        adapter: the trainable part.
        residual: adapters to load beside it, none if nothing is left.
        report: rank, energy and error per module.
    """

    adapter: Adapter
    residual: tuple[Adapter, ...]
    report: AggregationReport


def read_members(
    folders: Sequence[Path], weights: Sequence[float] | None, base_digest: str | None = None
) -> Members:
    """Read PEFT folders and check that they belong together.

    Args:
        folders: of adapters on the same base, with the same modules; ranks and alphas may differ.
        weights: one for each folder; all the same if None.
        base_digest: of the base model, for folders without ``airpeft.json``.

    Raises:
        OfflineError: if they do not belong together, or the weights are not usable.
        LayoutError: if a folder is not a readable adapter.
    """
    weights = _checked_weights(folders, weights)
    bases = {folder: peft_layout.base_of(folder) for folder in folders}
    digest = base_digest or next((found for _, found in bases.values() if found), None)
    if base_digest is None:
        _same_base_name(bases)
    name = next((found for found, _ in bases.values() if found), "")
    stand_in = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    adapters = [peft_layout.read(folder, base_digest=digest or stand_in) for folder in folders]
    for folder, adapter in zip(folders[1:], adapters[1:], strict=True):
        _check_same(folders[0], adapters[0].spec, folder, adapter.spec)
    members = tuple(
        Member(str(folder), adapter, weight)
        for folder, adapter, weight in zip(folders, adapters, weights, strict=True)
    )
    if peft_layout.looks_like_path(name):
        name = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return Members(members, name, digest is not None)


def combine(chosen: Recipe, members: Members) -> Combined:
    """The members' weighted mean, by a recipe.

    The trainable adapter has the largest rank that a member has, per module; with a recipe that
    chooses the rank by energy, that rank.

    Raises:
        UpdateError: if the recipe cannot take a member: another rank under a plain mean, for one.
    """
    spec = _widest([m.adapter.spec for m in members.members])
    by_energy = isinstance(chosen.refactor, Svd) and chosen.refactor.energy is not None
    if isinstance(chosen.refactor, Svd) and chosen.refactor.residual_rank:
        chosen = replace(chosen, refactor=replace(chosen.refactor, residual_rank=_ALL))
    if by_energy:
        spec = spec.with_ranks({m.name: min(MAX_RANK, m.d_in, m.d_out) for m in spec.modules})
    zeros = {m.adapter.spec.digest: Adapter.zeros(m.adapter.spec) for m in members.members}
    reduction = chosen.begin(
        GlobalState(Adapter.zeros(spec)), starts={zero.digest: zero for zero in zeros.values()}
    )
    for member in members.members:
        if member.weight:
            start = zeros[member.adapter.spec.digest].digest
            reduction.add(Update(member.name, 1, start, member.adapter, member.weight))
    state, report = reduction.finish()
    adapter = _trimmed(state.adapter, report) if by_energy else state.adapter
    return Combined(adapter, _residuals(state, report), report)


def write(
    out: Path,
    combined: Combined,
    members: Members,
    *,
    base_name: str | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> None:
    """Write the result and its residual, all at once; nothing is there before all of it is.

    Args:
        out: where; nothing may be there yet.
        combined: what.
        members: what it was made of.
        base_name: public name of the base in the configuration, instead of the members' own.
        extra: further files by name.

    Raises:
        OfflineError: if there is something at ``out`` already.
        LayoutError: if ``base_name`` is a path.
        StorageError: if it cannot be written.
    """
    check_new(out)
    name = members.base_name if base_name is None else base_name
    files = dict(extra or {})
    for index, adapter in enumerate(combined.residual):
        folder = f"residual-{index + 1}" if index else "residual"
        parts = peft_layout.contents(adapter, name, with_spec=members.base_known)
        files |= {f"{folder}/{file}": data for file, data in parts.items()}
    peft_layout.write(
        out, combined.adapter, base_name=name, extra=files, with_spec=members.base_known
    )


def check_new(out: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        OfflineError: if something is.
    """
    if out.exists():
        raise OfflineError(f"{out} is already there; remove it or choose another --out")


def _trimmed(adapter: Adapter, report: AggregationReport) -> Adapter:
    """The adapter without the directions that hold nothing, at least one in each module."""
    ranks = {name: max(1, said.rank) for name, said in report.modules.items()}
    spec = adapter.spec.with_ranks(ranks)
    tensors = dict(adapter.tensors)
    for module in spec.modules:
        left, right = adapter.factors(module.name)
        key_a, key_b = module.keys
        ratio = adapter.spec.scale(module.name) / spec.scale(module.name)
        tensors[key_b] = left[:, : module.rank] * np.float32(ratio)
        tensors[key_a] = right[: module.rank]
    return Adapter(spec, tensors)


def _residuals(state: GlobalState, report: AggregationReport) -> tuple[Adapter, ...]:
    """What is kept beside, as adapters of scale 1 and of no rank above what a folder takes."""
    rest: dict[str, LowRank] = {}
    for name, matrix in state.residual.items():
        said = report.modules.get(name)
        left, values, right = matrix.svd()
        keep = int((values > _ROUNDING * said.norm).sum()) if said else 0
        if keep:
            root = values[:keep] ** 0.5
            rest[name] = LowRank(left[:, :keep] * root, root[:, None] * right[:keep])
    adapters = []
    spec = state.adapter.spec
    for first in range(0, max((m.rank for m in rest.values()), default=0), MAX_RANK):
        modules: list[ModuleSpec] = []
        tensors = {}
        for name, matrix in rest.items():
            left, right = matrix.B[:, first : first + MAX_RANK], matrix.A[first : first + MAX_RANK]
            if len(right):
                module = replace(spec.module(name), rank=len(right), alpha=float(len(right)))
                modules.append(module)
                key_a, key_b = module.keys
                tensors[key_a], tensors[key_b] = right, left
        # No task and no head: those are the trainable adapter's.
        adapters.append(Adapter(AdapterSpec(spec.base_digest, tuple(modules)), tensors))
    return tuple(adapters)


def _checked_weights(folders: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if not folders:
        raise OfflineError("no folders given; name at least one PEFT adapter folder")
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise OfflineError(f"{folder} is given twice; give it once, with a larger weight")
    if weights is None:
        return [1.0] * len(folders)
    if len(weights) != len(folders):
        raise OfflineError(
            f"{len(weights)} weights for {len(folders)} folders; give one for each, as in "
            f"--weights {','.join('1' for _ in folders)}"
        )
    for folder, weight in zip(folders, weights, strict=True):
        if not (math.isfinite(weight) and weight >= 0):
            raise OfflineError(
                f"{folder}: weight={weight:g} must be finite and 0 or more; 0 leaves the folder out"
            )
    if not sum(weights) > 0:
        raise OfflineError(
            f"the weights of {len(folders)} folders sum to 0; give at least one above 0"
        )
    return [float(weight) for weight in weights]


def _same_base_name(bases: Mapping[Path, tuple[str, str | None]]) -> None:
    """Folders without a digest of their base must at least call it what the others call it."""
    told = {name: folder for folder, (name, digest) in bases.items() if name and digest}
    for folder, (name, digest) in bases.items():
        told = told or ({name: folder} if name else {})
        if name and not digest and name not in told:
            expected, first = next(iter(told.items()))
            raise OfflineError(
                f"{folder}: its base model is {name!r}, but that of {first} is {expected!r}; "
                "adapters of different bases cannot be combined (if they are the same base under "
                "two names, give --base-digest)"
            )


def _check_same(first: Path, ours: AdapterSpec, folder: Path, theirs: AdapterSpec) -> None:
    mine, other = set(ours.shapes()), set(theirs.shapes())
    if mine - other:
        raise OfflineError(f"{folder}: tensor {min(mine - other)} is missing, which {first} has")
    if other - mine:
        raise OfflineError(f"{folder}: tensor {min(other - mine)} is extra; {first} has none")
    difference = kinship(ours, theirs)
    if difference:
        raise OfflineError(f"{folder}: {difference} (as in {first})")
    if ours.labels != theirs.labels:
        raise OfflineError(
            f"{folder}: its labels are {list(theirs.labels)}, expected {list(ours.labels)} "
            f"(as in {first})"
        )


def _widest(specs: Sequence[AdapterSpec]) -> AdapterSpec:
    """The first specification, each module at the largest rank that any has, with its alpha."""
    modules = [
        max((spec.module(m.name) for spec in specs), key=lambda module: module.rank)
        for m in specs[0].modules
    ]
    return replace(specs[0], modules=tuple(modules))
