"""Adapters that were trained elsewhere, combined off line: PEFT folders in, PEFT folders out.

There is no round here and no common start: every adapter counts with its whole update, as if it
had started from zero (:mod:`aggregation.offline_clients` says what of a recipe happens before the
server, and which recipes need real clients). What a recipe keeps beside the trainable adapter is
not lost but becomes further adapters, so that all together apply the exact weighted mean::

    DIR                the trainable adapter
    DIR/residual       the rest; load both and make both active
    DIR/residual-2 ... only where a module's rest has a rank above 256, which no PEFT folder takes

If no folder says the digest of its base and none is given, the result is written without
``airpeft.json``, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from aggregation import beside, peft_layout
from aggregation.adapter import Adapter
from aggregation.low_rank import LowRank
from aggregation.offline_clients import refusal, sent
from aggregation.offline_folders import Member, Members, OfflineError, read_members
from aggregation.recipe import Recipe
from aggregation.refactoring import Svd
from aggregation.report import AggregationReport
from aggregation.sketching import Sketch
from aggregation.spec import MAX_RANK, AdapterSpec
from aggregation.state import GlobalState
from aggregation.update import Update

__all__ = ["Combined", "Member", "Members", "OfflineError", "check_new", "combine", "read_members"]
_ALL = 1 << 20


@dataclass(frozen=True, eq=False)
class Combined:
    """The result.

    Attributes:
        adapter: the trainable part.
        residual: adapters to load beside it, none if nothing is left.
        report: rank, energy and error per module.
        tensors: the relative error of each tensor outside the modules, by name, against the
            weighted mean of what is in the folders.
        bytes_in: what the folders' clients would have sent, in bytes.
    """

    adapter: Adapter
    residual: tuple[Adapter, ...]
    report: AggregationReport
    tensors: Mapping[str, float]
    bytes_in: int

    @property
    def error(self) -> float:
        """That of all modules together; without any, the largest of a tensor."""
        if self.adapter.spec.modules:
            return self.report.error
        return max(self.tensors.values(), default=0.0)


def combine(chosen: Recipe, members: Members, *, trusted: str = "") -> Combined:
    """The members' weighted mean, by a recipe.

    The trainable adapter has the largest rank that a member has, per module; with a recipe that
    chooses the rank by energy, that rank.

    Args:
        chosen: the recipe.
        members: the adapters.
        trusted: name of the member that the others are compared with, for a recipe that does so;
            it is not in the mean itself.

    Raises:
        OfflineError: if the recipe makes no sense without clients, folders differ in what it
            freezes, or its rule counts none of them.
        RecipeError: if the members are too few for the recipe, or of a type that it cannot take.
        UpdateError: if the recipe cannot take a member: another rank under a plain mean, for one.
    """
    reason = refusal(chosen)
    if reason:
        raise OfflineError(reason)
    counted = [m for m in members.members if m.weight or m.name == trusted]
    spec = _widest([m.adapter.spec for m in members.members])
    chosen.check_spec(spec)
    by_energy = isinstance(chosen.refactor, Svd) and chosen.refactor.energy is not None
    if isinstance(chosen.refactor, Svd) and chosen.refactor.residual_rank:
        # What lies beside a DoRA adapter is not under its magnitudes, so nothing is put there.
        kept = 0 if spec.setting("use_dora", False) else _ALL
        chosen = replace(chosen, refactor=replace(chosen.refactor, residual_rank=kept))
    if by_energy:
        spec = spec.with_ranks({m.name: min(MAX_RANK, m.d_in, m.d_out) for m in spec.modules})
    arrived, number = sent(chosen, [(m.name, m.adapter, m.weight or 1.0) for m in counted])
    same = next((one.start for one in arrived if one.start.spec == spec), Adapter.zeros(spec))
    reduction = chosen.begin(
        GlobalState(same, round=number - 1),
        starts={one.start.digest: one.start for one in arrived if one.start.spec != spec},
        trusted=trusted,
    )
    for one in arrived:
        reduction.add(Update(one.name, number, one.start.digest, one.adapter, one.weight))
    state, report = reduction.finish()
    if report.unchanged:
        raise OfflineError(f"{chosen.name}: {report.unchanged}")
    residual = beside.residual_adapters(state)
    lossy = any(
        one.adapter.digest != m.adapter.digest for one, m in zip(arrived, counted, strict=True)
    )
    if lossy or isinstance(chosen.reduce, Sketch):  # a sketch only estimates what it misses
        report = _against_folders(counted, state.adapter, residual, report)
    adapter = _trimmed(state.adapter, report) if by_energy else state.adapter
    tensors = _tensor_errors(chosen, [m for m in counted if m.name != trusted], adapter)
    return Combined(adapter, residual, report, tensors, sum(one.nbytes for one in arrived))


def _tensor_errors(chosen: Recipe, members: Sequence[Member], adapter: Adapter) -> dict[str, float]:
    """How far each tensor outside the modules is from the weighted mean of the folders'."""
    weights = [
        chosen.weigh.weight(Update(m.name, 1, "", m.adapter, m.weight or 1.0)) for m in members
    ]
    errors = {}
    for tensor in adapter.spec.others:
        exact = np.zeros(tensor.shape)
        for member, weight in zip(members, weights, strict=True):
            value = member.adapter.tensors[tensor.key].astype(np.float64)
            exact += weight / (sum(weights) or 1.0) * value
        distance = float(np.linalg.norm(exact - adapter.tensors[tensor.key]))
        errors[tensor.name] = distance / (float(np.linalg.norm(exact)) or 1.0)
    return errors


def _against_folders(
    members: Sequence[Member],
    adapter: Adapter,
    residual: Sequence[Adapter],
    report: AggregationReport,
) -> AggregationReport:
    """The report against what is in the folders, where something less arrived at the server."""
    modules = {}
    for name, said in report.modules.items():
        exact = LowRank.zero(adapter.spec.module(name).d_out, adapter.spec.module(name).d_in)
        for member in members:
            share = report.influence.get(member.name, 0.0)
            if share:
                exact = (exact + share * LowRank.of(member.adapter, name)).compress()
        missed = exact - LowRank.of(adapter, name)
        distance = missed.norm()
        for extra in residual:
            if any(m.name == name for m in extra.spec.modules):
                missed = missed - LowRank.of(extra, name)
        norm, dropped = exact.norm(), missed.norm()
        modules[name] = replace(said, norm=norm, distance=distance, dropped=dropped)
    return replace(report, modules=modules)


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
    files |= beside.files(combined.residual, name, with_spec=members.base_known)
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


def _widest(specs: Sequence[AdapterSpec]) -> AdapterSpec:
    """The first specification, each module at the largest rank that any has, with its alpha."""
    modules = [
        max((spec.module(m.name) for spec in specs), key=lambda module: module.rank)
        for m in specs[0].modules
    ]
    return replace(specs[0], modules=tuple(modules))
