"""One payload from several sources: who is asked next, where it goes on, and who has lied.

A source that is cut, stalls, drips, or has no such file is left for the next one, which goes on at
the byte where it stopped. If the whole is not what was signed, whoever brought all of it has lied
and is not asked again; where several had a part in it, each is asked alone, from the first byte,
so that one liar among the sources costs time and never the release.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from clients.connection import ConnectionLost, Denied
from clients.link import Backoff
from clients.partial import Partial, PayloadMismatch, fill

log = logging.getLogger("airpeft.clients.download")

SLOWEST = 1024  # bytes a second; a source below it is left, if there is another
GRACE = 30.0  # seconds before it is judged

Count = Callable[[str, str], None]


@dataclass(frozen=True)
class Way:
    """One source: its name, and how it hands out a file from an offset."""

    name: str
    fetch: Callable[[str, int], Iterator[bytes]]


class Download:
    """The bytes of one payload from an offset on, from whichever source brings them.

    Args:
        ways: the sources in order.
        path: of the payload in the repository.
        length: its signed length, bytes.
        slowest: bytes a second below which a source is left, if there is another.
        grace: seconds before a source is judged.
        clock: monotonic seconds.
        count: told of each try of a source.
    """

    def __init__(
        self,
        ways: Sequence[Way],
        path: str,
        length: int,
        *,
        slowest: float = SLOWEST,
        grace: float = GRACE,
        clock: Callable[[], float] = time.monotonic,
        count: Count = lambda source, result: None,
    ) -> None:
        self._plans = [tuple(ways)] if ways else []
        self._path, self._length = path, length
        self._slowest, self._grace, self._clock, self._count = slowest, grace, clock, count
        self._turn = 0  # whose turn it is; one that failed is asked again after all others
        self._used: set[str] = set()
        self._resumed: bool | None = None

    def __call__(self, offset: int) -> Iterator[bytes]:
        """The bytes from ``offset`` on.

        Raises:
            ConnectionLost: no source brings them now.
            Denied: no source has them.
        """
        plan = self._plans[0] if self._plans else ()
        if self._resumed is None:
            self._resumed = offset > 0
        short, lost, denied = False, [], None
        for _ in plan:
            way = plan[self._turn % len(plan)]
            try:
                for chunk in self._paced(way.fetch(self._path, offset), len(plan) > 1):
                    self._used.add(way.name)
                    offset += len(chunk)
                    yield chunk
                if offset >= self._length:
                    self._count(way.name, "complete")
                    return
                short = True
                self._count(way.name, "short")
            except ConnectionLost as error:
                lost.append(error)
                self._count(way.name, "cut")
            except Denied as error:
                denied = error
                self._count(way.name, "denied")
            self._turn += 1
            if len(plan) > 1:
                log.info("source %s stops at byte %d of %s", way.name, offset, self._path)
        if lost:
            raise ConnectionLost(
                "; ".join(map(str, lost)), max(error.retry_after for error in lost)
            ) from lost[-1]
        if denied is not None and not short:
            raise denied
        if not plan:
            raise ConnectionLost(f"no source for {self._path} is reached")

    def wrap(self, around: Callable[[Way], Way]) -> None:
        """Put something around every source: a meter, for instance."""
        self._plans = [tuple(around(way) for way in plan) for plan in self._plans]

    def distrust(self) -> bool:
        """The bytes were not the signed ones. Whether there is another way, from byte 0 on."""
        if not self._plans:
            return False
        used, resumed, plan = self._used, self._resumed, self._plans[0]
        self._used, self._resumed, self._turn = set(), None, 0
        if resumed:
            return True  # what an earlier try had left may be at fault
        if len(used) == 1:
            (liar,) = used
            log.warning("source %s hands out other bytes than were signed", liar)
            self._count(liar, "lied")
            plans = [tuple(w for w in p if w.name != liar) for p in self._plans]
        else:
            alone = [(way,) for way in plan if way.name in used]
            rest = tuple(way for way in plan if way.name not in used)
            plans = [*alone, rest, *self._plans[1:]]
        self._plans = [one for one in plans if one]
        return bool(self._plans)

    def _paced(self, chunks: Iterator[bytes], judged: bool) -> Iterator[bytes]:
        """The same chunks, unless they come too slowly. Time that the receiver takes is its own."""
        waited, got, since = 0.0, 0, self._clock()
        for chunk in chunks:
            waited, got = waited + self._clock() - since, got + len(chunk)
            yield chunk
            if judged and waited > self._grace and got < self._slowest * waited:
                raise ConnectionLost(f"{got} bytes in {waited:.0f} seconds: too slow")
            since = self._clock()


def obtain(
    partial: Partial, download: Download, *, backoff: Backoff, stop: threading.Event, tries: int
) -> bytes:
    """The payload as it was signed; see :func:`clients.partial.fill` for the arguments.

    Raises:
        ConnectionLost: given up; what is there stays.
        Denied: no source has it.
        PayloadMismatch: no source has the signed bytes.
        NoSpace: the disk is full.
    """
    while True:
        try:
            fill(partial, download, backoff=backoff, stop=stop, tries=tries)
            return partial.finish()
        except PayloadMismatch:
            if not download.distrust():
                raise
