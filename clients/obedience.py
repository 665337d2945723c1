"""What a device does about one bundle of metadata: refuses it, stays, withdraws, or installs.

Whether a bundle is believed is for :mod:`clients.trust` to say, and what becomes of a payload for
:mod:`clients.install`. Here is what lies between: who is told, and what is tried again when.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from aggregation.durable import StorageError
from clients.connection import Connection
from clients.health import NoSpace
from clients.install import Installer, Outcome
from clients.leaving import Leaving
from clients.link import Backoff
from clients.partial import is_full
from clients.permission import Permission, Wait
from clients.reporting import Reporter
from clients.slots import SlotDamaged, SlotRecord, Slots
from clients.sources import Sources
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
from protos.messages import DeviceEvent, MetadataBundle, RejectReason

ASK_AGAIN = 60.0  # seconds; clocks are set and windows move, so nobody sleeps through to the end

# Whoever serves such metadata may be no server of ours: it must not get to confirm reports, least
# of all the one that tells of it.
IMPOSTOR = frozenset(
    {
        RejectReason.METADATA_SIGNATURE,
        RejectReason.METADATA_ROLLBACK,
        RejectReason.METADATA_MALFORMED,
    }
)

log = logging.getLogger("airpeft.clients.agent")


class Obedience:
    """Does what bundles order, as far as they are believed.

    Args:
        device: what trust must know of this device.
        trust: judges metadata.
        slots: where releases lie.
        installer: takes them in.
        leaving: leaves what was revoked.
        reporter: tells the fleet.
        sources: where payloads come from.
        permission: says when a release may be loaded.
        now: the device's clock, with a zone.
        later: how long what failed and may pass waits.
    """

    def __init__(
        self,
        *,
        device: DeviceFacts,
        trust: Trust,
        slots: Slots,
        installer: Installer,
        leaving: Leaving,
        reporter: Reporter,
        sources: Sources,
        permission: Permission,
        now: Callable[[], datetime],
        later: Backoff,
    ) -> None:
        self._device, self._trust, self._slots, self._now = device, trust, slots, now
        self._installer, self._leaving, self._reporter = installer, leaving, reporter
        self._sources, self._permission, self._later = sources, permission, later
        self._due: tuple[str, float] | None = None  # what waits, and until when (monotonic)

    def is_due(self) -> bool:
        """Whether something that was put off has its time now."""
        return self._due is not None and time.monotonic() >= self._due[1]

    def is_release_due(self) -> bool:
        """Likewise, and it is a release: what is downloaded needs no link."""
        return self.is_due() and self._due is not None and bool(self._due[0])

    def active(self) -> SlotRecord | None:
        """What was committed last; None for the base alone, or if it cannot be read."""
        try:
            return self._slots.active()
        except SlotDamaged as error:
            log.error("%s", error)
            return None

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
        active = self.active()
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
        self._reporter.status.waiting = wait.why if wait is not None else ""
        if wait is not None and outcome is Outcome.WAITING:
            log.info("%s is staged: %s", release.name, wait.why)
            self._due = (order, time.monotonic() + min(wait.seconds, ASK_AGAIN))
        elif outcome is Outcome.LATER:
            self._due = (order, time.monotonic() + self._later.next())
        else:
            self._later.reset()
            self._due = None

    def _waits(self, order: str) -> bool:
        return self._due is not None and self._due[0] == order and time.monotonic() < self._due[1]
