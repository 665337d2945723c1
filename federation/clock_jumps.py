"""The server's clock is set, forth or back: what must not be decided by it pauses.

Deadlines, bake times and the order of events are told by the wall clock, which survives a restart
and which people can read. When it jumps, a wave's deadline may seem to have passed, or to lie a
year ahead. So rollouts under way are paused, with the reason in the audit log; ``resume`` begins
the current wave's deadline anew, once somebody has looked.

Nothing else hangs on it: dates of metadata are only ever moved forward, a token or a certificate
that seems to have ended is good again when the clock is right, and devices have a time of their
own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from federation.rollout import State, Verb
from federation.ticker import Ticker
from federation.waves import RolloutError

JUMP = 60.0  # seconds; less is what keeps a clock right

log = logging.getLogger("airpeft.federation.clock_jumps")


def uptime() -> float:
    """Seconds that nobody sets; where the system can, sleep counts too."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


class ClockJumps:
    """Compares a clock that can be set with one that cannot.

    Args:
        clock: Unix seconds.
        steady: seconds since whenever.
    """

    def __init__(self, clock: Callable[[], float], steady: Callable[[], float] = uptime) -> None:
        self._clock, self._steady = clock, steady
        self._difference = clock() - steady()

    def newest(self) -> float:
        """Seconds that the clock has been set forth (or back, below 0) since the last call."""
        difference = self._clock() - self._steady()
        jump, self._difference = difference - self._difference, difference
        return jump


def pause_after(jump: float, ticker: Ticker) -> None:
    """Pause what runs, if the clock has jumped.

    Args:
        jump: seconds, as :meth:`ClockJumps.newest` says.
        ticker: the one that changes rollouts.
    """
    if abs(jump) < JUMP:
        return
    why = f"the server's clock was set {'forth' if jump > 0 else 'back'} by {abs(jump):.0f} s"
    log.error("%s: what is under way pauses", why)
    for record in ticker.records(active=True):
        if record.rollout.state is State.RUNNING:
            try:
                ticker.act(record.rollout.id, Verb.PAUSE, who="ticker", why=why)
            except RolloutError as error:  # ended meanwhile
                log.info("%s", error)
