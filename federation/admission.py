"""Which signed ``adapters`` file may follow the current one; nothing here writes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tuf.api.metadata import Metadata

from federation.gate import parent_of, worse
from federation.metadata_files import parse_metadata, verify, without_revoked
from federation.published import (
    Published,
    PublishError,
    ReleaseRecord,
    RepositoryError,
    read_releases,
    read_standing,
)
from federation.roles import in_seconds
from federation.sealing import SealingError, check_seal
from federation.signable import check_file, check_floors, check_listing
from protos.signed import Revocation, Standing, StatementError, split_target


@dataclass(frozen=True)
class Incoming:
    """A checked release and the role that signed it; ``repeated`` if it is published as it is."""

    role: str
    parsed: Metadata[Any]
    record: ReleaseRecord
    repeated: bool


@dataclass(frozen=True)
class IncomingStanding:
    """Checked revocations and the role that signed them; ``repeated`` if they stand already."""

    role: str
    parsed: Metadata[Any]
    new: tuple[Revocation, ...]
    standing: Standing
    repeated: bool


@dataclass(frozen=True)
class _Signed:
    """An ``adapters`` file that its role has signed, beside the one that it is to follow."""

    role: str
    parsed: Metadata[Any]
    records: Mapping[str, ReleaseRecord]
    before: Mapping[str, ReleaseRecord]
    standing: Standing
    repeated: bool


def check_adapters(state: Published, metadata: bytes, payload: bytes, now: datetime) -> Incoming:
    """Whether these signed bytes may follow the current file of their role.

    Raises:
        PublishError: see :meth:`federation.repository.Repository.publish_release`.
    """
    signed = _signed(state, metadata, now)
    digest = hashlib.sha256(payload).hexdigest()
    if signed.repeated:
        named = [record for record in signed.records.values() if record.sha256 == digest]
        if named:
            return Incoming(signed.role, signed.parsed, named[-1], repeated=True)
        raise PublishError("exactly one new release is published at a time; new here: none")
    if signed.standing != state.standing[signed.role]:
        raise PublishError("a release is published without revoking others: do one after the other")
    record = _the_new_one(state, signed)
    _check_gate(state, signed, record)
    if record.sha256 != digest or record.length != len(payload):
        raise PublishError(
            f"the payload has {len(payload)} bytes with sha256 {digest[:12]}…, but {record.name} "
            f"was signed for {record.length} bytes with sha256 {record.sha256[:12]}…"
        )
    try:
        check_seal(record.statement, payload)
    except SealingError as error:
        raise PublishError(str(error)) from None
    return Incoming(signed.role, signed.parsed, record, repeated=False)


def check_standing(state: Published, metadata: bytes, now: datetime) -> IncomingStanding:
    """Whether these signed bytes, with something new against old releases, may follow.

    Raises:
        PublishError: see :meth:`federation.repository.Repository.publish_standing`.
    """
    signed = _signed(state, metadata, now)
    before = state.standing[signed.role]
    if not signed.repeated:
        if signed.records.keys() - signed.before.keys():
            raise PublishError("a revocation brings no new release: do one after the other")
        if signed.standing == before:
            raise PublishError("the file revokes nothing and raises no floor")
    known = {one.sha256 for one in before.revoked}
    new = tuple(one for one in signed.standing.revoked if one.sha256 not in known)
    try:
        check_floors(before, signed.standing, state.listed[signed.role])
    except StatementError as error:
        raise PublishError(f"the revocation is refused: {error}") from None
    return IncomingStanding(signed.role, signed.parsed, new, signed.standing, signed.repeated)


def _signed(state: Published, metadata: bytes, now: datetime) -> _Signed:
    """The file, with what holds for every change of it."""
    try:
        parsed = parse_metadata(metadata, "adapters metadata")
        if parsed.signed.type != "targets":
            raise RepositoryError(f"it is {parsed.signed.type} metadata, not an adapters file")
        likely = state.signed.get(_likely_role(state, parsed))
        records = {r.target: r for r in read_releases(parsed.signed, likely, state.releases)}
        standing = read_standing(parsed.signed)
        role = _role(state, records, standing)
        targets = without_revoked(state.signed["root"], state.signed["targets"])
        verify(targets, role, parsed, "adapters metadata")
        check_file(role, parsed.signed)
    except (RepositoryError, StatementError) as error:
        raise PublishError(f"the release is refused: {error}") from None
    before = {record.target: record for record in state.listed[role]}
    if metadata == state.files[role]:
        return _Signed(role, parsed, records, before, standing, repeated=True)
    current = state.signed[role]
    if parsed.signed.version != current.version + 1:
        raise PublishError(
            f"the release was made for version {parsed.signed.version} of the {role} metadata, "
            f"and {current.version + 1} is next: make it again and sign it again"
        )
    if parsed.signed.is_expired(in_seconds(now)):
        raise PublishError(f"the release expired on {parsed.signed.expires:%Y-%m-%d}: make it anew")
    for target, record in before.items():
        if records.get(target, record) != record:
            raise PublishError(f"{record.name} was signed before and cannot be changed")
    for assignment in state.round.assignments:
        if assignment.target in before and assignment.target not in records:
            raise PublishError(f"{assignment.target} is in the current round: it must stay listed")
    if not standing.follows(state.standing[role]):
        raise PublishError("what was revoked stays revoked, and floors only rise")
    return _Signed(role, parsed, records, before, standing, repeated=False)


def _check_gate(state: Published, signed: _Signed, record: ReleaseRecord) -> None:
    """The gate, and what may leave the list, by what is published: a request may lie about it."""
    before = state.listed[signed.role]
    try:
        check_listing(before, tuple(signed.records.values()), record)
    except StatementError as error:
        raise PublishError(f"the release is refused: {error}") from None
    found = worse(record.statement, parent_of(record.statement, before, signed.standing))
    if found and not record.statement.forced.strip():
        raise PublishError(
            f"{record.name} is worse than its parent: {'; '.join(found)}; and no reason is signed "
            "with it: make it anew, with --force-worse REASON if it is to be released all the same"
        )


def _likely_role(state: Published, parsed: Metadata[Any]) -> str:
    """The role whose file this probably follows, so that what is the same is not read twice."""
    shared = {
        role: len(parsed.signed.targets.keys() & state.signed[role].targets.keys())
        for role in state.adapter_roles
    }
    return max(shared, key=lambda role: shared[role])


def _role(state: Published, records: Mapping[str, ReleaseRecord], standing: Standing) -> str:
    """The one role that may speak for all channels in a file."""
    channels = {record.statement.channel for record in records.values()}
    channels |= {one.channel for one in standing.revoked} | set(standing.floors)
    roles = {state.role_of(channel) for channel in sorted(channels)}
    if len(roles) > 1:
        raise RepositoryError(f"its channels belong to different roles: {', '.join(sorted(roles))}")
    return roles.pop() if roles else state.adapter_roles[-1]


def _the_new_one(state: Published, signed: _Signed) -> ReleaseRecord:
    """The one release that is new."""
    new = [record for target, record in signed.records.items() if target not in signed.before]
    if len(new) != 1:
        names = ", ".join(record.name for record in new) or "none"
        raise PublishError(f"exactly one new release is published at a time; new here: {names}")
    revoked = signed.standing.revocation(new[0].sha256)
    if revoked is not None:
        raise PublishError(f"{new[0].name}: these very bytes are revoked, as {revoked.release}")
    channel, counter = split_target(new[0].target)
    highest = max(
        (r.statement.counter for r in state.releases if r.statement.channel == channel), default=0
    )
    if counter <= highest:
        raise PublishError(
            f"{new[0].name}: counters grow and are never reused; {channel} is at {highest}"
        )
    return new[0]
