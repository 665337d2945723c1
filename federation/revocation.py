"""The request for a revocation: a release goes on the signed list of bad ones.

It is carried and signed as a release is, by the same keys (``airpeft release sign``), and lies in a
folder of the same form, without a payload::

    request.json  adapters.json  previous.json  signatures/

The release stays listed, so that one can still read what it was; but no device installs it, and one
that serves it leaves it. With ``also_older`` the channel's floor rises above it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata

from aggregation import durable
from federation import roles
from federation.anchor import files_above
from federation.description import ReleaseError
from federation.published import ReleaseRecord, read_standing
from federation.release_request import (
    METADATA,
    NOTHING,
    PREVIOUS,
    REQUEST,
    SCHEMA,
    dump,
    parse_adapters,
    read_file,
)
from federation.signable import check_file, check_floors
from protos.signed import ADAPTERS_ROLE, Revocation, Standing, StatementError

KIND = "revocation"


@dataclass(frozen=True)
class RevocationRequest:
    """A revocation that waits for signatures.

    Attributes:
        folder: where it lies.
        new: what is revoked by it.
        floors: the floors that rise, by channel.
        metadata: the bytes of the unsigned ``adapters`` file.
        parsed: the same, read.
        previous: the file that it follows, read at the same time.
    """

    folder: Path
    new: tuple[Revocation, ...]
    floors: dict[str, int]
    metadata: bytes
    parsed: Metadata[Any] = field(repr=False, compare=False)
    previous: Metadata[Any] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """What it is about, for people."""
        return "revocation of " + ", ".join(one.release for one in self.new)


def make_revocation(
    out: Path,
    *,
    adapters: bytes,
    release: str,
    why: str,
    also_older: bool = False,
    now: datetime,
    above: Mapping[str, bytes] = NOTHING,
) -> RevocationRequest:
    """Write the request for a revocation.

    Args:
        out: folder of the request; it must not exist.
        adapters: the current metadata of the role that signed the release, as published.
        release: its name, such as ``stable-3``.
        why: for people, and for the log of each device; signed.
        also_older: no older release of the channel is installed any more either.
        now: the time, with a zone.
        above: root and targets as published, for signers who bring a root of their own.

    Raises:
        ReleaseError: ``out`` exists, there is no such release, it is revoked already, or there is
            no reason.
        StorageError: the request can't be written.
    """
    if out.exists():
        raise ReleaseError(f"{out} exists: choose another folder for the request")
    if not why.strip():
        raise ReleaseError("a revocation needs a reason: --why TEXT")
    current, records = parse_adapters(adapters, "the current adapters metadata")
    try:
        before = read_standing(current.signed)
        record = _find(release, records, before)
        channel, counter = record.statement.channel, record.statement.counter
        floors = dict(before.floors)
        if also_older:
            floors[channel] = max(floors.get(channel, 0), counter + 1)
        entry = Revocation(
            release=record.name,
            sha256=record.sha256,
            why=why.strip(),
            made_unix=int(now.timestamp()),
        )
        after = Standing(revoked=(*before.revoked, entry), floors=floors)
    except StatementError as error:
        raise ReleaseError(f"the revocation can't be described: {error}") from None
    listed = current.signed.targets.values()
    unsigned = roles.adapters(listed, current.signed.version + 1, now, after)
    risen = {c: n for c, n in floors.items() if n != before.floors.get(c, 0)}
    request = RevocationRequest(out, (entry,), risen, roles.to_bytes(unsigned), unsigned, current)
    summary = {"schema": SCHEMA, "kind": KIND, **describe_revocation(request)}
    files = {METADATA: request.metadata, PREVIOUS: adapters, REQUEST: dump(summary)}
    files |= files_above(above)
    durable.write_folder(out, files)
    return request


def is_revocation(folder: Path) -> bool:
    """Whether a folder is a request for a revocation, and not for a release."""
    return b'"kind": "revocation"' in _first_bytes(folder / REQUEST)


def read_revocation(folder: Path) -> RevocationRequest:
    """A request, checked: the same releases as before, and something more against them.

    Raises:
        ReleaseError: it is not what it should be; says why.
    """
    metadata = read_file(folder / METADATA)
    before, old = parse_adapters(read_file(folder / PREVIOUS), PREVIOUS)
    after, records = parse_adapters(metadata, METADATA, before.signed, old)
    try:
        said, earlier = read_standing(after.signed), read_standing(before.signed)
        check_file(ADAPTERS_ROLE, after.signed)
        check_floors(earlier, said, old)
    except StatementError as error:
        raise ReleaseError(f"{folder}: {error}") from None
    if records != old or after.signed.version != before.signed.version + 1:
        raise ReleaseError(f"{folder}: a revocation leaves the list of releases as it is")
    known = {one.sha256 for one in earlier.revoked}
    new = tuple(one for one in said.revoked if one.sha256 not in known)
    if not said.follows(earlier) or said == earlier:
        raise ReleaseError(
            f"{folder}: it must say something more than before, and take nothing back"
        )
    risen = {c: n for c, n in said.floors.items() if n != earlier.floors.get(c, 0)}
    return RevocationRequest(folder, new, risen, metadata, after, before)


def describe_revocation(request: RevocationRequest) -> dict[str, Any]:
    """A revocation as JSON objects."""
    return {
        "revoked": [
            {
                "release": one.release,
                "sha256": one.sha256,
                "why": one.why,
                "made_unix": one.made_unix,
            }
            for one in request.new
        ],
        "floors": dict(request.floors),
    }


def _find(release: str, records: Iterable[ReleaseRecord], before: Standing) -> ReleaseRecord:
    known = {record.name: record for record in records}
    if release not in known:
        names = ", ".join(list(known)[-5:]) or "none yet"
        raise ReleaseError(f"no release {release!r}; the latest are: {names}")
    said = before.revocation(known[release].sha256)
    if said is not None:
        raise ReleaseError(f"{release} is revoked already: {said.why}")
    return known[release]


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(1 << 16)
    except OSError:
        return b""
