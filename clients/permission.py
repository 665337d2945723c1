"""Whether a release that is downloaded may be loaded now: the window, and the device's own lock.

The fleet says when (a daily window, read in this device's time zone); the device says whether it
suits: an application holds ``update.lock`` in the home folder, or a command of the device's owner
ends with a status other than 0, or the device is in no state for it (a battery that is nearly
empty). A download waits for none of these. An order that brings an older release
back has no window, but the lock holds it too: nobody knows better than the device what it is doing.

    >>> from datetime import datetime, UTC
    >>> clock = lambda: datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
    >>> Permission(Path("/nowhere"), now=clock, zone=UTC).wait("22:00-05:00")
    Wait(seconds=36000.0, why='the window 22:00-05:00 opens in 600 min')
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from pathlib import Path

from protos.window import Window

LOCK_FILE = "update.lock"
COMMAND_SECONDS = 10.0  # an answer that takes longer is a no

log = logging.getLogger("airpeft.clients.permission")


@dataclass(frozen=True)
class Wait:
    """Not now.

    Attributes:
        seconds: after which to ask again.
        why: for people.
    """

    seconds: float
    why: str


class Permission:
    """Says whether an install may go on.

    Args:
        home: the device's home folder; ``update.lock`` in it, with whatever content, says no.
        now: the device's clock, with a zone.
        zone: the device's own time zone; None takes the system's.
        command: asked as well, without a shell; a status other than 0 says no.
        ask_again_seconds: while it is locked.
        unfit: why the device is in no state to load a release; empty if it is.
    """

    def __init__(
        self,
        home: Path,
        *,
        now: Callable[[], datetime],
        zone: tzinfo | None = None,
        command: Sequence[str] = (),
        ask_again_seconds: float = 30.0,
        unfit: Callable[[], str] = lambda: "",
    ) -> None:
        self._lock, self._now, self._zone = home / LOCK_FILE, now, zone
        self._command, self._ask_again = tuple(command), ask_again_seconds
        self._unfit = unfit

    def wait(self, window: str) -> Wait | None:
        """Why and how long to wait; None: go on now.

        Args:
            window: of the round, empty for none; it has been checked by whoever read the round.
        """
        if window:
            local = self._now().astimezone(self._zone)
            minutes = Window.parse(window).opens_in(60 * local.hour + local.minute)
            if minutes:
                seconds = 60.0 * minutes - local.second
                return Wait(seconds, f"the window {window} opens in {minutes} min")
        if self._lock.exists():
            return Wait(self._ask_again, f"{self._lock.name} is there")
        refusal = self._refusal() or self._unfit()
        return Wait(self._ask_again, refusal) if refusal else None

    def _refusal(self) -> str:
        if not self._command:
            return ""
        try:
            done = subprocess.run(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            # A lock that cannot be asked is locked: the running adapter serves on meanwhile.
            log.warning("the update lock cannot be asked: %s", error)
            return f"{self._command[0]} does not answer"
        return "" if done.returncode == 0 else f"{self._command[0]} says {done.returncode}"
