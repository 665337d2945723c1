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
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from clients.agent_policy import AgentPolicy
from clients.connection import Connection, ConnectionLost, Denied
from clients.content_keys import ContentKeys
from clients.health import measure as measure_health
from clients.install import Installer
from clients.leaving import Leaving
from clients.link import Backoff
from clients.obedience import Obedience
from clients.permission import Permission
from clients.probe import HeldOut
from clients.reporting import AgentStatus, Reporter
from clients.runtime import Runtime
from clients.slots import Slots
from clients.sources import Sources
from clients.telemetry import ReportQueue
from clients.trust import DeviceFacts, Trust
from protos.messages import DeviceEvent, MetadataBundle, Report, WatchRequest

log = logging.getLogger("airpeft.clients.agent")

__all__ = ["Agent", "AgentPolicy"]


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
        self._home, self._trust, self._queue, self._connect = home, trust, queue, connect
        self._policy, self._runtime = policy, runtime
        self._sources, self._expiring = sources or Sources(), expiring
        self._stop = threading.Event()
        self._connection: Connection | None = None
        self._reconnect = backoff(*policy.reconnect)
        self._bundle: MetadataBundle | None = None  # the newest, for what waits while offline
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
        self._obedience = Obedience(
            device=device,
            trust=trust,
            slots=slots,
            installer=self._installer,
            leaving=self._leaving,
            reporter=self._reporter,
            sources=self._sources,
            permission=permission or Permission(home, now=now),
            now=now,
            later=backoff(*policy.later),
        )

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
        """Judge one bundle and do what it orders, see :class:`clients.obedience.Obedience`."""
        return self._obedience.consider(bundle, connection)

    def _while_offline(self) -> None:
        """What is downloaded and waits for its hour needs no link."""
        if self._bundle is None or not self._obedience.is_release_due():
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
                elif bundle is not None and self._obedience.is_due():
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
        active = self._obedience.active()
        state = self._trust.state
        return WatchRequest(
            timestamp_version=state.version("timestamp"),
            root_version=state.root,
            running_release=active.release if active else "",
        )
