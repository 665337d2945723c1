"""Patience with a link: how long to wait before the next try, and when silence is too long.

Neither knows gRPC, or what is waited for.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Backoff:
    """Exponential back-off with full jitter: a fleet that lost its server comes back spread out.

    >>> backoff = Backoff(random.Random(7), base=1.0, cap=8.0)
    >>> all(backoff.next() <= min(8.0, 2.0**n) for n in range(9))
    True

    Attributes:
        rng: source of the jitter.
        base: upper bound of the first wait, seconds.
        cap: upper bound of every wait, seconds.
    """

    rng: random.Random
    base: float = 0.5
    cap: float = 60.0
    _tries: int = 0

    def next(self, at_least: float = 0.0) -> float:
        """Seconds to wait now; uniform below a bound that doubles, plus what the server asked."""
        bound = min(self.cap, self.base * 2.0 ** min(self._tries, 32))
        self._tries += 1
        return at_least + self.rng.uniform(0.0, bound)

    def reset(self) -> None:
        """It worked: the next wait is short again."""
        self._tries = 0


class Watchdog:
    """Calls ``bite`` once if it is not fed for ``seconds``; one thread for the life of a call.

    Args:
        seconds: of silence that are too many.
        bite: called from the watchdog's own thread.
        clock: monotonic seconds; looked at whenever something changes, and every ``seconds``.
    """

    def __init__(
        self,
        seconds: float,
        bite: Callable[[], Any],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds, self._bite, self._clock = seconds, bite, clock
        self._changed = threading.Condition()
        self._deadline: float | None = clock() + seconds
        self._ended = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def feed(self) -> None:
        """Something came; count again from now."""
        with self._changed:
            self._deadline = self._clock() + self._seconds
            self._changed.notify()

    def rest(self) -> None:
        """Count no silence while the receiver itself is busy."""
        with self._changed:
            self._deadline = None

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                left = None if self._deadline is None else self._deadline - self._clock()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            silent = not self._ended
        if silent:
            self._bite()
