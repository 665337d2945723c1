"""The loop that keeps a device on the right adapter, online or not.

    bundle -> trust.accept -> fetch -> decode -> guard -> slot -> load -> probe -> publish -> commit
           -> report

The agent holds one long-lived stream; metadata comes pushed, so nothing is polled. It decides
nothing about trust (``clients.trust``), nothing about quality (``clients.install``), and it imports
no framework: a device without torch, given another runtime, is the same agent. What it owns is the
life around these: connecting with jitter, trying later what may pass, telling each thing once, and
starting again from whatever a kill has left.

Threads: the one that calls :meth:`Agent.run` installs; a second one delivers reports, so that a
report does not wait for an install.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from aggregation.durable import StorageError
from clients.connection import Connection, ConnectionLost, Denied
from clients.health import measure as measure_health
from clients.install import Installer, InstallPolicy, Outcome
from clients.leaving import Leaving
from clients.link import Backoff
from clients.partial import is_full
from clients.probe import HeldOut
from clients.reporting import AgentStatus, Reporter
from clients.runtime import Runtime
from clients.slots import SlotDamaged, SlotRecord, Slots
from clients.telemetry import ReportQueue
from clients.trust import (
    DeviceFacts,
    Install,
    Rejected,
    SignedRelease,
    Stay,
    Trust,
    TrustStateError,
    Withdraw,
)
from protos.messages import DeviceEvent, MetadataBundle, RejectReason, Report, WatchRequest

log = logging.getLogger("airpeft.clients.agent")


# Whoever serves such metadata may be no server of ours: it must not get to confirm reports, least
# of all the one that tells of it.
IMPOSTOR = frozenset(
    {
        RejectReason.METADATA_SIGNATURE,
        RejectReason.METADATA_ROLLBACK,
        RejectReason.METADATA_MALFORMED,
    }
)


@dataclass(frozen=True, kw_only=True)
class AgentPolicy:
    """How an agent waits.

    Attributes:
        install: what is asked of a release.
        health_seconds: between two health reports.
        reconnect: bounds of the back-off after a lost link, seconds.
        later: bounds of the back-off before something that may pass is tried again, seconds.
    """

    install: InstallPolicy = field(default_factory=InstallPolicy)
    health_seconds: float = 300.0
    reconnect: tuple[float, float] = (0.5, 60.0)
    later: tuple[float, float] = (30.0, 3600.0)


class Agent:
    """One device's agent.

    Args:
        home: the device's home folder.
        device: what trust must know of this device.
        trust: judges metadata.
        slots: where releases lie.
        runtime: what serves them.
        queue: what is told to the fleet.
        connect: opens a connection; called again after each loss.
        held_out: the device's own labelled examples, if it has any.
        policy: see :class:`AgentPolicy`.
        now: the device's clock, with a zone.
        backoff: makes a back-off from its two bounds.
        on_report: is shown each report, for metrics.
    """

    def __init__(
        self,
        home: Path,
        *,
        device: DeviceFacts,
        trust: Trust,
        slots: Slots,
        runtime: Runtime,
        queue: ReportQueue,
        connect: Callable[[], Connection],
        held_out: HeldOut | None,
        policy: AgentPolicy,
        now: Callable[[], datetime],
        backoff: Callable[[float, float], Backoff],
        on_report: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self._home, self._device, self._trust = home, device, trust
        self._slots, self._queue, self._connect = slots, queue, connect
        self._policy, self._now, self._runtime = policy, now, runtime
        self._stop = threading.Event()
        self._connection: Connection | None = None
        self._reconnect, self._later = backoff(*policy.reconnect), backoff(*policy.later)
        self._due: tuple[str, float] | None = None  # what waits, and until when (monotonic)
        self._reporter = Reporter(
            home,
            queue,
            stop=self._stop,
            backoff=backoff(*policy.reconnect),
            health_seconds=policy.health_seconds,
            on_report=on_report,
        )
        self._installer = Installer(
            home,
            slots=slots,
            runtime=runtime,
            tell=self._reporter.tell,
            held_out=held_out,
            policy=policy.install,
            backoff=backoff(*policy.reconnect),
            stop=self._stop,
        )
        self._leaving = Leaving(trust, slots, runtime, self._installer, self._reporter)

    @property
    def status(self) -> AgentStatus:
        """What the agent knows of itself, for the local endpoint."""
        return self._reporter.status

    def start(self) -> None:
        """Serve what was committed last, and say so. Before :meth:`run`, once."""
        fit = self._leaving.before_start()
        version = self._installer.restore() if fit else self._runtime.pin()
        self._installer.tell_commit()
        self._reporter.tell(
            DeviceEvent.STARTED,
            release=version.name if version.digest else "",
            health=measure_health(self._home),
        )

    def run(self) -> None:
        """Stay connected and act on what comes, until :meth:`stop`."""
        reporter = threading.Thread(target=self._reporter.run, name="reports", daemon=True)
        reporter.start()
        while not self._stop.is_set():
            asked = 0.0
            try:
                self._listen()
            except ConnectionLost as lost:
                self._reporter.offline(str(lost))
                asked = lost.retry_after
            except Denied as denied:
                # Revoked, or a server that does not know us yet: serve on, ask rarely.
                self._reporter.offline(str(denied))
                asked = self._policy.reconnect[1]
            except Exception as error:
                # Whatever it is, what serves goes on serving, and the fleet hears of it.
                log.exception("the agent starts over")
                detail = f"{type(error).__name__}: {error}"
                self._reporter.tell_once(DeviceEvent.FAILED, detail=detail)
                self._reporter.offline(detail)
            if self._stop.wait(self._reconnect.next(asked)):
                break
        self._queue.arrived.set()
        reporter.join(timeout=5.0)

    def stop(self) -> None:
        """End :meth:`run` from another thread, at the next safe point."""
        self._stop.set()
        connection = self._connection
        if connection is not None:
            connection.close()

    def consider(self, bundle: MetadataBundle, connection: Connection) -> None:
        """Judge one bundle and do what it orders.

        Raises:
            ConnectionLost: while fetching; the bundle will come again with the next stream.
        """
        if self._due and not self._due[0]:
            self._due = None
        try:
            verdict = self._trust.accept(bundle, device=self._device, now=self._now())
        except Rejected as rejected:
            self._leave_revoked()
            if rejected.reason in IMPOSTOR:
                self._reporter.doubt(str(rejected))
            else:
                self._reporter.believe(connection)
            self._reporter.tell_once(
                DeviceEvent.REJECTED,
                reason=rejected.reason,
                release=rejected.release,
                rollout=rejected.rollout,
                round_sequence=rejected.sequence,
                detail=rejected.detail,
            )
            return
        except (TrustStateError, StorageError) as error:
            full = RejectReason.NO_SPACE if is_full(error.__cause__) else None
            self._reporter.tell_once(DeviceEvent.FAILED, reason=full, detail=str(error))
            self._due = ("", time.monotonic() + self._later.next())
            return
        self._reporter.believe(connection)
        self._leave_revoked()
        match verdict:
            case Stay(reason=reason):
                log.debug("stay: %s", reason)
            case Withdraw():
                self._withdraw(verdict)
            case Install(release=release):
                self._install(release, connection)

    def _leave_revoked(self) -> None:
        if not self._leaving.leave():
            self._due = ("", time.monotonic() + self._later.next())

    def _withdraw(self, order: Withdraw) -> None:
        if self._slots.state.active is not None:
            log.info("serving the base alone: %s", order.reason)
            self._installer.withdraw(order.rollout, order.sequence)
        else:
            self._reporter.tell_once(
                DeviceEvent.COMMITTED,
                release="",
                rollout=order.rollout,
                round_sequence=order.sequence,
                detail="already withdrawn",
            )

    def _install(self, release: SignedRelease, connection: Connection) -> None:
        active = self._active()
        if active is not None and active.sha256 == release.sha256:
            if active.rollout != release.rollout:
                self._reporter.tell_once(
                    DeviceEvent.COMMITTED,
                    release=release.name,
                    rollout=release.rollout,
                    round_sequence=release.sequence,
                    detail="already installed",
                )
            return
        if self._waits(release.sha256):
            return
        outcome = self._installer.install(
            _record(release),
            lambda offset: connection.fetch(release.path, offset),
            lambda: self._trust.remember_bad(release),
        )
        if outcome is Outcome.LATER:
            self._due = (release.sha256, time.monotonic() + self._later.next())
        else:
            self._later.reset()
            self._due = None

    # --- the link ---------------------------------------------------------------------------------

    def _listen(self) -> None:
        connection = self._connect()
        bundle: MetadataBundle | None = None
        self._connection = connection
        try:
            if self._stop.is_set():
                return
            for event in connection.watch(self._watch_request()):
                if not self.status.online:
                    self._reconnect.reset()
                    self._reporter.online()
                if isinstance(event, MetadataBundle):
                    bundle = event
                    self.consider(bundle, connection)
                elif bundle is not None and self._due and not self._waits(self._due[0]):
                    self.consider(bundle, connection)
        finally:
            self._connection = None
            self._reporter.offline(self.status.link)
            connection.close()

    def _watch_request(self) -> WatchRequest:
        active = self._active()
        state = self._trust.state
        return WatchRequest(
            timestamp_version=state.version("timestamp"),
            root_version=state.root,
            running_release=active.release if active else "",
        )

    def _active(self) -> SlotRecord | None:
        try:
            return self._slots.active()
        except SlotDamaged as error:
            log.error("%s", error)
            return None

    def _waits(self, sha256: str) -> bool:
        return self._due is not None and self._due[0] == sha256 and time.monotonic() < self._due[1]


def _record(release: SignedRelease) -> SlotRecord:
    return SlotRecord(
        release=release.name,
        channel=release.channel,
        counter=release.counter,
        target=release.target,
        sha256=release.sha256,
        length=release.length,
        plain_length=release.plain_length,
        adapter_digest=release.adapter_digest,
        spec_digest=release.spec_digest,
        base_digest=release.base_digest,
        rollout=release.rollout,
        round_sequence=release.sequence,
    )
