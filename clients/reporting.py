"""Telling the fleet: each thing once, in order, whether or not there is a link or a disk.

A report goes to the queue on disk at once and to the server when there is a connection; the thread
that runs :meth:`Reporter.run` does the sending, so that an install never waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregation.durable import StorageError
from clients.connection import Connection, ConnectionLost, Denied
from clients.health import measure
from clients.link import Backoff
from clients.telemetry import ReportQueue
from protos.messages import DeviceEvent, RejectReason, Report

log = logging.getLogger("airpeft.clients.reporting")

_UNWRITTEN = 64  # reports held in memory while the disk takes none
_REMEMBERED = 256  # things said, so as not to say them again


@dataclass
class AgentStatus:
    """What the agent knows of itself; read by the local endpoint.

    Attributes:
        online: whether the stream to the fleet lives.
        link: why it does not, or empty.
        last_event: the last thing reported, but for health.
        last_reason: its reason, or empty.
        last_detail: its detail, or empty.
        waiting: why a release that is downloaded is not loaded yet, or empty.
    """

    online: bool = False
    link: str = "not connected yet"
    last_event: str = ""
    last_reason: str = ""
    last_detail: str = ""
    waiting: str = ""


class Reporter:
    """The voice of one device.

    Args:
        home: where health is measured.
        queue: reports on disk.
        stop: ends :meth:`run`; set ``queue.arrived`` after it.
        backoff: waits after a failed delivery.
        health_seconds: between two health reports.
        on_report: is shown each report, for metrics.
    """

    def __init__(
        self,
        home: Path,
        queue: ReportQueue,
        *,
        stop: threading.Event,
        backoff: Backoff,
        health_seconds: float,
        on_report: Callable[[Report], None],
    ) -> None:
        self.status = AgentStatus()
        self._home, self._queue, self._stop, self._backoff = home, queue, stop, backoff
        self._health_seconds, self._on_report = health_seconds, on_report
        self._connection: Connection | None = None
        self._told: deque[tuple[Any, ...]] = deque(maxlen=_REMEMBERED)
        self._unwritten: deque[tuple[DeviceEvent, dict[str, Any]]] = deque(maxlen=_UNWRITTEN)

    def tell(self, event: DeviceEvent, **fields: Any) -> bool:
        """Put one report into the queue; the fields are those of a :class:`Report`.

        Returns:
            Whether it is on disk; otherwise it waits in memory until the disk takes writes again.
        """
        reason: RejectReason | None = fields.get("reason")
        if event is not DeviceEvent.HEALTH:
            self.status.last_event = event.value
            self.status.last_reason = reason.value if reason else ""
            self.status.last_detail = str(fields.get("detail", ""))
            log.info("%s %s %s", event.value, fields.get("release", ""), reason or "")
        try:
            self._on_report(self._queue.put(event, **fields))
        except StorageError as error:
            # The very disk that failed; said when it takes writes again.
            log.error("a report cannot be kept on disk: %s", error)
            self._unwritten.append((event, fields))
            return False
        return True

    def tell_once(self, event: DeviceEvent, **fields: Any) -> None:
        """Bundles come again with every new timestamp; what was said of them is said once."""
        key = (event, fields.get("release"), fields.get("rollout"), fields.get("reason"))
        if key not in self._told:
            self._told.append(key)
            self.tell(event, **fields)

    def online(self) -> None:
        """There is a link; whether reports may take it is still to be seen."""
        if not self.status.online:
            log.info("connected")
        self.status.online, self.status.link = True, ""

    def believe(self, connection: Connection) -> None:
        """What the server hands out verifies: reports go to it."""
        # Metadata that was refused before is news again, should it come again.
        refused = [key for key in self._told if key[0] is DeviceEvent.REJECTED and not key[1]]
        for key in refused:
            self._told.remove(key)
        if self._connection is not connection:
            self._connection = connection
            self.status.link = ""  # whatever doubt there was
            self._queue.arrived.set()

    def doubt(self, why: str) -> None:
        """What the server hands out is not the fleet's: it gets no reports to swallow."""
        self._connection = None
        self.status.link = why

    def offline(self, why: str) -> None:
        """There is none, and why."""
        if not self._stop.is_set() and self.status.link != why:
            log.warning("offline: %s", why)
        self._connection = None
        self.status.online, self.status.link = False, why

    def run(self) -> None:
        """Send what is pending whenever there is a link, until ``stop``."""
        health_due = time.monotonic() + self._health_seconds
        while not self._stop.is_set():
            self._queue.arrived.wait(max(0.0, health_due - time.monotonic()))
            if self._stop.is_set():
                return
            if time.monotonic() >= health_due:
                health_due = time.monotonic() + self._health_seconds
                self.tell(DeviceEvent.HEALTH, health=measure(self._home))
            for _ in range(len(self._unwritten)):
                event, fields = self._unwritten.popleft()
                self.tell(event, **fields)
            self._queue.arrived.clear()
            connection = self._connection
            if connection is None:
                continue  # coming online sets the event again
            try:
                self._queue.deliver(connection.report)
                self._backoff.reset()
            except (ConnectionLost, Denied, StorageError) as error:
                log.info("reports wait: %s", error)
                self._stop.wait(self._backoff.next(getattr(error, "retry_after", 0.0)))
                self._queue.arrived.set()
