"""Watching the device after a commit: a release that makes it worse within its bake time goes back.

Before the release is loaded, memory and latency of what serves are noted; after the commit they are
looked at again and again until the bake is over. Several looks in a row out of bounds, or several
starts of the process within the bake (something kills it), and the release is reverted for good.

What is watched is on disk (``watch.json``) before the commit is, and its verdict before the revert
is: a kill at any point loses neither the watch nor the report.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from aggregation.durable import write_bytes

FILE = "watch.json"

log = logging.getLogger("airpeft.clients.watch")


@dataclass(frozen=True, kw_only=True)
class WatchPolicy:
    """What counts as worse.

    Disk and battery are no part of it: they fall with time, whatever serves. They are asked about
    before an install (:mod:`clients.health`) and judged over the whole fleet.

    Attributes:
        seconds: the shortest bake; a round may ask for a longer one. 0: as the round says.
        every: seconds between two looks.
        memory_factor: the process may grow by this factor, and by ``memory_slack_bytes``.
        memory_slack_bytes: growth that is never held against a release.
        latency_factor: likewise for the median latency of a request.
        latency_slack_ms: likewise.
        max_temperature_celsius: the hottest sensor must not pass this, if it was below it before.
        max_load_rise: the load of one minute may grow by this much.
        strikes: looks in a row that must be out of bounds.
        starts: starts of the process within the bake that are still no crash loop.
    """

    seconds: float = 0.0
    every: float = 10.0
    memory_factor: float = 2.0
    memory_slack_bytes: int = 128 * 1024 * 1024
    latency_factor: float = 5.0
    latency_slack_ms: float = 50.0
    max_temperature_celsius: float = math.inf
    max_load_rise: float = math.inf
    strikes: int = 3
    starts: int = 5


@dataclass(frozen=True)
class Vitals:
    """How a device is.

    Attributes:
        memory_bytes: of the process.
        latency_ms: median of a request's, milliseconds.
        temperature_celsius: of the hottest sensor; None without one.
        load_1min: of the machine.
    """

    memory_bytes: int
    latency_ms: float
    temperature_celsius: float | None = None
    load_1min: float = 0.0


NOTHING = Vitals(0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A committed release that is on probation.

    Attributes:
        sha256: of its payload.
        until_unix: end of the bake, seconds since 1970.
        before: how the device was without it.
        starts: of the process since the commit.
        verdict: why it goes back; empty while nothing speaks against it.
    """

    sha256: str
    until_unix: float
    before: Vitals
    starts: int = 0
    verdict: str = ""


class HealthWatch:
    """One device's watch; one release at a time.

    Args:
        home: the device's home folder.
        vitals: measures the device now.
        revert: goes back from a release, for good, and reports it; may be called again for the
            same one, after a kill.
        policy: see :class:`WatchPolicy`.
        now: the device's clock, with a zone.
    """

    def __init__(
        self,
        home: Path,
        *,
        vitals: Callable[[], Vitals],
        revert: Callable[[str, str], None],
        policy: WatchPolicy,
        now: Callable[[], datetime],
    ) -> None:
        self._file, self._vitals, self._revert = home / FILE, vitals, revert
        self._policy, self._now = policy, now
        self._lock = threading.Lock()
        self._strikes = 0
        self._watched = self._read()

    @property
    def watched(self) -> Watched | None:
        """What is on probation, if anything."""
        return self._watched

    def begin(self, sha256: str, before: Vitals, seconds: float) -> None:
        """Watch a release that is about to be committed; at most for a day.

        Raises:
            StorageError: it cannot be made durable; the release must not be committed.
        """
        wanted = min(86_400.0, seconds)
        with self._lock:
            self._strikes = 0
            if wanted <= 0:
                self._drop()
                return
            until = self._now().timestamp() + wanted
            self._keep(Watched(sha256=sha256, until_unix=until, before=before))

    def resume(self, active: str | None) -> None:
        """After a start: go on watching, finish a revert, or find a crash loop.

        Args:
            active: digest of the payload that is committed; None for the base alone.
        """
        with self._lock:
            watched = self._watched
            if watched is None:
                return
            if watched.verdict:
                self._go_back(watched)
            elif watched.sha256 != active or self._is_over(watched):
                self._drop()
            else:
                watched = replace(watched, starts=watched.starts + 1)
                self._keep(watched)
                if watched.starts > self._policy.starts:
                    detail = f"{watched.starts} starts of the process within the bake"
                    self._go_back(replace(watched, verdict=detail))

    def look(self) -> None:
        """One look at the device; reverts the release if it is one too many out of bounds."""
        with self._lock:
            watched = self._watched
            if watched is None:
                return
            if watched.verdict:  # a revert that the disk did not take
                self._go_back(watched)
                return
            if self._is_over(watched):
                log.info("the bake is over; the release stays")
                self._drop()
                return
            complaint = self._complaint(watched.before, self._vitals())
            self._strikes = self._strikes + 1 if complaint else 0
            if self._strikes >= self._policy.strikes:
                self._go_back(replace(watched, verdict=complaint))

    def run(self, stop: threading.Event) -> None:
        """Look until ``stop``."""
        while not stop.wait(self._policy.every):
            try:
                self.look()
            except Exception:
                # A full disk, an engine that is being replaced: the next look tries again.
                log.exception("the watch could not look; it tries again")

    def _complaint(self, before: Vitals, now: Vitals) -> str:
        policy = self._policy
        most = policy.memory_factor * before.memory_bytes + policy.memory_slack_bytes
        if now.memory_bytes > most:
            return f"the process has {now.memory_bytes} bytes after {before.memory_bytes}"
        slowest = policy.latency_factor * before.latency_ms + policy.latency_slack_ms
        if now.latency_ms > slowest:
            return f"a request takes {now.latency_ms:.1f} ms after {before.latency_ms:.1f} ms"
        heat, limit = now.temperature_celsius, policy.max_temperature_celsius
        if heat is not None and heat > limit >= (before.temperature_celsius or 0.0):
            return f"the device has {heat:g} °C after {before.temperature_celsius} °C"
        if now.load_1min > before.load_1min + policy.max_load_rise:
            return f"the load is {now.load_1min:.2f} after {before.load_1min:.2f}"
        return ""

    def _is_over(self, watched: Watched) -> bool:
        now = self._now().timestamp()
        # A clock that was set back must not stretch the bake for ever.
        return not watched.until_unix - 2 * 86_400 <= now < watched.until_unix

    def _go_back(self, watched: Watched) -> None:
        self._keep(watched)
        self._revert(watched.sha256, watched.verdict)
        self._drop()

    def _keep(self, watched: Watched) -> None:
        write_bytes(self._file, json.dumps(asdict(watched), sort_keys=True).encode())
        self._watched = watched

    def _drop(self) -> None:
        self._watched, self._strikes = None, 0
        self._file.unlink(missing_ok=True)

    def _read(self) -> Watched | None:
        try:
            fields = json.loads(self._file.read_bytes())
            return Watched(**{**fields, "before": Vitals(**fields["before"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.error("%s is damaged (%s): nothing is watched", self._file, error)
            return None
