"""What the device did, kept on disk until the server has it.

A report is signed and durable before anything else happens, numbered without reuse, sent in
batches as often as it takes, and deleted only when the server says that it is durable there: it
arrives whether or not the link, the server or this process lives at the time. Folder::

    telemetry/000000000017-committed.report   one signed report (SignedReport of fleet.proto)
    telemetry/acked.json                      {"through": n}: numbers up to n are never used again

It knows nothing of connections: :meth:`ReportQueue.deliver` is given the sending function.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from aggregation.durable import StorageError, write_bytes
from clients.errors import ClientError
from protos.errors import WireError
from protos.generated import fleet_pb2
from protos.messages import (
    DeviceEvent,
    Report,
    SignedReport,
    decode_report,
    encode_report,
    from_wire,
    to_wire,
)

log = logging.getLogger("airpeft.clients.telemetry")

FOLDER = "telemetry"
SUFFIX = ".report"
BATCH = 64
LIMIT = 4096
SKIP_MAX = 2**40  # numbers; a server that lies must not use them all up
Send = Callable[[Sequence[SignedReport]], int]


class TelemetryError(ClientError):
    """The queue on disk contradicts itself; the message says what to remove."""


class BatchRefused(ClientError):  # noqa: N818
    """The server will never take one of these reports, however often it is sent."""


class ReportQueue:
    """The reports of one device that the server has not confirmed. Safe for several threads.

    Args:
        home: the device's home folder.
        device_id: goes into every report.
        sign: signs a report's exact bytes with the device's key.
        now_ms: Unix time in milliseconds.
        limit: reports kept while offline; beyond it the oldest health reports go first, then the
            oldest of all: the numbering shows the gap.
    """

    def __init__(
        self,
        home: Path,
        *,
        device_id: str,
        sign: Callable[[bytes], bytes],
        now_ms: Callable[[], int],
        limit: int = LIMIT,
    ) -> None:
        self._folder = home / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._device_id, self._sign, self._now_ms, self._limit = device_id, sign, now_ms, limit
        self._lock = threading.Lock()
        self.arrived = threading.Event()
        self._through = self._read_through()
        self._last = max([self._through, *(_number(path) for path in self._paths())])
        if self.pending():
            self.arrived.set()

    def put(self, event: DeviceEvent, **fields: Any) -> Report:
        """Number, sign and keep one report, durably.

        Args:
            event: what happened.
            **fields: other fields of :class:`protos.messages.Report`.

        Raises:
            StorageError: it could not be written; its number is not used up.
            WireError: a field is out of bounds.
        """
        fields["detail"] = str(fields.get("detail", "")).replace("\0", " ")
        with self._lock:
            report = Report(
                device_id=self._device_id,
                sequence=self._last + 1,
                time_unix_ms=self._now_ms(),
                event=event,
                **fields,
            )
            self._write(report)
            self._drop_excess()
        self.arrived.set()
        return report

    def pending(self) -> int:
        """Number of reports that the server has not confirmed."""
        return len(self._paths())

    def deliver(self, send: Send, *, batch: int = BATCH) -> int:
        """Send everything that is pending, oldest first; hand out how many were confirmed.

        Args:
            send: sends one batch and returns ``accepted_through``; its errors come through, and
                whatever was not confirmed stays.
            batch: reports in one call.
        """
        confirmed, renumbered = 0, False
        while True:
            self.arrived.clear()
            paths = self._paths()[:batch]
            if not paths:
                return confirmed
            signed = [item for item in map(self._read, paths) if item is not None]
            try:
                through = send(signed) if signed else _number(paths[-1])
            except BatchRefused as error:
                if len(paths) > 1:
                    batch = 1  # find the one
                    continue
                log.error("the server does not take %s: dropped: %s", paths[0].name, error)
                through = _number(paths[0])
            if not renumbered and self._last < through <= self._last + SKIP_MAX:
                renumbered = True
                self._renumber(through)
                continue
            # A server cannot confirm what it was not sent.
            done = self._confirm(min(through, _number(paths[-1])))
            confirmed += done
            if done == 0:
                return confirmed

    # --- files ------------------------------------------------------------------------------------

    def _write(self, report: Report) -> None:
        """Sign a report and keep it, with the lock held."""
        body = encode_report(report)
        decode_report(body)  # what a server would refuse must not block the queue
        signed = to_wire(SignedReport(body=body, signature=self._sign(body)))
        path = self._folder / f"{report.sequence:012d}-{report.event.value}{SUFFIX}"
        try:
            write_bytes(path, signed.SerializeToString())
        except StorageError:
            # Renamed, it may be, and not synced: two reports must not share its number.
            if not _removed(path):
                self._last = report.sequence
            raise
        self._last = report.sequence

    def _renumber(self, through: int) -> None:
        """The server has seen higher numbers than this disk knows: it was restored from a copy.

        What was sent under numbers of long ago had no effect. So all that is pending goes out once
        more, numbered from there on; a kill in between sends some of it under both numbers, of
        which the lower one has no effect either.
        """
        log.warning("the server has reports up to %d of this device: numbered anew", through)
        with self._lock:
            self._last = max(self._last, through)
            for path in self._paths():
                item = self._read(path)
                if item is not None:
                    self._write(replace(decode_report(item.body), sequence=self._last + 1))
                path.unlink(missing_ok=True)

    def _confirm(self, through: int) -> int:
        with self._lock:
            done = [path for path in self._paths() if _number(path) <= through]
            if not done:
                return 0
            # First the mark, then the deletion: no kill between them can free a number for reuse.
            write_bytes(self._folder / "acked.json", json.dumps({"through": through}).encode())
            self._through = through
            for path in done:
                path.unlink(missing_ok=True)
            return len(done)

    def _drop_excess(self) -> None:
        paths = self._paths()
        excess = len(paths) - self._limit
        if excess > 0:
            health = f"-{DeviceEvent.HEALTH.value}{SUFFIX}"
            paths.sort(key=lambda path: (not path.name.endswith(health), _number(path)))
            for path in paths[:excess]:
                path.unlink(missing_ok=True)
            log.warning("%d old reports dropped: offline for long, %d are kept", excess, len(paths))

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob(f"[0-9]*{SUFFIX}"))

    def _read(self, path: Path) -> SignedReport | None:
        """A report from disk; None if it is damaged, or of a name that this device had before."""
        try:
            signed: SignedReport = from_wire(fleet_pb2.SignedReport.FromString(path.read_bytes()))
            name = decode_report(signed.body).device_id
        except (WireError, DecodeError, OSError) as error:
            log.error("%s cannot be read (%s): it is not sent", path, error)
            return None
        return signed if name == self._device_id else None

    def _read_through(self) -> int:
        path = self._folder / "acked.json"
        if not path.exists():
            return 0
        try:
            return int(json.loads(path.read_bytes())["through"])
        except (ValueError, KeyError, TypeError) as error:
            raise TelemetryError(
                f"{path} is damaged ({error!r}): enrol the device again, so that report numbers "
                "start afresh under a new name"
            ) from None


def _removed(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])
