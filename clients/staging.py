"""Bringing a release's bytes into the idle slot: fetch, decode, guard, stage.

Nothing that serves is touched. What goes wrong leaves as a :class:`~clients.inspection.Refusal`;
:mod:`clients.install` has the table of them.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Protocol

from aggregation.adapter import Adapter
from clients.connection import Denied
from clients.content_keys import ContentKeys
from clients.download import Download, obtain
from clients.health import require_space
from clients.inspection import Refusal, open_payload
from clients.install_policy import InstallPolicy
from clients.link import Backoff
from clients.partial import PayloadMismatch
from clients.runtime import Runtime
from clients.slots import SlotDamaged, SlotRecord, Slots
from protos.messages import DeviceEvent, RejectReason


class TellOf(Protocol):
    """Says what has become of one release."""

    def __call__(self, record: SlotRecord, event: DeviceEvent, **fields: Any) -> None:
        """Put one report in the queue; ``fields`` are those of :class:`protos.messages.Report`."""


class Stager:
    """Stages releases on one device.

    Args:
        home: where the disk is measured.
        slots: the two slots.
        runtime: the engine that the adapter must fit.
        keys: opens the content keys of encrypted payloads.
        policy: see :class:`~clients.install_policy.InstallPolicy`.
        backoff: waits between cuts of a download.
        stop: set when the process should end.
        report: reports.
    """

    def __init__(
        self,
        home: Path,
        *,
        slots: Slots,
        runtime: Runtime,
        keys: ContentKeys,
        policy: InstallPolicy,
        backoff: Backoff,
        stop: threading.Event,
        report: TellOf,
    ) -> None:
        self._home, self._slots, self._runtime = home, slots, runtime
        self._keys, self._policy, self._backoff, self._stop = keys, policy, backoff, stop
        self._report = report

    def stage(self, record: SlotRecord, download: Download) -> int:
        """Fetch, decode and guard; then into the idle slot.

        Returns:
            The bytes that had to be fetched; those of a payload that an earlier process staged
            count as fetched.

        Raises:
            ConnectionLost: the link is gone; what was fetched stays.
            NoSpace: the disk is too full for it.
            Refusal: the payload is not had, not as signed, or not fit; whether for ever, it says.
            StorageError: another failure to write.
        """
        slots = self._slots
        if slots.state.trial is not None:
            try:
                trial = slots.trial()
                if trial and trial.sha256 == record.sha256 and slots.trial_payload():
                    return record.length  # an earlier process came this far
            except SlotDamaged:
                slots.revert()
        if slots.holds(record.sha256):
            data = None
            self.open(record, slots.idle_payload())
        else:
            data = self._obtain(record, download)
            self._report(record, DeviceEvent.DOWNLOADED, payload_bytes=record.length)
            self.open(record, data)
        slots.stage(record, data)
        self._report(record, DeviceEvent.STAGED)
        return len(data) if data is not None else 0

    def open(self, record: SlotRecord, data: bytes) -> Adapter:
        """Decode and guard a payload whose hash is as signed.

        Raises:
            Refusal: it does not open, does not decode, or is not fit for this device.
        """
        key = self._keys.open(record) if record.key_check else b""
        return open_payload(record, data, self._runtime, self._policy.guard, key)

    def _obtain(self, record: SlotRecord, download: Download) -> bytes:
        if record.length > self._policy.max_payload_bytes:
            raise Refusal(
                DeviceEvent.REJECTED,
                RejectReason.GUARD,
                f"the payload has {record.length} bytes, at most {self._policy.max_payload_bytes}",
            )
        partial = self._slots.partial(record.sha256, record.length)
        require_space(self._home, 2 * record.length - partial.offset)
        try:
            tries = self._policy.fetch_tries
            return obtain(partial, download, backoff=self._backoff, stop=self._stop, tries=tries)
        except PayloadMismatch as error:
            # Not the release's fault but its carrier's: an honest one may bring it yet.
            reason = RejectReason.PAYLOAD_DIGEST
            raise Refusal(DeviceEvent.REJECTED, reason, str(error), final=False) from error
        except Denied as error:
            detail = f"the server does not hand out the payload: {error}"
            raise Refusal(DeviceEvent.FAILED, None, detail, final=False) from error
