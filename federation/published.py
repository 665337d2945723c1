"""What is current in a repository, read from its folder and verified; nothing here writes.

``timestamp.json`` names the snapshot, the snapshot names the rest: files that it does not lead to
do not exist as far as this module is concerned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError as TufError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # it has no __all__
    Metadata,
    MetaFile,
    Root,
    TargetFile,
    Targets,
)
from tuf.api.serialization import DeserializationError

from federation.errors import FederationError
from protos.messages import MetadataBundle
from protos.signed import (
    ADAPTERS_ROLE,
    CURRENT_ROUND,
    ROUNDS_ROLE,
    Assignment,
    ReleaseStatement,
    RoundDocument,
    SignedPayload,
    StatementError,
    payload_path,
)

MAX_METADATA = 4_000_000
"""Bytes of one metadata file; devices refuse a little more than that."""


class RepositoryError(FederationError):
    """The repository is missing, damaged, or used in a way that it cannot be."""


class NotFoundError(RepositoryError):
    """No such file or release in the repository."""


class PublishError(RepositoryError):
    """A release or a round that must not be published; says why."""


@dataclass(frozen=True)
class ReleaseRecord(SignedPayload):
    """A release that this repository holds."""


@dataclass(frozen=True)
class Expiry:
    """When a role's current file stops being believed; offline ones must be renewed by people."""

    role: str
    version: int
    expires: datetime


@dataclass(frozen=True)
class Published:
    """The current state: every file, its content, and all of it verified."""

    roots: tuple[bytes, ...]
    files: Mapping[str, bytes]
    metadata: Mapping[str, Metadata[Any]]

    @cached_property
    def signed(self) -> Mapping[str, Any]:
        """The content of each role's file."""
        return {role: metadata.signed for role, metadata in self.metadata.items()}

    @cached_property
    def releases(self) -> tuple[ReleaseRecord, ...]:
        """Every release, by channel and counter."""
        return read_releases(self.signed[ADAPTERS_ROLE])

    @cached_property
    def round(self) -> RoundDocument:
        """The round in force."""
        return RoundDocument.from_custom(self.signed[ROUNDS_ROLE].targets[CURRENT_ROUND].custom)

    @cached_property
    def payloads(self) -> frozenset[str]:
        """Paths of all targets."""
        listed = self.signed[ROUNDS_ROLE].targets | self.signed[ADAPTERS_ROLE].targets
        return frozenset(payload_path(t.path, t.hashes["sha256"]) for t in listed.values())

    def release(self, name: str) -> ReleaseRecord:
        """One release by name.

        Raises:
            NotFoundError: there is none of that name.
        """
        for record in self.releases:
            if record.name == name:
                return record
        known = ", ".join(record.name for record in self.releases[-5:]) or "none yet"
        raise NotFoundError(f"no release {name!r}; the latest are: {known}")

    def bundle(self, after_root: int) -> MetadataBundle:
        """The files by their names in the repository, later roots included."""
        files = {
            f"{number}.root.json": data
            for number, data in enumerate(self.roots, start=1)
            if number > after_root
        }
        for role, data in self.files.items():
            if role != "root":
                number = self.signed[role].version
                files["timestamp.json" if role == "timestamp" else f"{number}.{role}.json"] = data
        return MetadataBundle(files)

    def check_assignment(self, assignment: Assignment) -> None:
        """Refuse to order what the adapter keys have not signed.

        Raises:
            PublishError: no such release, or another digest.
        """
        if assignment.is_base:
            return
        target = self.signed[ADAPTERS_ROLE].targets.get(assignment.target)
        if target is None or target.hashes["sha256"] != assignment.sha256:
            raise PublishError(
                f"the round assigns {assignment.target} ({assignment.sha256[:12]}…), which the "
                "adapter keys have not signed: publish the release first"
            )

    def check_online(self, keyid: str) -> None:
        """Refuse an online key that devices would not believe.

        Raises:
            RepositoryError: root or targets name another key.
        """
        root, targets = self.signed["root"], self.signed["targets"]
        circles = [root.roles["timestamp"], root.roles["snapshot"]]
        circles.append(targets.get_delegated_role(ROUNDS_ROLE))
        if any(keyid not in circle.keyids for circle in circles):
            raise RepositoryError(
                f"the online key {keyid[:12]} is not the one that this repository's root names: "
                "use the key that it was created with"
            )


def load(folder: Path) -> Published:
    """Read and verify what is current; expiry is for devices to judge.

    Raises:
        RepositoryError: a file is missing or does not verify; says which.
    """
    where = folder / "metadata"
    if not (where / "timestamp.json").is_file():
        raise RepositoryError(f"there is no repository in {folder}: start the server once")
    roots = _roots(where)
    files, metadata = (
        {"root": roots[-1]},
        {"root": parse_metadata(roots[-1], f"{len(roots)}.root.json")},
    )

    def take(role: str, name: str, delegator: str, meta: MetaFile | None = None) -> Any:
        data = _read(where / name)
        files[role], metadata[role] = data, parse_metadata(data, name)
        verify(metadata[delegator].signed, role, metadata[role], name)
        if meta is not None:
            _matches(meta, data, metadata[role], name)
        return metadata[role].signed

    named = take("timestamp", "timestamp.json", "root").snapshot_meta
    snapshot = take("snapshot", f"{named.version}.snapshot.json", "root", named)
    for role, delegator in (
        ("targets", "root"),
        (ADAPTERS_ROLE, "targets"),
        (ROUNDS_ROLE, "targets"),
    ):
        listed = snapshot.meta.get(f"{role}.json")
        if listed is None:
            raise RepositoryError(f"{named.version}.snapshot.json does not list {role}")
        take(role, f"{listed.version}.{role}.json", delegator, listed)
    return Published(tuple(roots), files, metadata)


def read_releases(adapters: Targets) -> tuple[ReleaseRecord, ...]:
    """The releases that an ``adapters`` file lists, by channel and counter.

    Raises:
        StatementError: an entry that is not a release.
    """
    records = []
    for path, target in adapters.targets.items():
        records.append(_record(path, target))
    return tuple(sorted(records, key=lambda r: (r.statement.channel, r.statement.counter)))


def _record(path: str, target: TargetFile) -> ReleaseRecord:
    statement = ReleaseStatement.from_custom(target.custom)
    sha256 = target.hashes.get("sha256", "")
    if statement.target != path:
        raise StatementError(f"{path[:80]}: its statement describes {statement.target}")
    Assignment(0, path, sha256)  # checks the digest's form
    return ReleaseRecord(statement, sha256, target.length)


def _roots(where: Path) -> list[bytes]:
    """The chain of roots, each one signed by itself and by the one before."""
    roots: list[bytes] = []
    previous: Root | None = None
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


def _matches(meta: MetaFile, data: bytes, metadata: Metadata[Any], name: str) -> None:
    try:
        meta.verify_length_and_hashes(data)
    except TufError as error:
        raise RepositoryError(f"{name} is not the file that is current: {error}") from None
    if metadata.signed.version != meta.version:
        raise RepositoryError(f"{name} holds version {metadata.signed.version}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
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
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (TufError, ValueError) as error:
        raise RepositoryError(f"{name}: {error}") from None
