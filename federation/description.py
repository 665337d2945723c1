"""What is said of a release, from what people decide and what lies beside the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from aggregation import payload
from aggregation.adapter import Adapter
from federation import gate
from federation.errors import FederationError
from federation.provenance import read_provenance
from federation.published import ReleaseRecord
from protos.signed import (
    Evaluation,
    Hardware,
    Lineage,
    ReleaseStatement,
    Seal,
    Standing,
    check_channel,
)
from protos.statement_parts import ANY_HARDWARE


class ReleaseError(FederationError):
    """A request that can't be made, or must not be signed or published as it is; says why."""


@dataclass(frozen=True, kw_only=True)
class ReleaseOptions:
    """What a person decides about a release; the rest is read from the adapter's folder.

    Attributes:
        channel: the line of releases it continues.
        dtype: of the payload: ``bf16``, ``f32`` or ``int8``.
        floor: from now on no device installs a lower counter; None keeps the channel's floor.
        runtime: kinds of inference engine that can serve it.
        notes: for people.
        base_digest: needed for a folder that other software wrote.
        lineage: overrides what the folder says.
        data: further fingerprints of training data, beside those that the folder names.
        evaluations: come before what the folder says of the same sets.
        hardware: what a machine must have.
        model_signing: digest of a model-signing bundle (:mod:`federation.model_signing`).
        force_worse: why it is to be released even if it is worse than its parent; empty: it is not.
    """

    channel: str
    dtype: payload.Dtype = "bf16"
    floor: int | None = None
    runtime: tuple[str, ...] = ("torch",)
    notes: str = ""
    base_digest: str | None = None
    lineage: Lineage | None = None
    data: tuple[str, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    hardware: Hardware = ANY_HARDWARE
    model_signing: str = ""
    force_worse: str = ""


def statement_for(
    adapter: Adapter,
    encoded: payload.Payload,
    folder: Path,
    records: Sequence[ReleaseRecord],
    standing: Standing,
    options: ReleaseOptions,
    now: datetime,
    seal: Seal | None = None,
) -> ReleaseStatement:
    """What is to be signed of an adapter.

    Args:
        adapter: the adapter.
        encoded: its payload.
        folder: where it came from, with what is known of it.
        records: the releases that are out.
        standing: what was said of them since.
        options: what a person decides.
        now: the time, with a zone.
        seal: how the payload is encrypted, if it is.

    Raises:
        ReleaseError: the floor falls.
        ProvenanceError: a file beside the adapter says nonsense.
        StatementError: a value is out of bounds.
    """
    check_channel(options.channel)
    channel = [r.statement for r in records if r.statement.channel == options.channel]
    known = read_provenance(folder)
    floor = max([s.floor for s in channel] + [standing.floors.get(options.channel, 0)])
    lineage = options.lineage or known.lineage
    data = tuple(dict.fromkeys([*lineage.data, *options.data]))
    measured = {one.set: one for one in (*options.evaluations, *known.evaluations)}
    measured |= {one.set: one for one in options.evaluations}
    first, more = (*measured.values(),)[:1], (*measured.values(),)[1:]
    statement = ReleaseStatement(
        channel=options.channel,
        counter=max([s.counter for s in channel] + [standing.floors.get(options.channel, 1) - 1])
        + 1,
        adapter_digest=encoded.adapter_digest,
        spec_digest=adapter.spec.digest,
        base_digest=adapter.spec.base_digest,
        plain_length=encoded.plain_length,
        runtime=options.runtime,
        floor=floor if options.floor is None else options.floor,
        example=known.example,
        client=known.client,
        lineage=replace(lineage, data=data),
        evaluation=first[0] if first else None,
        more_evaluations=more,
        hardware=options.hardware,
        model_signing=options.model_signing,
        seal=seal,
        notes=options.notes,
        made_unix=int(now.timestamp()),
    )
    if statement.floor < floor:
        raise ReleaseError(
            f"floor={statement.floor} is below the channel's {floor}: a floor only rises"
        )
    return statement


def passed(
    statement: ReleaseStatement,
    records: Sequence[ReleaseRecord],
    standing: Standing,
    reason: str,
) -> ReleaseStatement:
    """The statement, with the reason in it if it needs one (:mod:`federation.gate`).

    Raises:
        ReleaseError: it is worse than its parent, and there is no reason.
    """
    found = gate.worse(statement, gate.parent_of(statement, records, standing))
    if not found:
        return statement
    if not reason.strip():
        raise ReleaseError(
            f"{statement.name} is worse than its parent: {'; '.join(found)}. "
            "To release it all the same, say why with --force-worse REASON, which is signed too"
        )
    return replace(statement, forced=reason.strip())
