"""PEFT folders that are to be combined: read, and checked against each other.

Which base a folder belongs to is its ``airpeft.json``; a folder that other software wrote has
none, and its configuration's ``base_model_name_or_path`` is compared instead.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aggregation import peft_layout
from aggregation.adapter import Adapter
from aggregation.admission import MAX_WEIGHT, MIN_WEIGHT
from aggregation.distributing import kinship
from aggregation.errors import AggregationError
from aggregation.spec import AdapterSpec


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
        if weight and not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise OfflineError(
                f"{folder}: weight={weight:g} must be 0 or lie in {MIN_WEIGHT:g}..{MAX_WEIGHT:g}; "
                "only ratios count, so scale all of them alike"
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
