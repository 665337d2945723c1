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

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from aggregation import durable
from federation import roles
from federation.admission import check_adapters, check_standing
from federation.commit import ABSURD, finish, half_over, next_files, write
from federation.founding import first_files, round_file
from federation.key_admission import check_keys, next_round
from federation.keys import THRESHOLD, Signer
from federation.metadata_files import load
from federation.published import (
    Expiry,
    NotFoundError,
    Published,
    PublishError,
    ReleaseRecord,
    RepositoryError,
)
from federation.reading import Reading
from protos.signed import ROUNDS_ROLE, Revocation, RoundDocument

__all__ = [
    "Expiry",
    "NotFoundError",
    "PublishError",
    "ReleaseRecord",
    "Repository",
    "RepositoryError",
]

OLD_VERSIONS_KEPT = 16


class Repository(Reading):
    """A repository folder; with the online key it can be changed.

    Args:
        folder: what :meth:`create` made.
        online: the online key; None for reading alone.

    Raises:
        RepositoryError: there is no repository, a file is missing or does not verify, or the
            online key is not the one that its root names.
    """

    def __init__(self, folder: Path, online: Signer | None = None) -> None:
        if online is not None:
            finish(folder)
        super().__init__(folder)
        self._online = online
        self._lock = threading.RLock()
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
            known = state.with_verified(incoming.role, metadata, incoming.parsed)
            paths = {incoming.record.path: payload}
            self._commit(now, {incoming.role: metadata}, paths, known=known)
            return incoming.record

    def publish_standing(self, metadata: bytes, *, now: datetime) -> tuple[Revocation, ...]:
        """Take in revocations and floors that the adapter keys have signed.

        Doing the same again changes nothing.

        Args:
            metadata: the signed file of the next version, with the same releases and a standing
                that says more than before.
            now: the time, with a zone.

        Returns:
            What is revoked by it.

        Raises:
            PublishError: too few good signatures, another version than the next, a new release in
                it, or something taken back that was said before.
            StorageError: the disk refused; nothing has changed.
        """
        with self._lock:
            incoming = check_standing(self._state, metadata, now)
            if not incoming.repeated:
                known = self._state.with_verified(incoming.role, metadata, incoming.parsed)
                self._commit(now, {incoming.role: metadata}, {}, known=known)
            return incoming.new

    def publish_keys(
        self,
        files: Mapping[str, bytes],
        *,
        now: datetime,
        online: Callable[[str], Signer],
        hold: bool = False,
    ) -> None:
        """Take in a change of keys, signed by old and new keys as devices will ask for it.

        Doing the same again changes nothing.

        Args:
            files: the signed files that change, by role.
            now: the time, with a zone.
            online: finds the online key by its identifier, should it be replaced.
            hold: let every device stay as it is until the next round, whatever the current one
                says; for a key that was in wrong hands.

        Raises:
            PublishError: see :func:`federation.key_admission.check_keys`.
            KeyFileError: the new online key is not here.
            StorageError: the disk refused; nothing has changed, or the change is finished when the
                repository is opened again.
        """
        with self._lock:
            state = self._state
            incoming = check_keys(state, files, now)
            if incoming.repeated:
                return
            if self._online is None or self._online.public_key.keyid != incoming.online:
                self._online = online(incoming.online)
            changed = {role: data for role, data in files.items() if role != "root"}
            payloads: dict[str, bytes] = {}
            if incoming.new_online or hold:
                document = next_round(state.round, hold=hold)
                number = state.signed[ROUNDS_ROLE].version + 1
                number = 1 if incoming.new_online and number > ABSURD else number
                signed = roles.rounds(document, number, now, self._key())
                changed[ROUNDS_ROLE] = roles.to_bytes(signed)
                payloads = round_file(document)
            self._commit(now, changed, payloads, root=files.get("root"), anew=incoming.new_online)

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
            self._commit(now, {ROUNDS_ROLE: signed}, round_file(document))
            return document

    def refresh_timestamp(self, now: datetime) -> None:
        """Date the timestamp anew; snapshot and rounds too when half of their life is over.

        To be called every quarter of the timestamp's life (:data:`federation.roles.LIFETIME`).

        Raises:
            StorageError: the disk refused; the old timestamp is still there.
        """
        with self._lock:
            state, changed = self._state, {}
            if half_over(state, ROUNDS_ROLE, now):
                version = state.signed[ROUNDS_ROLE].version + 1
                again = roles.rounds(state.round, version, now, self._key())
                changed[ROUNDS_ROLE] = roles.to_bytes(again)
            self._commit(now, changed, {})

    def _commit(
        self,
        now: datetime,
        changed: Mapping[str, bytes],
        payloads: Mapping[str, bytes],
        *,
        root: bytes | None = None,
        anew: bool = False,
        known: Published | None = None,
    ) -> None:
        """Payloads, roles, snapshot, and last of all the timestamp that makes them current."""
        new = next_files(self._state, changed, now=now, online=self._key(), root=root, anew=anew)
        try:
            write(self.folder, payloads, new)
        finally:
            # The disk says what is current, also when the last write failed after its rename.
            self._state = load(self.folder, known or self._state).following(self._state)
        self._prune()

    def _prune(self) -> None:
        """Remove long superseded files; roots stay, for each one is a link of a chain."""
        for role in ("snapshot", *self._state.adapter_roles, ROUNDS_ROLE):
            old = self._state.signed[role].version - OLD_VERSIONS_KEPT
            if old >= 1:
                (self.folder / "metadata" / f"{old}.{role}.json").unlink(missing_ok=True)

    def _key(self) -> Signer:
        if self._online is None:
            raise RepositoryError(f"{self.folder} was opened for reading: no online key was given")
        return self._online
