"""The metadata files of a repository folder: read, counted and checked; nothing here writes.

``timestamp.json`` names the snapshot, the snapshot names the rest: files that it does not lead to
do not exist as far as this module is concerned.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError as TufError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # it has no __all__
    Metadata,
    MetaFile,
    Root,
    Targets,
)
from tuf.api.serialization import DeserializationError

from federation.bounded import read_bounded
from federation.published import Published, RepositoryError
from protos.canonical import canonical
from protos.signed import ROUNDS_ROLE, StatementError, revoked_keys
from protos.threshold import verify_threshold

MAX_METADATA = 4_000_000
"""Bytes of one metadata file; devices refuse a little more than that."""


def load(folder: Path, known: Published | None = None) -> Published:
    """Read and verify what is current; expiry is for devices to judge.

    Args:
        folder: of the repository.
        known: what was verified before: a file that is the same, under the same keys, is not
            verified twice.

    Raises:
        RepositoryError: a file is missing or does not verify; says which.
    """
    where = folder / "metadata"
    if not (where / "timestamp.json").is_file():
        raise RepositoryError(f"there is no repository in {folder}: start the server once")
    roots = _roots(where, known.roots if known else ())
    files = {"root": roots[-1]}
    same = {"root": known is not None and known.files["root"] == roots[-1]}
    metadata = {
        "root": known.metadata["root"]
        if known is not None and same["root"]
        else parse_metadata(roots[-1], f"{len(roots)}.root.json")
    }

    def take(role: str, name: str, delegator: str, meta: MetaFile | None = None) -> Any:
        data = _read(where / name)
        # The keys that count for a delegated role are said by targets and by root.
        above_same = same[delegator] and same["root"]
        same[role] = above_same and known is not None and known.files.get(role) == data
        files[role] = data
        if known is not None and same[role]:
            metadata[role] = known.metadata[role]
        else:
            metadata[role] = parse_metadata(data, name)
            above = metadata[delegator].signed
            if delegator == "targets":
                above = without_revoked(metadata["root"].signed, above)
            verify(above, role, metadata[role], name)
        if meta is not None:
            _matches(meta, data, metadata[role], name)
        return metadata[role].signed

    named = take("timestamp", "timestamp.json", "root").snapshot_meta
    snapshot = take("snapshot", f"{named.version}.snapshot.json", "root", named)

    def listed(role: str) -> MetaFile:
        if f"{role}.json" not in snapshot.meta:
            raise RepositoryError(f"{named.version}.snapshot.json does not list {role}")
        meta: MetaFile = snapshot.meta[f"{role}.json"]
        return meta

    meta = listed("targets")
    targets = take("targets", f"{meta.version}.targets.json", "root", meta)
    if targets.delegations is None or ROUNDS_ROLE not in (targets.delegations.roles or {}):
        raise RepositoryError(f"{meta.version}.targets.json does not delegate {ROUNDS_ROLE}")
    for role in targets.delegations.roles:
        take(role, f"{listed(role).version}.{role}.json", "targets", listed(role))
    return Published(tuple(roots), files, metadata)


def without_revoked(root: Root, targets: Targets) -> Targets:
    """The targets file as it counts: delegations without the keys that the root has revoked.

    Raises:
        RepositoryError: the root's list of revoked keys is malformed.
    """
    try:
        revoked = revoked_keys(root.unrecognized_fields)
    except StatementError as error:
        raise RepositoryError(f"root {root.version}: {error}") from None
    roles = targets.delegations.roles if targets.delegations else None
    if not roles or not any(revoked & set(role.keyids) for role in roles.values()):
        return targets
    targets = copy.deepcopy(targets)
    assert targets.delegations is not None  # noqa: S101
    for role in (targets.delegations.roles or {}).values():
        role.keyids = [keyid for keyid in role.keyids if keyid not in revoked]
    return targets


def _roots(where: Path, known: Sequence[bytes] = ()) -> list[bytes]:
    """The chain of roots, each one signed by itself and by the one before."""
    roots: list[bytes] = []
    previous: Root | None = None
    if known and all(_same(where, n, data) for n, data in enumerate(known, start=1)):
        roots, previous = list(known), parse_metadata(known[-1], "root").signed
    while (where / f"{len(roots) + 1}.root.json").is_file():
        name = f"{len(roots) + 1}.root.json"
        data = _read(where / name)
        parsed = parse_metadata(data, name)
        for delegator in (previous, parsed.signed):
            if delegator is not None:
                verify(delegator, "root", parsed, name)
        roots.append(data)
        previous = parsed.signed
    if not roots:
        raise RepositoryError(f"{where / '1.root.json'} is missing")
    return roots


def _same(where: Path, number: int, data: bytes) -> bool:
    path = where / f"{number}.root.json"
    return path.is_file() and path.read_bytes() == data


def _matches(meta: MetaFile, data: bytes, metadata: Metadata[Any], name: str) -> None:
    try:
        meta.verify_length_and_hashes(data)
    except TufError as error:
        raise RepositoryError(f"{name} is not the file that is current: {error}") from None
    if metadata.signed.version != meta.version:
        raise RepositoryError(f"{name} holds version {metadata.signed.version}")


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_METADATA)
    except OSError as error:
        raise RepositoryError(f"cannot read {path}: {error.strerror}") from error


def parse_metadata(data: bytes, name: str) -> Metadata[Any]:
    """Metadata from its file; nothing of it is believed yet.

    Raises:
        RepositoryError: it is none, or too large.
    """
    if len(data) > MAX_METADATA:
        raise RepositoryError(f"{name} has {len(data)} bytes; at most {MAX_METADATA} are read")
    try:
        return Metadata[Any].from_bytes(data)
    except (DeserializationError, TufError, RecursionError) as error:
        raise RepositoryError(f"{name} is not signed metadata: {error}") from None


def verify(delegator: Any, role: str, metadata: Metadata[Any], name: str) -> None:
    """Count the signatures under a file.

    Raises:
        RepositoryError: fewer good ones than the delegator asks for.
    """
    try:
        content = canonical(metadata.signed.to_dict())
        verify_threshold(delegator, role, content, metadata.signatures)
    except (TufError, ValueError) as error:
        raise RepositoryError(f"{name}: {error}") from None
