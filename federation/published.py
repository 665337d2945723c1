"""What is current in a repository, as values; reading it is :mod:`federation.metadata_files`.

Releases are signed by the roles that targets delegates: ``adapters``, and one more for each tenant
or base that has keys of its own. The paths of a delegation say which channels it may speak for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from tuf.api.metadata import (  # type: ignore[attr-defined]  # it has no __all__
    Metadata,
    TargetFile,
    Targets,
)

from federation.errors import FederationError
from protos.messages import MetadataBundle
from protos.signed import (
    CURRENT_ROUND,
    ROUNDS_ROLE,
    STANDING,
    Assignment,
    ReleaseStatement,
    Revocation,
    RoundDocument,
    SignedPayload,
    Standing,
    StatementError,
    payload_path,
    split_target,
    target_name,
)


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
    def adapter_roles(self) -> tuple[str, ...]:
        """The roles that may sign releases, in the order in which they are asked."""
        return tuple(r for r in self.signed["targets"].delegations.roles if r != ROUNDS_ROLE)

    def with_verified(self, role: str, data: bytes, parsed: Metadata[Any]) -> Published:
        """The same, with one file that has been verified against these keys just now."""
        return Published(self.roots, {**self.files, role: data}, {**self.metadata, role: parsed})

    def following(self, old: Published) -> Published:
        """The same; the releases that it shares with an older state are not read again."""
        self.__dict__["listed"] = {
            role: read_releases(self.signed[role], old.signed.get(role), old.listed.get(role, ()))
            for role in self.adapter_roles
        }
        return self

    def role_of(self, channel: str) -> str:
        """The role that signs a channel's releases.

        Raises:
            NotFoundError: none may.
        """
        try:
            name = target_name(channel, 1)
        except StatementError as error:
            raise NotFoundError(f"no role may sign releases of such a channel: {error}") from None
        delegations = self.signed["targets"].delegations
        for role, terminating in delegations.get_roles_for_target(name):
            if role in self.adapter_roles:
                return str(role)
            if terminating:
                break
        raise NotFoundError(
            f"no role may sign releases of channel {channel!r}; "
            f"there are: {', '.join(self.adapter_roles)}"
        )

    @cached_property
    def listed(self) -> Mapping[str, tuple[ReleaseRecord, ...]]:
        """The releases of each role, by channel and counter."""
        return {role: read_releases(self.signed[role]) for role in self.adapter_roles}

    @cached_property
    def releases(self) -> tuple[ReleaseRecord, ...]:
        """Every release, by channel and counter."""
        found = [record for role in self.adapter_roles for record in self.listed[role]]
        return tuple(sorted(found, key=lambda r: (r.statement.channel, r.statement.counter)))

    @cached_property
    def standing(self) -> Mapping[str, Standing]:
        """What each of these roles says of releases that are out already."""
        return {role: read_standing(self.signed[role]) for role in self.adapter_roles}

    def revocation(self, record: ReleaseRecord) -> Revocation | None:
        """What is said against a release, if anything."""
        said = self.standing[self.role_of(record.statement.channel)]
        return said.revocation(record.sha256)

    def floor(self, channel: str) -> int:
        """The lowest counter of a channel that devices still install."""
        said = self.standing[self.role_of(channel)].floors.get(channel, 0)
        mine = [r.statement.floor for r in self.releases if r.statement.channel == channel]
        return max([said, *mine])

    @cached_property
    def round(self) -> RoundDocument:
        """The round in force."""
        return RoundDocument.from_custom(self.signed[ROUNDS_ROLE].targets[CURRENT_ROUND].custom)

    @cached_property
    def payloads(self) -> frozenset[str]:
        """Paths of all targets."""
        return frozenset(
            payload_path(target.path, target.hashes["sha256"])
            for role in (ROUNDS_ROLE, *self.adapter_roles)
            for target in self.signed[role].targets.values()
        )

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
        try:
            role = self.role_of(split_target(assignment.target)[0])
            target = self.signed[role].targets.get(assignment.target)
        except NotFoundError:
            target = None
        if target is None or target.hashes["sha256"] != assignment.sha256:
            raise PublishError(
                f"the round assigns {assignment.target} ({assignment.sha256[:12]}…), which the "
                "adapter keys have not signed: publish the release first"
            )

    def check_orderable(self, record: ReleaseRecord) -> None:
        """Refuse to begin with what every device would refuse.

        A round is not refused for this: a roll-back that names an old release must replace the
        round of a bad one, whatever devices make of its own.

        Raises:
            PublishError: it is revoked, or below its channel's floor.
        """
        revoked = self.revocation(record)
        if revoked is not None:
            raise PublishError(f"{record.name} is revoked ({revoked.why}): choose another release")
        floor = self.floor(record.statement.channel)
        if record.statement.counter < floor:
            raise PublishError(
                f"{record.name} is below the signed floor {floor} of its channel: choose a release "
                f"from {record.statement.channel}-{floor} on"
            )

    def refusal(self, name: str) -> str:
        """Why every device would refuse a release of this name; empty if they would not.

        Args:
            name: of a release; empty for the base model alone.
        """
        if name:
            try:
                self.check_orderable(self.release(name))
            except (NotFoundError, PublishError) as error:
                return str(error)
            return ""
        floors = {
            channel: n for said in self.standing.values() for channel, n in said.floors.items()
        }
        for record in self.releases:
            statement = record.statement
            floors[statement.channel] = max(floors.get(statement.channel, 0), statement.floor)
        signed = [f"{channel}-{floor}" for channel, floor in sorted(floors.items()) if floor]
        if signed:
            return f"the base model alone lies below the signed floors: {', '.join(signed)}"
        return ""

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


def read_releases(
    adapters: Targets, before: Targets | None = None, records: Iterable[ReleaseRecord] = ()
) -> tuple[ReleaseRecord, ...]:
    """The releases that an ``adapters`` file lists, by channel and counter.

    Args:
        adapters: the file's content.
        before: the file that it follows; what is the same there is not read twice.
        records: the releases of that one.

    Raises:
        StatementError: an entry that is not a release.
    """
    known = {record.target: record for record in records}
    same = before.targets if before is not None else {}
    records = []
    for path, target in adapters.targets.items():
        repeated = path in known and same.get(path) == target
        records.append(known[path] if repeated else _record(path, target))
    return tuple(sorted(records, key=lambda r: (r.statement.channel, r.statement.counter)))


def read_standing(adapters: Targets) -> Standing:
    """What an ``adapters`` file says of releases that are out already.

    Raises:
        StatementError: the field is malformed.
    """
    return Standing.from_field(adapters.unrecognized_fields.get(STANDING))


def _record(path: str, target: TargetFile) -> ReleaseRecord:
    statement = ReleaseStatement.from_custom(target.custom)
    sha256 = target.hashes.get("sha256", "")
    if statement.target != path:
        raise StatementError(f"{path[:80]}: its statement describes {statement.target}")
    Assignment(0, path, sha256)  # checks the digest's form
    return ReleaseRecord(statement, sha256, target.length)
