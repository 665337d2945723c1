"""Leaving a release that the adapter keys have revoked, whatever the current round says.

The release before it serves again if it is still in its slot and nothing is said against it, else
the base model alone. That lies below every floor, and still it is what the adapter keys have asked
for: a floor keeps a stolen online key from going back, and this is not the online key's word.

The change on disk comes first: a device that is killed here starts without the revoked release.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from aggregation.durable import StorageError
from clients.health import NoSpace
from clients.partial import is_full
from clients.runtime import AdapterVersion, Runtime
from clients.slots import SlotDamaged, SlotRecord, Slots
from clients.trust import Trust
from protos.messages import DeviceEvent, RejectReason

log = logging.getLogger("airpeft.clients.leaving")


class Installing(Protocol):
    """What an installer offers here; see :class:`clients.install.Installer`."""

    def restore(self) -> AdapterVersion:
        """Load and publish what the slots say is active."""

    def tell_commit(self) -> None:
        """Report what the slots have committed."""


class Telling(Protocol):
    """What a reporter offers here; see :class:`clients.reporting.Reporter`."""

    def tell(self, event: DeviceEvent, **fields: Any) -> bool:
        """Report an event; whether it is on disk already."""

    def tell_once(self, event: DeviceEvent, **fields: Any) -> None:
        """Report it, unless that has been done."""


class Leaving:
    """Watches over what serves.

    Args:
        trust: knows what is revoked.
        slots: where releases lie.
        runtime: what serves them.
        installer: loads and publishes.
        reporter: tells the fleet.
    """

    def __init__(
        self,
        trust: Trust,
        slots: Slots,
        runtime: Runtime,
        installer: Installing,
        reporter: Telling,
    ) -> None:
        self._trust, self._slots, self._runtime = trust, slots, runtime
        self._installer, self._reporter = installer, reporter

    def before_start(self) -> bool:
        """Leave it on disk, before anything is loaded; whether what is on disk may be loaded.

        If the disk refuses, rather the base model alone serves than what is revoked.
        """
        try:
            self._step_back()
        except (StorageError, NoSpace) as error:
            self._reporter.tell(
                DeviceEvent.FAILED, reason=_reason(error), detail=f"at start: {error}"
            )
            return False
        return True

    def leave(self) -> bool:
        """Leave what serves, if it is revoked; False if the disk refuses, and it serves on."""
        try:
            if not self._step_back():
                return True
        except (StorageError, NoSpace) as error:
            detail = f"a revoked release serves: {error}"
            self._reporter.tell_once(DeviceEvent.FAILED, reason=_reason(error), detail=detail)
            return False
        serving = self._runtime.pin()
        if self._slots.state.active is None:
            self._runtime.publish(None)
        else:
            self._installer.restore()
        self._runtime.unload(serving)
        self._installer.tell_commit()
        return True

    def _step_back(self) -> bool:
        active = _record(self._slots.active)
        why = self._trust.revoked(active.sha256) if active is not None else None
        if active is None or why is None:
            return False
        before = _record(self._slots.previous)
        usable = before is not None and self._may_serve(before)
        order = {"rollout": active.rollout, "round_sequence": active.round_sequence}
        if before is not None and usable:
            self._slots.fall_back({**order, "release": before.release})
        else:
            self._slots.withdraw({**order, "release": ""})
        name = before.release if before is not None and usable else "the base model"
        log.warning("revoked: %s; %s serves instead", why, name)
        self._reporter.tell(
            DeviceEvent.REVERTED,
            release=active.release,
            reason=RejectReason.KNOWN_BAD,
            detail=f"revoked by the adapter keys: {why}; {name} serves instead",
            **order,
        )
        return True

    def _may_serve(self, record: SlotRecord) -> bool:
        state = self._trust.state
        said = record.sha256 in state.revoked or record.sha256 in state.bad
        floor = state.floors.get(record.channel, 0)
        fits = record.base_digest == self._runtime.base_digest
        return fits and not said and record.counter >= floor


def _reason(error: Exception) -> RejectReason | None:
    return RejectReason.NO_SPACE if is_full(error) else None


def _record(read: Callable[[], SlotRecord | None]) -> SlotRecord | None:
    try:
        return read()
    except SlotDamaged as error:
        log.error("%s", error)
        return None
