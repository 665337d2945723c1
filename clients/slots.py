"""Two slots for releases, and a state file that says which one serves.

The idle slot is written and tried while the active one serves; a commit is one atomic rename of
``state.json``. Whatever is killed whenever: ``active()`` is the release last committed, whole, and
a download goes on at the byte where it stopped. Folder::

    slots/state.json              {"active", "previous", "trial", "attempts"}; the only pointer
    slots/{a,b}/release.json      what is in the slot
    slots/{a,b}/payload           the signed bytes, exactly; what was encrypted stays encrypted
    slots/partial/<sha256>.part   a download; appended unbuffered, so a SIGKILL loses no byte

    partial = slots.partial(record.sha256, record.length)
    partial.append(chunk) ...; data = partial.finish()        # hash and length as signed
    slots.stage(record, data)
    slots.attempt()                                           # counted before anything is loaded
    slots.commit()  or  slots.revert()

It knows nothing of adapters, signatures or the network. One process per folder (the device's lock).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from aggregation.durable import StorageError, write_bytes, write_folder
from clients.errors import ClientError
from clients.partial import Partial, storage_error
from clients.slot_record import SlotRecord, SlotState

__all__ = ["FOLDER", "SlotDamaged", "SlotRecord", "SlotState", "Slots"]

log = logging.getLogger("airpeft.clients.slots")

FOLDER = "slots"
_NAMES = ("a", "b")


class SlotDamaged(ClientError):  # noqa: N818
    """A slot's content is not what was committed (a failing disk, a stranger's edit)."""


class Slots:
    """The two slots of one device."""

    def __init__(self, home: Path) -> None:
        self._folder = home / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._state = self._read_state()

    @property
    def state(self) -> SlotState:
        """The pointers as they are on disk."""
        return self._state

    def partial(self, sha256: str, length: int) -> Partial:
        """The download of a payload, new or begun by an earlier process."""
        return Partial(self._folder / "partial" / f"{sha256}.part", sha256, length)

    def active(self) -> SlotRecord | None:
        """The release last committed; None before the first, when the base serves alone."""
        return None if self._state.active is None else self._record(self._state.active)

    def trial(self) -> SlotRecord | None:
        """The release that was staged and neither committed nor reverted."""
        return None if self._state.trial is None else self._record(self._state.trial)

    def find(self, sha256: str) -> SlotRecord | None:
        """What is known of a payload that lies, or lay, in one of the slots."""
        for slot in _NAMES:
            try:
                record = self._record(slot)
            except SlotDamaged:
                continue
            if record.sha256 == sha256:
                return record
        return None

    def previous(self) -> SlotRecord | None:
        """The release that served before, if it is still whole."""
        return None if self._state.previous is None else self._record(self._state.previous)

    def holds(self, sha256: str) -> bool:
        """Whether the idle slot has this very payload, whole: no need to fetch it again."""
        try:
            idle = self._idle()
            return self._record(idle).sha256 == sha256 and bool(self._payload(idle))
        except SlotDamaged:
            return False

    def stage(self, record: SlotRecord, data: bytes | None = None) -> None:
        """Put a release into the idle slot, on trial.

        Args:
            record: its facts.
            data: its payload; None where :meth:`holds` said that it is there.

        Raises:
            NoSpace: the disk is full; the active slot is untouched.
            StorageError: another failure to write.
            SlotDamaged: no data given and the slot does not hold it.
        """
        idle = self._idle()
        if data is None:
            data = self._payload(idle)
        _check_payload(record, data)
        # The idle slot stops being a place to fall back to before its content changes.
        if self._state.previous is not None or self._state.trial is not None:
            self._write_state(replace(self._state, previous=None, trial=None, attempts=0))
        try:
            files = {"release.json": record.to_bytes(), "payload": data}
            write_folder(self._folder / idle, files)
        except StorageError as error:
            raise storage_error(self._folder / idle, error.__cause__) from error
        self._write_state(replace(self._state, trial=idle))
        self.partial(record.sha256, record.length).discard()

    def attempt(self) -> int:
        """Count, durably, one more try of the release on trial; hand out the number of tries.

        A release that kills the process that loads it is found by this count after the restart.
        """
        self._write_state(replace(self._state, attempts=self._state.attempts + 1))
        return self._state.attempts

    def idle_payload(self) -> bytes:
        """The bytes in the idle slot, hash checked again.

        Raises:
            SlotDamaged: there is nothing whole.
        """
        return self._payload(self._idle())

    def trial_payload(self) -> bytes:
        """The bytes on trial, hash checked again.

        Raises:
            SlotDamaged: there is no trial, or its content has changed.
        """
        if self._state.trial is None:
            raise SlotDamaged("no release is on trial")
        return self._payload(self._state.trial)

    def active_payload(self) -> bytes:
        """The committed bytes, hash checked again.

        Raises:
            SlotDamaged: there is none, or its content has changed.
        """
        if self._state.active is None:
            raise SlotDamaged("no release is committed")
        return self._payload(self._state.active)

    def commit(self, untold: Mapping[str, Any] | None = None) -> None:
        """Make the release on trial the active one: one atomic rename.

        Args:
            untold: kept with the commit until :meth:`told`, so that no kill can lose its report.

        Raises:
            SlotDamaged: there is no trial.
            NoSpace: the state could not be written; the old release is still the active one.
            StorageError: another failure to write.
        """
        if self._state.trial is None:
            raise SlotDamaged("no release is on trial")
        old = self._state
        self._write_state(SlotState(active=old.trial, previous=old.active, untold=untold))
        shutil.rmtree(self._folder / "partial", ignore_errors=True)

    def told(self) -> None:
        """The report of the last commit is in the queue."""
        if self._state.untold is not None:
            self._write_state(replace(self._state, untold=None))

    def withdraw(self, untold: Mapping[str, Any] | None = None) -> None:
        """From now on the base serves alone; what was active stays whole, for coming back."""
        old = self._state
        self._write_state(SlotState(previous=old.active or old.previous, untold=untold))

    def revert(self) -> None:
        """End the trial; the active release goes on as if nothing had been."""
        self._write_state(replace(self._state, trial=None, attempts=0))

    def fall_back(self, untold: Mapping[str, Any] | None = None) -> SlotRecord | None:
        """Give up the active slot for the one that served before; None: the base alone."""
        self._write_state(SlotState(active=self._state.previous, untold=untold))
        return self.active()

    # --- files ------------------------------------------------------------------------------------

    def _idle(self) -> str:
        # Without an active slot, the one that served before is looked at, and replaced, first.
        if self._state.active is None:
            return self._state.previous or "a"
        return "b" if self._state.active == "a" else "a"

    def _record(self, slot: str) -> SlotRecord:
        try:
            return SlotRecord(**json.loads((self._folder / slot / "release.json").read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise SlotDamaged(f"{self._folder / slot / 'release.json'}: {error}") from None

    def _payload(self, slot: str) -> bytes:
        record = self._record(slot)
        try:
            data = (self._folder / slot / "payload").read_bytes()
        except OSError as error:
            raise SlotDamaged(f"{self._folder / slot / 'payload'}: {error.strerror}") from None
        _check_payload(record, data)
        return data

    def _read_state(self) -> SlotState:
        path = self._folder / "state.json"
        if not path.exists():
            return SlotState()
        try:
            state = SlotState(**json.loads(path.read_bytes()))
            slots = {state.active, state.previous, state.trial} - {None}
            if not slots <= set(_NAMES) or type(state.attempts) is not int:
                raise ValueError(f"unknown slot in {state}")
        except (ValueError, TypeError) as error:
            log.error("%s is damaged (%s): starting from the base model alone", path, error)
            return SlotState()
        return state

    def _write_state(self, state: SlotState) -> None:
        try:
            write_bytes(
                self._folder / "state.json", json.dumps(asdict(state), sort_keys=True).encode()
            )
        except StorageError as error:
            raise storage_error(self._folder / "state.json", error.__cause__) from error
        self._state = state


def _check_payload(record: SlotRecord, data: bytes) -> None:
    if len(data) != record.length or hashlib.sha256(data).hexdigest() != record.sha256:
        raise SlotDamaged(f"{record.release}: the payload is not the signed one")
