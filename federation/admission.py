"""Which signed ``adapters`` file may follow the current one; nothing here writes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from federation.published import (
    Published,
    PublishError,
    ReleaseRecord,
    RepositoryError,
    parse_metadata,
    read_releases,
    verify,
)
from federation.roles import in_seconds
from protos.signed import ADAPTERS_ROLE, StatementError


@dataclass(frozen=True)
class Incoming:
    """A checked release; ``repeated`` if it is already published as it is."""

    record: ReleaseRecord
    repeated: bool


def check_adapters(state: Published, metadata: bytes, payload: bytes, now: datetime) -> Incoming:
    """Whether these signed bytes may follow the current ``adapters`` file.

    Raises:
        PublishError: see :meth:`federation.repository.Repository.publish_release`.
    """
    try:
        parsed = parse_metadata(metadata, "adapters metadata")
        if parsed.signed.type != "targets":
            raise RepositoryError(f"it is {parsed.signed.type} metadata, not an adapters file")
        verify(state.signed["targets"], ADAPTERS_ROLE, parsed, "adapters metadata")
        records = {record.target: record for record in read_releases(parsed.signed)}
    except (RepositoryError, StatementError) as error:
        raise PublishError(f"the release is refused: {error}") from None
    digest = hashlib.sha256(payload).hexdigest()
    named = [record for record in records.values() if record.sha256 == digest]
    if metadata == state.files[ADAPTERS_ROLE] and named:
        return Incoming(named[-1], repeated=True)
    current = state.signed[ADAPTERS_ROLE]
    if parsed.signed.version != current.version + 1:
        raise PublishError(
            f"the release was made for version {parsed.signed.version} of the adapters metadata, "
            f"and {current.version + 1} is next: make it again and sign it again"
        )
    if parsed.signed.is_expired(in_seconds(now)):
        raise PublishError(f"the release expired on {parsed.signed.expires:%Y-%m-%d}: make it anew")
    record = _the_new_one(state, records)
    if record.sha256 != digest or record.length != len(payload):
        raise PublishError(
            f"the payload has {len(payload)} bytes with sha256 {digest[:12]}…, but {record.name} "
            f"was signed for {record.length} bytes with sha256 {record.sha256[:12]}…"
        )
    return Incoming(record, repeated=False)


def _the_new_one(state: Published, records: Mapping[str, ReleaseRecord]) -> ReleaseRecord:
    """The one release that is new, after checking that nothing else moved."""
    before = {record.target: record for record in state.releases}
    for target, record in before.items():
        if records.get(target, record) != record:
            raise PublishError(f"{record.name} was signed before and cannot be changed")
    for assignment in state.round.assignments:
        if not assignment.is_base and assignment.target not in records:
            raise PublishError(f"{assignment.target} is in the current round: it must stay listed")
    new = [record for target, record in records.items() if target not in before]
    if len(new) != 1:
        names = ", ".join(record.name for record in new) or "none"
        raise PublishError(f"exactly one new release is published at a time; new here: {names}")
    channel, counter = new[0].statement.channel, new[0].statement.counter
    highest = max(
        (r.statement.counter for r in state.releases if r.statement.channel == channel), default=0
    )
    if counter <= highest:
        raise PublishError(
            f"{new[0].name}: counters grow and are never reused; {channel} is at {highest}"
        )
    return new[0]
