"""One install: fetch, decode, guard, stage, load, probe, publish, commit; or back, with the reason.

Each step is small and leaves the device able to start: until the commit the old release is the
active one on disk, and until the publish it is the one that serves. What comes out is an
:class:`Outcome`; what happened in between is in the reports. The table of failures::

    where    what                               report                    and then
    key      no content key that opens here    REJECTED content-key       again later
    fetch    length or hash not as signed       REJECTED payload-digest   again later
    fetch    no such file at the server         FAILED                    again later
    any      disk full                          FAILED no-space           again later
    decode   malformed, another digest          REJECTED payload-malformed  never again
    guard    names, shapes, finiteness, norms   REJECTED guard            never again
    load     cannot be loaded, no finite answer REVERTED self-test        never again
    probe    worse on the own held-out data     REVERTED quality-regressed  never again
    bake     memory, latency, heat or load      REVERTED health-regressed   never again

"Never again" is remembered durably, by release, and the running adapter serves on throughout.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aggregation.durable import StorageError
from clients.content_keys import ContentKeys, Place
from clients.download import Download
from clients.health import NoSpace
from clients.health import measure as measure_health
from clients.inspection import Refusal
from clients.install_policy import InstallPolicy, Outcome, Tell
from clients.link import Backoff
from clients.partial import is_full
from clients.probe import SELF_TEST, HeldOut, SelfTestError, latency_of, self_test
from clients.quality import QualityGate
from clients.runtime import AdapterVersion, LoadError, RequestError, Runtime
from clients.slots import SlotDamaged, SlotRecord, Slots
from clients.staging import Stager
from clients.watch import NOTHING, HealthWatch, Vitals
from protos.messages import DeviceEvent, Quality, RejectReason

__all__ = ["InstallPolicy", "Installer", "Outcome", "Tell"]

log = logging.getLogger("airpeft.clients.install")


class Installer:
    """Installs releases that trust has accepted, into the slots and the runtime of one device.

    Args:
        home: where the disk is measured.
        slots: the two slots.
        runtime: the engine that serves.
        tell: reports.
        held_out: the device's own examples; None: a self-test is all that is asked.
        policy: see :class:`InstallPolicy`.
        backoff: waits between cuts of a download.
        stop: set when the process should end.
        forget: remembers a payload's digest as bad, durably.
        keys: opens the content keys of encrypted payloads; None: this device reads none.
        now: the device's clock, with a zone.
    """

    def __init__(
        self,
        home: Path,
        *,
        slots: Slots,
        runtime: Runtime,
        tell: Tell,
        held_out: HeldOut | None,
        policy: InstallPolicy,
        backoff: Backoff,
        stop: threading.Event,
        forget: Callable[[str], None] = lambda sha256: None,
        keys: ContentKeys | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._home, self._slots, self._runtime = home, slots, runtime
        self._tell = tell
        self._gate = QualityGate(runtime, held_out, policy.quality_tolerance)
        self._policy, self._forget, self._keys = policy, forget, keys or ContentKeys()
        self._stager = Stager(
            home,
            slots=slots,
            runtime=runtime,
            keys=self._keys,
            policy=policy,
            backoff=backoff,
            stop=stop,
            report=self._report,
        )
        self._texts = held_out.texts if held_out is not None else SELF_TEST
        self._changing = threading.RLock()  # what serves: an install here, a revert by the watch
        self.watch = HealthWatch(
            home, vitals=self._vitals, revert=self._go_back, policy=policy.watch, now=now
        )

    def install(
        self,
        record: SlotRecord,
        download: Download,
        forget: Callable[[], None],
        *,
        hold: Callable[[], bool] = lambda: False,
        bake_seconds: float = 0.0,
        places: Sequence[Place] = (),
    ) -> Outcome:
        """Bring one release into service, or say why not.

        Args:
            record: the signed facts of a release that trust has accepted.
            download: the payload's bytes, from wherever they are to be had.
            forget: remembers the release as bad, durably.
            hold: whether it shall only be staged for now; asked when it is.
            bake_seconds: for how long the device watches its health after the commit.
            places: where the content key of an encrypted payload may be had, in order.

        Raises:
            ConnectionLost: the link is gone; what was fetched stays.
        """
        try:
            record = self._keys.keyed(record, self._slots.find(record.sha256), places)
            fetched = self._stager.stage(record, download)
            if hold():
                return Outcome.WAITING
            with self._changing:
                return self._try(record, fetched, bake_seconds)
        except Refusal as refusal:
            return self._refuse(record, refusal, forget)
        except (NoSpace, StorageError, SlotDamaged, MemoryError) as error:
            return self._fail(record, error)

    def _refuse(self, record: SlotRecord, refusal: Refusal, forget: Callable[[], None]) -> Outcome:
        """Say why, and remember it; what cannot be remembered now is found out once more."""
        log.warning("%s: %s: %s", record.release, refusal.event, refusal)
        self._report(record, refusal.event, **refusal.fields, detail=str(refusal))
        try:
            if refusal.final:
                forget()
            if self._slots.state.trial is not None:
                self._slots.revert()
        except (NoSpace, StorageError) as error:
            return self._fail(record, error)
        return Outcome.REFUSED if refusal.final else Outcome.LATER

    def _fail(self, record: SlotRecord, error: Exception) -> Outcome:
        """Something of the device's own, which may pass."""
        log.warning("%s: %s", record.release, error)
        reason = RejectReason.NO_SPACE if is_full(error) else None
        self._report(record, DeviceEvent.FAILED, reason=reason, detail=str(error))
        return Outcome.LATER

    def restore(self) -> AdapterVersion:
        """At the start: publish what was committed last; fall back where it is damaged."""
        while self._slots.state.active is not None:
            record = None
            try:
                record = self._slots.active()
                if record is not None and record.base_digest != self._runtime.base_digest:
                    # Another base was configured: not the slot's fault, so nothing is dropped.
                    detail = f"{record.release} is for base {record.base_digest}"
                    self._report(
                        record,
                        DeviceEvent.FAILED,
                        reason=RejectReason.WRONG_BASE,
                        detail=f"{detail}, this device runs {self._runtime.base_digest}",
                    )
                    break
                if record is not None:
                    adapter = self._stager.open(record, self._slots.active_payload())
                    self._runtime.publish(self._runtime.load(adapter, name=record.release))
                break
            except (SlotDamaged, Refusal, LoadError) as error:
                log.error("the committed release cannot be used: %s", error)
                name = record.release if record else ""
                self._tell(DeviceEvent.FAILED, release=name, detail=f"at start: {error}")
                try:
                    self._slots.fall_back()
                except (NoSpace, StorageError) as full:
                    log.error("the base alone serves until the next start: %s", full)
                    break
        return self._runtime.pin()

    # --- the steps --------------------------------------------------------------------------------

    def _try(self, record: SlotRecord, fetched: int, bake_seconds: float) -> Outcome:
        """Load, probe, publish, commit."""
        attempts = self._slots.attempt()
        if attempts > self._policy.max_attempts:
            raise Refusal(
                DeviceEvent.REVERTED,
                RejectReason.SELF_TEST,
                f"{attempts - 1} tries of this release did not live to their end",
            )
        adapter = self._stager.open(record, self._slots.trial_payload())
        older = self._is_older(record)
        # An operator's roll-back must not bounce.
        bake = 0.0 if older else max(bake_seconds, self._policy.watch.seconds)
        before = self._vitals() if bake > 0 else NOTHING
        try:
            version = self._runtime.load(adapter, name=record.release)
            self_test(self._runtime, version)
            quality = self._gate.check(version, may_fall=older)
        except (LoadError, SelfTestError, RequestError) as error:
            raise Refusal(DeviceEvent.REVERTED, RejectReason.SELF_TEST, str(error)) from error
        self.watch.begin(record.sha256, before, bake)  # first, so that no kill can lose it
        previous = self._runtime.publish(version)
        try:
            self._slots.commit(
                {
                    "release": record.release,
                    "rollout": record.rollout,
                    "round_sequence": record.round_sequence,
                    "quality": asdict(quality) if quality else None,
                    "payload_bytes": fetched,
                }
            )
        except Exception:
            self._runtime.publish(previous)  # what is not durable must not serve
            raise
        self._runtime.unload(previous)
        log.info("%s serves", record.release)
        self.tell_commit()
        return Outcome.COMMITTED

    def withdraw(self, rollout: str, sequence: int) -> None:
        """Serve the base alone, as an operator has ordered.

        Raises:
            StorageError: it could not be made durable; the release goes on serving.
        """
        with self._changing:
            self._slots.withdraw({"release": "", "rollout": rollout, "round_sequence": sequence})
            self._runtime.unload(self._runtime.publish(None))
            self.tell_commit()

    def tell_commit(self) -> None:
        """Report the last commit, unless that has been done; a kill in between repeats it."""
        untold = self._slots.state.untold
        if untold is not None:
            fields = dict(untold)
            quality = fields.pop("quality", None)
            fields["quality"] = Quality(**quality) if quality else None
            fields["health"] = measure_health(self._home)
            if not self._tell(DeviceEvent.COMMITTED, **fields):
                return  # kept in memory alone: said once more after a restart
            try:
                self._slots.told()
            except (NoSpace, StorageError) as error:
                log.warning("the commit is told, and will be once more after a restart: %s", error)

    def resume_watch(self) -> None:
        """At the start, after :meth:`restore`: go on watching what is on probation."""
        active = self._slots.active() if self._slots.state.active is not None else None
        try:
            self.watch.resume(active.sha256 if active is not None else None)
        except (NoSpace, StorageError) as error:
            log.warning("the watch goes on with what it knew: %s", error)

    def _go_back(self, sha256: str, detail: str) -> None:
        """Leave a committed release for the one before; the report is durable at the end."""
        with self._changing:
            record = self._slots.find(sha256)
            self._forget(sha256)
            if self._slots.state.active is not None:
                active = self._slots.active()
                if active is not None and active.sha256 == sha256:
                    self._slots.fall_back()
                    leaving = self._runtime.pin()
                    if self._slots.state.active is None:
                        self._runtime.publish(None)
                    self.restore()
                    self._runtime.unload(leaving)
            if record is not None:
                log.warning("%s goes back: %s", record.release, detail)
                reason = RejectReason.HEALTH_REGRESSED
                self._report(record, DeviceEvent.REVERTED, reason=reason, detail=detail)

    def _vitals(self) -> Vitals:
        latency = latency_of(self._runtime, self._runtime.pin(), self._texts)
        health = measure_health(self._home)
        return Vitals(
            health.process_memory_bytes, latency, health.temperature_celsius, health.load_1min
        )

    def _is_older(self, record: SlotRecord) -> bool:
        active = self._slots.active()
        return (
            active is not None
            and record.channel == active.channel
            and record.counter < active.counter
        )

    def _report(self, record: SlotRecord, event: DeviceEvent, **fields: Any) -> None:
        if event in (DeviceEvent.REVERTED, DeviceEvent.FAILED):
            fields["health"] = measure_health(self._home)
        self._tell(
            event,
            release=record.release,
            rollout=record.rollout,
            round_sequence=record.round_sequence,
            **fields,
        )
