"""Several gateways on one database: who decides, and what the others hear of.

Each holds one connection that lasts. With it it hears announcements (``LISTEN``), holds its name,
and tries to become the one that decides: that is a lock of PostgreSQL, which ends with the
connection. A gateway that is killed loses it at once, and another one has it within :data:`BEAT`
seconds; one that hangs is made to lose it after :data:`SILENCE` seconds, and one whose machine
vanishes loses it when PostgreSQL gives its connection up, after about 20 seconds. Nothing depends
on there being exactly one: see :mod:`federation.turns`.

What was announced is only a hint. After every reconnection everything is looked at, and the
repository's folder once a tick, whatever was heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from aggregation.errors import AggregationError
from federation import postgres
from federation.errors import FederationError
from federation.fleet import Fleet
from federation.repository import Repository
from federation.store import Store
from federation.ticker import Ticker

BEAT = 1.0  # seconds between two attempts to become the one that decides
SILENCE = 15.0  # seconds after which one that decides and hangs must give way
EAR = 0.2  # seconds of listening at a time
PATIENCE = 5.0  # seconds that a start waits for its name, and then for the database to come back
REST, REST_MAX = 4, 2.0  # times what a turn took, and seconds at most, before the next one
IDLE, IDLE_MAX = 20, 10.0  # likewise, where nothing is to do
_KNOWN = (FederationError, AggregationError)

log = logging.getLogger("airpeft.federation.gateways")


class GatewayError(FederationError):
    """A gateway that cannot take its place beside the others; says what to do."""


class Gateway:
    """This process among those that share its database; alone, it decides.

    Args:
        store: the database.
        fleet: what is known of the devices.
        repository: opened with the online key.
        wake: lets every open stream look for what is new; from any thread.
        poke: lets the ticker look; from any thread.

    Attributes:
        leads: whether it is the one that decides about rollouts.
        trouble: why it does not hear the others at this moment; empty when all is well.
    """

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        repository: Repository,
        *,
        wake: Callable[[], None],
        poke: Callable[[], None],
    ) -> None:
        self._store, self._fleet, self._repository = store, fleet, repository
        self._wake, self._poke = wake, poke
        self._shown = repository.timestamp()
        self.leads, self.trouble = not store.shared, ""
        self._missed, self._refused = False, ""
        self._stop, self._ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)

    def start(self) -> None:
        """Take a place among the others; nothing to do alone.

        Raises:
            GatewayError: another gateway of this name is alive.
            StorageError: the database went away.
        """
        if not self._store.shared:
            return
        self._thread.start()
        if not self._ready.wait(2 * PATIENCE) or self._refused:
            self.close()
            raise GatewayError(self._refused or self.trouble or "the database does not answer")
        self._fleet.begin()

    def close(self) -> None:
        """Leave: the others need not wait for anything."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(PATIENCE)
        self.leads = not self._store.shared

    def wake(self) -> None:
        """Something that devices should hear of has changed, here or elsewhere."""
        self._shown = self._repository.timestamp()
        self._wake()

    def changed(self) -> None:
        """An operator has changed something here: the others should look, too."""
        self.wake()
        with contextlib.suppress(AggregationError):  # they look by themselves, once a tick
            self._store.tell("repository")

    def work(self, ticker: Ticker, poked: bool) -> None:
        """What there is to do once a tick.

        Args:
            ticker: decides, if it is this gateway's turn.
            poked: whether devices have reported something.

        Raises:
            StorageError: the database or the folder cannot be used; the next time does it.
        """
        if self._store.shared:
            self._catch_up()
        if self.leads:
            ticker.tick()
            return
        self._fleet.flush()
        if poked:
            self._store.tell("reports")

    def status(self) -> dict[str, Any]:
        """For operators: which one this is, whether it decides, what is wrong."""
        return {"gateway": self._store.gateway, "decides": self.leads, "trouble": self.trouble}

    def _catch_up(self) -> None:
        self._repository.refresh()
        if self._repository.timestamp() != self._shown:
            self.wake()

    def _hear(self, what: str, subject: str) -> None:
        if what in ("enrolled", "revoked"):
            self._fleet.refresh(subject)
        if what == "revoked":
            self.wake()
        elif what == "repository":
            self._catch_up()
        elif what == "reports":
            self._poke()

    def _look_at_everything(self) -> None:
        self._fleet.refresh()
        self._repository.refresh()
        self.wake()
        self._poke()
        self._missed = False

    def _run(self) -> None:
        pause = 0.1
        while not self._stop.is_set():
            try:
                with postgres.session(self._store.engine) as session:
                    self._take_place(session)
                    pause = 0.1
                    self._listen(session)
            except _KNOWN as error:
                if str(error) != self.trouble:
                    log.error("%s: trying again; devices go on with what they have", error)
                self.trouble = str(error)
            self.leads = False
            self._stop.wait(pause)
            pause = min(2 * pause, 2.0)

    def _take_place(self, session: postgres.Session) -> None:
        name, end = self._store.gateway, time.monotonic() + PATIENCE
        while not session.takes(postgres.NAMES, postgres.number_of(name)):
            if time.monotonic() > end:
                text = (
                    f"a gateway named {name!r} is alive on this database: give each one a name of"
                    " its own with --gateway"
                )
                if not self._ready.is_set():
                    self._refused = text
                    self._stop.set()
                    self._ready.set()
                raise GatewayError(text)
            self._stop.wait(EAR)
        session.listen()
        self.leads = session.takes(postgres.SPACE, postgres.DECIDER)
        if self.trouble:
            log.info("the database answers again")
        self.trouble = ""
        self._missed = self._ready.is_set()  # at the start all was read a moment ago
        self._ready.set()

    def _listen(self, session: postgres.Session) -> None:
        beat = time.monotonic()
        while not self._stop.is_set():
            for sender, what, subject in session.heard(EAR):
                if sender != self._store.gateway:
                    self._safely(partial(self._hear, what, subject))
            if self._missed:
                self._safely(self._look_at_everything)
            if time.monotonic() - beat < BEAT:
                continue
            beat = time.monotonic()
            if self.leads:
                session.ping()
            elif session.ends_silent(postgres.SPACE, postgres.DECIDER, SILENCE):
                log.warning("the gateway that decides has been silent for %g s: ended", SILENCE)
            elif session.takes(postgres.SPACE, postgres.DECIDER):
                log.info("gateway %s decides about rollouts from now on", self._store.gateway)
                self.leads = True
                self._poke()

    def _safely(self, action: Callable[[], None]) -> None:
        try:
            action()
        except _KNOWN as error:
            log.error("what another gateway has changed is not known yet: %s", error)
            self._missed = True


async def keep_working(turn: Callable[[bool], None], poke: asyncio.Event, seconds: float) -> None:
    """Work whenever there is something to do, and every so many seconds.

    A turn looks at every device: thousands of them that report at once must not have it look all
    the time, nor a rollout that waits for a window keep a processor busy. So what a turn takes is
    followed by four times as much rest, and by twenty times as much where nothing is to do; no more
    than two and ten seconds, for a turn may also have waited for a disk.

    Args:
        turn: the work, on a thread; is told whether devices have reported something.
        poke: set when there is something to do.
        seconds: between two turns at most.
    """
    said = ""
    while True:
        poked, began = poke.is_set(), time.monotonic()
        poke.clear()
        try:
            await asyncio.to_thread(turn, poked)
            said = ""
        except AggregationError as error:
            if str(error) != said:
                log.error("%s: trying again", error)
            said = str(error)
        except Exception:
            # Whatever it is passes or is mended; the ticker must still be there then.
            log.exception("a tick failed; the next one tries again")
        took = time.monotonic() - began
        await asyncio.sleep(min(REST * took, REST_MAX))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, min(IDLE * took, IDLE_MAX))):
                await poke.wait()
