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
from datetime import datetime
from pathlib import Path
from typing import Any

from aggregation.durable import StorageError
from clients.agent_policy import AgentPolicy
from clients.connection import Connection, ConnectionLost, Denied
from clients.content_keys import ContentKeys
from clients.health import NoSpace
from clients.health import measure as measure_health
from clients.install import Installer, Outcome
from clients.leaving import Leaving
from clients.link import Backoff
from clients.partial import is_full
from clients.permission import Permission, Wait
from clients.probe import HeldOut
from clients.reporting import AgentStatus, Reporter
from clients.runtime import Runtime
from clients.slots import SlotDamaged, SlotRecord, Slots
from clients.sources import Sources
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

ASK_AGAIN = 60.0  # seconds; clocks are set and windows move, so nobody sleeps through to the end

log = logging.getLogger("airpeft.clients.agent")

__all__ = ["Agent", "AgentPolicy"]

# Whoever serves such metadata may be no server of ours: it must not get to confirm reports, least
# of all the one that tells of it.
IMPOSTOR = frozenset(
    {
        RejectReason.METADATA_SIGNATURE,
        RejectReason.METADATA_ROLLBACK,
        RejectReason.METADATA_MALFORMED,
    }
)


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
        sources: where payloads come from, and metadata while the fleet is away; see there.
        held_out: the device's own labelled examples, if it has any.
        policy: see :class:`AgentPolicy`.
        now: the device's clock, with a zone.
        backoff: makes a back-off from its two bounds.
        permission: says when a release may be loaded; None: whenever its window is open.
        expiring: whether the link shall be opened anew, for a new certificate.
        keys: opens the content keys of encrypted releases; None: this device reads none.
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
        permission: Permission | None = None,
        sources: Sources | None = None,
        expiring: Callable[[], bool] = lambda: False,
        keys: ContentKeys | None = None,
        on_report: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self._home, self._device, self._trust = home, device, trust
        self._slots, self._queue, self._connect = slots, queue, connect
        self._policy, self._now, self._runtime = policy, now, runtime
        self._sources, self._expiring = sources or Sources(), expiring
        self._stop = threading.Event()
        self._connection: Connection | None = None
        self._reconnect, self._later = backoff(*policy.reconnect), backoff(*policy.later)
        self._due: tuple[str, float] | None = None  # what waits, and until when (monotonic)
        self._bundle: MetadataBundle | None = None  # the newest, for what waits while offline
        self._permission = permission or Permission(home, now=now)
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
            forget=trust.remember_bad,
            keys=keys,
            now=now,
        )
        self._leaving = Leaving(trust, slots, runtime, self._installer, self._reporter)

    @property
    def status(self) -> AgentStatus:
        """What the agent knows of itself, for the local endpoint."""
        return self._reporter.status

    def start(self) -> None:
        """Serve what was committed last, and say so. Before :meth:`run`, once."""
        if self._leaving.before_start():
            self._installer.restore()
        self._installer.tell_commit()
        self._installer.resume_watch()
        version = self._runtime.pin()
        self._reporter.tell(
            DeviceEvent.STARTED,
            release=version.name if version.digest else "",
            health=measure_health(self._home),
        )

    def run(self) -> None:
        """Stay connected and act on what comes, until :meth:`stop`."""
        reporter = threading.Thread(target=self._reporter.run, name="reports", daemon=True)
        reporter.start()
        watch = self._installer.watch.run
        watcher = threading.Thread(target=watch, args=(self._stop,), name="watch", daemon=True)
        watcher.start()
        while not self._stop.is_set():
            asked = 0.0
            try:
                if self._sources.has_fleet:
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
            self._visit_mirrors()
            self._while_offline()
            if self._stop.wait(self._sources.pause(self._reconnect.next(asked))):
                break
        self._queue.arrived.set()
        reporter.join(timeout=5.0)
        watcher.join(timeout=5.0)

    def stop(self) -> None:
        """End :meth:`run` from another thread, at the next safe point."""
        self._stop.set()
        connection = self._connection
        if connection is not None:
            connection.close()

    def consider(self, bundle: MetadataBundle, connection: Connection | None) -> bool:
        """Judge one bundle and do what it orders; whether it was believed.

        Args:
            bundle: from anywhere.
            connection: the fleet's, if that is where the bundle comes from.

        Raises:
            ConnectionLost: while fetching; the bundle will come again with the next stream.
        """
        if self._due and not self._due[0]:
            self._due = None
        try:
            verdict = self._trust.accept(bundle, device=self._device, now=self._now())
        except Rejected as rejected:
            self._leave_revoked()
            if connection is not None:
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
            return False
        except (TrustStateError, StorageError) as error:
            self._try_later(error)
            return False
        if connection is not None:
            self._reporter.believe(connection)
        self._leave_revoked()
        match verdict:
            case Stay(reason=reason):
                log.debug("stay: %s", reason)
            case Withdraw():
                self._withdraw(verdict)
            case Install(release=release):
                self._install(release, connection)
        return True

    def _try_later(self, error: Exception, **fields: Any) -> None:
        """The device's own disk stood in the way: said once, and tried again."""
        reason = RejectReason.NO_SPACE if is_full(error) else None
        self._reporter.tell_once(DeviceEvent.FAILED, reason=reason, detail=str(error), **fields)
        self._due = ("", time.monotonic() + self._later.next())

    def _leave_revoked(self) -> None:
        if not self._leaving.leave():
            self._due = ("", time.monotonic() + self._later.next())

    def _withdraw(self, order: Withdraw) -> None:
        if self._slots.state.active is not None:
            log.info("serving the base alone: %s", order.reason)
            try:
                self._installer.withdraw(order.rollout, order.sequence)
            except (NoSpace, StorageError) as error:
                self._try_later(error, rollout=order.rollout, round_sequence=order.sequence)
        else:
            self._reporter.tell_once(
                DeviceEvent.COMMITTED,
                release="",
                rollout=order.rollout,
                round_sequence=order.sequence,
                detail="already withdrawn",
            )

    def _install(self, release: SignedRelease, connection: Connection | None) -> None:
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
        order = f"{release.sha256} in round {release.sequence}"  # a new round is looked at at once
        if self._waits(order):
            return
        wait: Wait | None = None

        def hold() -> bool:
            nonlocal wait
            wait = self._permission.wait(release.window)
            return wait is not None

        outcome = self._installer.install(
            SlotRecord.of(release),
            self._sources.download(release.path, release.length, connection),
            lambda: self._trust.remember_bad(release),
            hold=hold,
            bake_seconds=release.bake_seconds,
            places=self._sources.places(connection),
        )
        self.status.waiting = wait.why if wait is not None else ""
        if wait is not None and outcome is Outcome.WAITING:
            log.info("%s is staged: %s", release.name, wait.why)
            self._due = (order, time.monotonic() + min(wait.seconds, ASK_AGAIN))
        elif outcome is Outcome.LATER:
            self._due = (order, time.monotonic() + self._later.next())
        else:
            self._later.reset()
            self._due = None

    def _while_offline(self) -> None:
        """What is downloaded and waits for its hour needs no link."""
        if self._bundle is None or not self._due or self._waits(self._due[0]) or not self._due[0]:
            return
        try:
            self.consider(self._bundle, None)
        except ConnectionLost as lost:
            log.debug("%s", lost)
        except Exception:
            log.exception("what waits could not be installed while offline")

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
                    bundle = self._bundle = event
                    self.consider(bundle, connection)
                elif bundle is not None and self._due and not self._waits(self._due[0]):
                    self.consider(bundle, connection)
                if self._expiring():
                    return
        finally:
            self._connection = None
            self._reporter.offline(self.status.link)
            connection.close()

    def _visit_mirrors(self) -> None:
        """While the fleet is away: what the other sources know, in order, until one is believed."""
        state = self._trust.state
        try:
            for name, bundle in self._sources.visit(state.root, state.version("timestamp")):
                if self._stop.is_set() or self.consider(bundle, None):
                    return
                log.info("the metadata of source %s is refused", name)
        except ConnectionLost as lost:
            log.warning("no source brings the release: %s", lost)
        except Exception as error:
            log.exception("the sources could not be asked")
            self._reporter.tell_once(DeviceEvent.FAILED, detail=f"{type(error).__name__}: {error}")

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

    def _waits(self, order: str) -> bool:
        return self._due is not None and self._due[0] == order and time.monotonic() < self._due[1]
