"""The request for a release: what is carried from the adapter to the keys.

request/
request.json        what this is about, for people and for the later steps
adapters.json       the metadata to be signed
previous.json       the current metadata, so that a signer can see that nothing else changes
above/              root and targets, by which that metadata can be verified
payload.airpeft     the bytes that devices will fetch
keys.wraps          where these are encrypted: their key, wrapped to each device that may read them
signatures/         one file for each key: <keyid>.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.api.metadata import (  # type: ignore[attr-defined]  # it has no __all__
    Metadata,
    Targets,
)

from aggregation import beside, durable, payload, peft_layout, sealed
from aggregation.adapter import Adapter
from federation import roles
from federation.anchor import files_above
from federation.bounded import read_bounded
from federation.description import ReleaseError, ReleaseOptions, passed, statement_for
from federation.metadata_files import MAX_METADATA, parse_metadata
from federation.provenance import read_provenance
from federation.published import ReleaseRecord, RepositoryError, read_releases, read_standing
from federation.sealing import SealingError, SealTo, check_seal, sealed_payload
from federation.signable import check_file, check_listing, may_leave
from protos.signed import ADAPTERS_ROLE, Standing, StatementError
from protos.wraps import MAX_BYTES, WrapError, Wraps

SCHEMA = 1
REQUEST, METADATA, PREVIOUS = "request.json", "adapters.json", "previous.json"
MAX_PAYLOAD = 512 << 20  # bytes
NOTHING: Mapping[str, bytes] = {}
PAYLOAD, SIGNATURES, WRAPS = "payload.airpeft", "signatures", "keys.wraps"


@dataclass(frozen=True)
class ReleaseRequest:
    """A release that waits for signatures.

    Attributes:
        folder: where it lies.
        record: the new release.
        metadata: the bytes of the unsigned ``adapters`` file.
        parsed: the same, read.
        previous: the file that it follows.
    """

    folder: Path
    record: ReleaseRecord
    metadata: bytes
    parsed: Metadata[Any] = field(repr=False, compare=False)
    previous: Metadata[Any] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The release's name, ``<channel>-<counter>``."""
        return self.record.name


def make_request(
    adapter_folder: Path,
    out: Path,
    *,
    adapters: bytes,
    options: ReleaseOptions,
    now: datetime,
    in_use: Collection[str] = (),
    seal_to: SealTo | None = None,
    above: Mapping[str, bytes] = NOTHING,
) -> ReleaseRequest:
    """Encode an adapter and write the request for its release.

    What a recipe keeps beside the adapter, in ``residual/``, is stacked into it without loss: a
    release is one adapter.

    Args:
        adapter_folder: PEFT layout, with ``version.json`` and ``privacy.json`` if there are any.
        out: folder of the request; it must not exist.
        adapters: the current ``adapters`` metadata of the repository, as published.
        options: what a person decides.
        now: the time, with a zone.
        in_use: targets that the current round hands out: they stay listed, however old.
        seal_to: who alone shall be able to read the payload; None: everybody.
        above: root and targets as published, for signers who bring a root of their own.

    Raises:
        ReleaseError: ``out`` exists, the metadata is not that of a repository, a field is wrong,
            the folder holds only what personal models share, its residual does not fit into one
            adapter, or it is worse than its parent and no reason was given.
        LayoutError: the folder is no adapter.
        PayloadError: the adapter can't be encoded.
        SealingError: it can't be wrapped to somebody in ``seal_to``.
        StorageError: the request can't be written.
    """
    if out.exists():
        raise ReleaseError(f"{out} exists: choose another folder for the request")
    adapter = _whole(adapter_folder, options.base_digest)
    encoded = payload.encode(adapter, dtype=options.dtype)
    seal = wraps = None
    current, records = parse_adapters(adapters, "the current adapters metadata")
    try:
        standing = read_standing(current.signed)
        _check_not_revoked(encoded, records, standing)
        if seal_to is not None:
            encoded, seal, wraps = sealed_payload(encoded, seal_to, sealed.new_key())
        statement = statement_for(
            adapter, encoded, adapter_folder, records, standing, options, now, seal
        )
        statement = passed(statement, records, standing, options.force_worse)
    except StatementError as error:
        raise ReleaseError(f"the release can't be described: {error}") from None
    target = roles.release_target(statement, encoded.length, encoded.sha256)
    listed = [
        entry
        for record in _live(records, options.channel, in_use)
        for entry in [current.signed.targets[record.target]]
    ]
    unsigned = roles.adapters([*listed, target], current.signed.version + 1, now, standing)
    files = {
        METADATA: roles.to_bytes(unsigned),
        PREVIOUS: adapters,
        PAYLOAD: encoded.data,
    }
    files |= files_above(above)
    if wraps is not None:
        files[WRAPS] = wraps.to_bytes()
    record = ReleaseRecord(statement, encoded.sha256, encoded.length)
    files[REQUEST] = dump(_summary(record, unsigned.signed.version))
    durable.write_folder(out, files)
    return ReleaseRequest(out, record, files[METADATA], unsigned, current)


def _check_not_revoked(
    encoded: payload.Payload, records: Sequence[ReleaseRecord], standing: Standing
) -> None:
    """Encrypted anew, a revoked adapter has other bytes: so it is looked for by its digest too."""
    digest = encoded.adapter_digest
    same = [r.sha256 for r in records if r.statement.adapter_digest == digest]
    for sha256 in (encoded.sha256, *same):
        revoked = standing.revocation(sha256)
        if revoked is not None:
            raise ReleaseError(
                f"these very bytes are revoked, as {revoked.release} ({revoked.why}): no device "
                "would install them"
            )


def _whole(folder: Path, base_digest: str | None) -> Adapter:
    """The adapter of a folder, with what lies beside it."""
    shared = read_provenance(folder).personal
    if shared:
        raise ReleaseError(f"{folder} cannot be released: {shared}")
    adapter = peft_layout.read(folder, base_digest=base_digest)
    rest = beside.read(folder, base_digest=adapter.spec.base_digest)
    try:
        return beside.stacked(adapter, rest)
    except beside.StackError as error:
        raise ReleaseError(f"{folder / beside.FOLDER}: {error}") from None


def read_request(folder: Path) -> ReleaseRequest:
    """A request, checked: one new release, nothing else changed, the payload is the one named.

    The gate is asked again, so that a signer does not depend on whoever made the request.

    Args:
        folder: the request's folder, or the ``request.json`` in it.

    Raises:
        ReleaseError: it is not what it should be; says why.
    """
    folder = folder.parent if folder.name == REQUEST else folder
    metadata, previous = read_file(folder / METADATA), read_file(folder / PREVIOUS)
    before, old = parse_adapters(previous, PREVIOUS)
    after, records = parse_adapters(metadata, METADATA, before.signed, old)
    known = {record.target: record for record in old}
    changed = [r.target for r in records if known.get(r.target, r) != r]
    new = [record for record in records if record.target not in known]
    if changed or len(new) != 1 or after.signed.version != before.signed.version + 1:
        raise ReleaseError(
            f"{folder}: the metadata must add exactly one release and change no other; "
            f"new: {', '.join(r.name for r in new) or 'none'}; "
            f"changed: {', '.join(sorted(changed)) or 'none'}"
        )
    try:
        check_file(ADAPTERS_ROLE, after.signed)
        check_listing(old, records, new[0])
        if read_standing(after.signed) != read_standing(before.signed):
            raise ReleaseError(
                f"{folder}: a release revokes no other; that is a request of its own"
            )
        passed(new[0].statement, old, read_standing(before.signed), new[0].statement.forced)
    except StatementError as error:
        raise ReleaseError(f"{folder}: {error}") from None
    data = read_file(folder / PAYLOAD, MAX_PAYLOAD)
    if hashlib.sha256(data).hexdigest() != new[0].sha256 or len(data) != new[0].length:
        raise ReleaseError(f"{folder / PAYLOAD} is not the payload that {METADATA} names")
    try:
        check_seal(new[0].statement, data)
    except SealingError as error:
        raise ReleaseError(f"{folder / PAYLOAD}: {error}") from None
    return ReleaseRequest(folder, new[0], metadata, after, before)


def read_wraps(request: ReleaseRequest) -> bytes:
    """The wrapped keys that lie in a request; empty where its payload is not encrypted.

    Raises:
        ReleaseError: they are missing, damaged, or for another payload.
    """
    if request.record.statement.seal is None:
        return b""
    data = read_file(request.folder / WRAPS, MAX_BYTES)
    try:
        Wraps.from_bytes(data, request.record.sha256)
    except WrapError as error:
        raise ReleaseError(f"{request.folder / WRAPS}: {error}") from None
    return data


def describe(record: ReleaseRecord) -> dict[str, Any]:
    """A release as JSON objects, for people and for ``--format json``."""
    return {
        "release": record.name,
        "target": record.target,
        "sha256": record.sha256,
        "length": record.length,
        "path": record.path,
        **{k: v for k, v in record.statement.to_custom().items() if k != "schema"},
    }


def _live(
    records: Sequence[ReleaseRecord], channel: str, in_use: Collection[str]
) -> list[ReleaseRecord]:
    """What stays listed: everything of other channels, of this one the newest and those in use."""
    old = may_leave(records, channel) - set(in_use)
    return [record for record in records if record.target not in old]


def parse_adapters(
    data: bytes,
    name: str,
    before: Targets | None = None,
    records: Sequence[ReleaseRecord] = (),
) -> tuple[Metadata[Any], tuple[ReleaseRecord, ...]]:
    """An ``adapters`` file and the releases in it; nothing of it is believed yet.

    Args:
        data: the file.
        name: what to call it in an error.
        before: the file that it follows, and its releases: the same are not read twice.
        records: see ``before``.

    Raises:
        ReleaseError: it is none.
    """
    try:
        metadata = parse_metadata(data, name)
        if metadata.signed.type != "targets":
            raise RepositoryError(f"{name} is {metadata.signed.type} metadata")
        return metadata, read_releases(metadata.signed, before, records)
    except (RepositoryError, StatementError) as error:
        raise ReleaseError(f"not the adapters metadata of a repository: {error}") from None


def read_file(path: Path, most: int = MAX_METADATA) -> bytes:
    """A file of a request.

    Raises:
        ReleaseError: it can't be read, or has more than ``most`` bytes.
    """
    try:
        return read_bounded(path, most)
    except OSError as error:
        raise ReleaseError(
            f"cannot read {path}: {error.strerror}; a request is made with: airpeft release make"
        ) from error


def _summary(record: ReleaseRecord, version: int) -> dict[str, Any]:
    return {"schema": SCHEMA, "adapters_version": version, **describe(record)}


def dump(doc: Mapping[str, Any]) -> bytes:
    """JSON for people to read."""
    return (json.dumps(doc, indent=2, sort_keys=True) + "\n").encode()
