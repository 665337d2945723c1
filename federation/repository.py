"""The signed repository on the server's disk: releases go in, rounds are ordered, devices read.

The rule it keeps: ``timestamp.json`` alone says what is current. Everything that it leads to is on
the disk, fsynced, before it is replaced; so a kill at any moment leaves either the state before or
the state after, and files of an unfinished step are never referred to.

The server holds the online key only: it can date metadata and order rounds among the releases that
the adapter keys have signed, and can sign no adapter. Layout, as any TUF client expects it with
consistent snapshots::

    metadata/  N.root.json  N.targets.json  N.adapters.json  N.rounds.json  N.snapshot.json
               timestamp.json
    targets/   adapters/<channel>/<sha256>.<counter>.airpeft    rounds/<sha256>.current

Calls are quick and synchronous, and safe from several threads of one process. They know nothing of
devices, of rollouts, or of the network.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from aggregation import durable
from federation import roles
from federation.admission import check_adapters
from federation.founding import first_files
from federation.keys import THRESHOLD, Signer
from federation.published import (
    Expiry,
    NotFoundError,
    Published,
    PublishError,
    ReleaseRecord,
    RepositoryError,
    load,
)
from protos.messages import MetadataBundle
from protos.signed import ADAPTERS_ROLE, CURRENT_ROUND, ROUNDS_ROLE, RoundDocument, payload_path

__all__ = [
    "Expiry",
    "NotFoundError",
    "PublishError",
    "ReleaseRecord",
    "Repository",
    "RepositoryError",
]

OLD_VERSIONS_KEPT = 16
_METADATA_NAME = re.compile(r"(timestamp|[0-9]{1,16}\.[a-z][a-z0-9-]{0,40})\.json\Z", re.ASCII)


class Repository:
    """A repository folder; with the online key it can be changed.

    Args:
        folder: what :meth:`create` made.
        online: the online key; None for reading alone.

    Raises:
        RepositoryError: there is no repository, a file is missing or does not verify, or the
            online key is not the one that its root names.
    """

    def __init__(self, folder: Path, online: Signer | None = None) -> None:
        self.folder = folder
        self._online = online
        self._lock = threading.RLock()
        self._state = load(folder)
        if online is not None:
            self._state.check_online(online.public_key.keyid)

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        root_keys: Sequence[Signer],
        adapter_keys: Sequence[Signer],
        online: Signer,
        now: datetime,
        threshold: int = THRESHOLD,
    ) -> Repository:
        """Make a repository without releases; the only act here that needs offline keys.

        Args:
            folder: it must not exist yet; it appears as a whole or not at all.
            root_keys: sign root and targets.
            adapter_keys: will have to sign releases.
            online: signs rounds, snapshot and timestamp.
            now: the time, with a zone.
            threshold: how many root keys, and how many adapter keys, must agree.

        Raises:
            RepositoryError: the folder exists, or there are fewer keys than the threshold.
            StorageError: the folder cannot be written.
        """
        if folder.exists() and any(folder.iterdir()):
            raise RepositoryError(f"{folder} exists: a repository is never overwritten")
        whole = first_files(root_keys, adapter_keys, online, threshold, now)
        durable.write_folder(folder, whole)
        return cls(folder, online)

    # What there is

    def bundle(self, after_root: int = 0) -> MetadataBundle:
        """All that a device needs in order to decide, as it is pushed to devices.

        Args:
            after_root: leave out root versions up to this one, which the device trusts already.
        """
        return self._state.bundle(after_root)

    def root(self) -> bytes:
        """The first root, as signed: what a device is given at enrolment and trusts ever after."""
        return self._state.roots[0]

    def adapters(self) -> bytes:
        """The current ``adapters`` metadata: what the next release is made from."""
        return self._state.files[ADAPTERS_ROLE]

    def releases(self) -> tuple[ReleaseRecord, ...]:
        """Every release that the adapter keys vouch for, by channel and counter."""
        return self._state.releases

    def release(self, name: str) -> ReleaseRecord:
        """One release by name, such as ``stable-3``.

        Raises:
            NotFoundError: there is none of that name; names those there are.
        """
        return self._state.release(name)

    def round(self) -> RoundDocument:
        """The round in force; sequence 0 before the first."""
        return self._state.round

    def versions(self) -> Mapping[str, int]:
        """The current version of each role."""
        return {expiry.role: expiry.version for expiry in self.expiries()}

    def expiries(self) -> tuple[Expiry, ...]:
        """When each role's file expires, soonest first."""
        rows = [
            Expiry(role, signed.version, signed.expires)
            for role, signed in self._state.signed.items()
        ]
        return tuple(sorted(rows, key=lambda row: row.expires))

    def locate(self, path: str) -> Path:
        """The file behind a path of the repository, an opaque key such as devices ask for.

        Raises:
            NotFoundError: nothing that is offered; the path is never followed outside.
        """
        folder, _, name = path.partition("/")
        known = path in self._state.payloads or (
            folder == "metadata" and _METADATA_NAME.match(name) is not None
        )
        file = self.folder / path
        if not known or not file.is_file():
            raise NotFoundError(f"the repository has no file {path[:200]!r}")
        return file

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of one file, from an offset on.

        Raises:
            NotFoundError: as for :meth:`locate`, or an offset behind the end.
        """
        file = self.locate(path)
        if not 0 <= offset <= file.stat().st_size:
            raise NotFoundError(f"{path[:200]!r} has no byte {offset}")
        with file.open("rb") as stream:
            stream.seek(offset)
            return stream.read(-1 if length is None else length)

    # What changes it

    def publish_release(self, metadata: bytes, payload: bytes, *, now: datetime) -> ReleaseRecord:
        """Take in a release that the adapter keys have signed.

        Doing the same again changes nothing, so that it can be repeated after a lost answer.

        Args:
            metadata: the signed ``adapters`` file of the next version, with one new release.
            payload: the bytes of that release.
            now: the time, with a zone.

        Raises:
            PublishError: too few good signatures, another version than the next, an old release
                changed, a counter used before, a payload that is not the signed one, or a
                release taken out that the current round hands out.
            StorageError: the disk refused; nothing has changed.
        """
        with self._lock:
            state = self._state
            incoming = check_adapters(state, metadata, payload, now)
            if incoming.repeated:
                return incoming.record
            self._commit(now, {ADAPTERS_ROLE: metadata}, {incoming.record.path: payload})
            return incoming.record

    def publish_round(self, document: RoundDocument, *, now: datetime) -> RoundDocument:
        """Order a round: sign the document with the online key and make it current.

        Doing the same again changes nothing.

        Args:
            document: its sequence must be above the current one (:meth:`round`).
            now: the time, with a zone.

        Raises:
            PublishError: an old sequence, or an assignment that the adapter keys have not signed.
            StorageError: the disk refused; nothing has changed.
        """
        with self._lock:
            state = self._state
            if document == state.round:
                return document
            if document.sequence <= state.round.sequence:
                raise PublishError(
                    f"round sequence={document.sequence} is not above the current "
                    f"{state.round.sequence}: take {state.round.sequence + 1}"
                )
            for assignment in document.assignments:
                state.check_assignment(assignment)
            version = state.signed[ROUNDS_ROLE].version + 1
            signed = roles.to_bytes(roles.rounds(document, version, now, self._key()))
            content = roles.round_bytes(document)
            path = payload_path(CURRENT_ROUND, hashlib.sha256(content).hexdigest())
            self._commit(now, {ROUNDS_ROLE: signed}, {path: content})
            return document

    def refresh_timestamp(self, now: datetime) -> None:
        """Date the timestamp anew; snapshot and rounds too when half of their life is over.

        To be called every quarter of the timestamp's life (:data:`federation.roles.LIFETIME`).

        Raises:
            StorageError: the disk refused; the old timestamp is still there.
        """
        with self._lock:
            state, changed = self._state, {}
            if _half_over(state, ROUNDS_ROLE, now):
                version = state.signed[ROUNDS_ROLE].version + 1
                again = roles.rounds(state.round, version, now, self._key())
                changed[ROUNDS_ROLE] = roles.to_bytes(again)
            self._commit(now, changed, {})

    def _commit(
        self, now: datetime, changed: Mapping[str, bytes], payloads: Mapping[str, bytes]
    ) -> None:
        """Payloads, roles, snapshot, and last of all the timestamp that makes them current."""
        online, state = self._key(), self._state
        version = {role: signed.version for role, signed in state.signed.items()}
        new: dict[str, bytes] = {f"{version[r] + 1}.{r}.json": data for r, data in changed.items()}
        snapshot, number = state.files["snapshot"], version["snapshot"]
        if changed or _half_over(state, "snapshot", now):
            number += 1
            covered = {
                role: (version[role] + (role in changed), changed.get(role, state.files[role]))
                for role in ("targets", ADAPTERS_ROLE, ROUNDS_ROLE)
            }
            snapshot = roles.to_bytes(roles.snapshot(covered, number, now, online))
            new[f"{number}.snapshot.json"] = snapshot
        new["timestamp.json"] = roles.to_bytes(
            roles.timestamp(number, snapshot, version["timestamp"] + 1, now, online)
        )
        try:
            for path, data in payloads.items():
                durable.write_bytes(self.folder / path, data)
            for name, data in new.items():
                durable.write_bytes(self.folder / "metadata" / name, data)
        finally:
            # The disk says what is current, also when the last write failed after its rename.
            self._state = load(self.folder)
        self._prune()

    def _prune(self) -> None:
        """Remove long superseded files; roots stay, for each one is a link of a chain."""
        for role in ("snapshot", ADAPTERS_ROLE, ROUNDS_ROLE):
            old = self._state.signed[role].version - OLD_VERSIONS_KEPT
            if old >= 1:
                (self.folder / "metadata" / f"{old}.{role}.json").unlink(missing_ok=True)

    def _key(self) -> Signer:
        if self._online is None:
            raise RepositoryError(f"{self.folder} was opened for reading: no online key was given")
        return self._online


def _half_over(state: Published, role: str, now: datetime) -> bool:
    remaining: timedelta = state.signed[role].expires - roles.in_seconds(now)
    return remaining < roles.LIFETIME[role] / 2
