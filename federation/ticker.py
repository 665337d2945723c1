"""Carries rollouts out: stores what :mod:`federation.rollout` decides, then publishes it.

The order makes a kill at any point harmless. One transaction holds the rollout's new state, the
round's orders with its sequence, and the audit line; only then the repository is signed and
written; only then the round is marked as published. A start finds rounds that were decided and
not published, and publishes the newest of them; publishing the same round twice changes nothing.

One rollout at a time governs the fleet, since there is one round document. Where several gateways
share the database, one of them ticks (:mod:`federation.gateways`), and operators act at any: what
was decided from a state that is no longer so is never written (:mod:`federation.turns`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import sqlalchemy as sa

from federation import rollout_book as book
from federation import tables, turns
from federation.fleet import Fleet
from federation.four_eyes import check_alone
from federation.orders import Target
from federation.planning import Preview, Unreadable, preview
from federation.policy import Policy
from federation.publishing import Publisher
from federation.repository import Repository
from federation.rollout import Decision, Rollout, State, Verb, act, decide
from federation.rollout_book import RolloutRecord
from federation.rollout_nouns import ACTIVE, check_allowed
from federation.store import Store
from federation.waves import RolloutError, Wave

REASON_MAX = 500  # characters of an operator's words
STEPS_MAX = 16  # of one rollout in one tick; the longest chain is shorter

log = logging.getLogger("airpeft.federation.ticker")


class Ticker:
    """The one that changes rollouts; safe for threads.

    Args:
        store: the server's database.
        fleet: what is known of the devices.
        repository: opened with the online key.
        changed: called after the repository changed, from the calling thread.
        alone_share: see :mod:`federation.four_eyes`; None: no bound.
    """

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        repository: Repository,
        changed: Callable[[], None] = lambda: None,
        alone_share: float | None = None,
    ) -> None:
        self._store, self._fleet, self._repository = store, fleet, repository
        self._alone_share = alone_share
        self._publisher = Publisher(store, repository, changed)
        self._lock = threading.RLock()

    @property
    def trouble(self) -> str:
        """Why the last round could not be published; empty when all is well."""
        return self._publisher.trouble

    def create(
        self,
        release: str,
        waves: Sequence[Wave],
        policy: Policy,
        *,
        who: str,
        why: str = "",
        other: str | None = None,
    ) -> Rollout:
        """Draft a rollout.

        Args:
            release: name of a published one, such as ``stable-3``.
            waves: the last one must be 100%.
            policy: when to go on and when to stop.
            who: the operator, for the audit log.
            why: their words.
            other: name of another one that it is compared with; None for a plain rollout.

        Raises:
            NotFoundError: no such release.
            PublishError: it is revoked, or below its channel's floor.
            RolloutError: an impossible plan, or the fleet has this release already.
        """
        with self._lock, self._store.write() as connection:
            turns.take(connection)
            rollout = self._draft(connection, release, waves, policy, other)
            now = self._store.clock()
            row = {"id": rollout.id, "created": now, **book.row_of(rollout, now)}
            row["number"] = book.next_number(connection)
            connection.execute(tables.rollouts.insert().values(row))
            against = f" against {other}" if other else ""
            words = f"release {release}{against}; {why}" if why else f"release {release}{against}"
            self._store.log(connection, who, "draft", rollout.id, words)
        return rollout

    def preview(
        self,
        release: str,
        waves: Sequence[Wave],
        policy: Policy,
        *,
        other: str | None = None,
        unreadable: Unreadable = lambda record: (),
    ) -> Preview:
        """What a rollout would do to how many devices; nothing changes.

        ``unreadable`` names the devices that lack the key of an encrypted release.

        Raises:
            NotFoundError: no such release.
            RolloutError: an impossible plan, or the fleet has this release already.
        """
        with self._store.read() as connection:
            rollout = self._draft(connection, release, waves, policy, other)
        fits = [self._repository.release(one.release) for one in rollout.targets]
        stuck = self.way_back(rollout)[1]
        return preview(rollout, self._fleet.observations(rollout), fits, unreadable, stuck)

    def _draft(
        self,
        connection: sa.Connection,
        release: str,
        waves: Sequence[Wave],
        policy: Policy,
        other: str | None,
    ) -> Rollout:
        first = self._target(release)
        second = self._target(other) if other is not None else None
        both = (first,) if second is None else (first, second)
        draft = Rollout(
            id=book.next_id(connection),
            release=first,
            other=second,
            previous=book.baseline(connection, self._repository.refusal, both),
            waves=tuple(waves),
            policy=policy,
        )
        self._check_alone(draft)
        return draft

    def _check_alone(self, draft: Rollout) -> None:
        if self._alone_share is not None:
            check_alone(draft, self._fleet.observations(draft), self._alone_share)

    def _target(self, name: str) -> Target:
        record = self._repository.release(name)
        self._repository.check_orderable(record)
        return Target(record.name, record.target, record.sha256)

    def start(
        self,
        release: str,
        waves: Sequence[Wave],
        policy: Policy,
        *,
        who: str,
        why: str = "",
        other: str | None = None,
    ) -> Rollout:
        """Draft a rollout and start it; one that cannot start is aborted at once.

        Raises:
            NotFoundError: no such release.
            RolloutError: as for :meth:`create` and :meth:`act`.
        """
        with self._lock:
            book.check_governs(self.records(), None)
            draft = self.create(release, waves, policy, who=who, why=why, other=other)
            try:
                return self.act(draft.id, Verb.START, who=who, why=why)
            except RolloutError as error:
                self.act(draft.id, Verb.ABORT, who=who, why=str(error))
                raise

    def act(self, rollout_id: str, verb: Verb, *, who: str, why: str = "") -> Rollout:
        """Do what an operator asks, and publish what follows from it.

        Raises:
            NoRolloutError: no such rollout.
            RolloutError: its state doesn't allow it, or another rollout governs the fleet.
        """
        why = why[:REASON_MAX]
        with self._lock:
            acted = turns.settled(
                self._store, lambda turn: self._act(turn, rollout_id, verb, who, why)
            )
            self._publisher.publish()
        return acted

    def _act(self, turn: int, rollout_id: str, verb: Verb, who: str, why: str) -> Rollout:
        rollout, stuck = self.record(rollout_id).rollout, ""
        check_allowed(rollout, verb)
        if verb in (Verb.START, Verb.ROLLBACK):
            book.check_governs(self.records(), rollout)
        if verb is Verb.START:
            rollout = self._as_of_now(rollout)
        if verb is Verb.ROLLBACK:
            rollout, stuck = self.way_back(rollout)
        observations = self._fleet.observations(rollout)
        decision = act(rollout, verb, observations, self._store.clock(), why, who, stuck)
        self._apply(decision, who, verb.value, turn)
        return decision.rollout

    def _as_of_now(self, draft: Rollout) -> Rollout:
        """A draft that begins: time may have passed since it was made."""
        self._check_alone(draft)
        for target in draft.targets:
            self._repository.check_orderable(self._repository.release(target.release))
        with self._store.read() as connection:
            before = book.baseline(connection, self._repository.refusal, draft.targets)
        return replace(draft, previous=before)

    def way_back(self, rollout: Rollout) -> tuple[Rollout, str]:
        """See :func:`federation.rollout_book.way_back`."""
        with self._store.read() as connection:
            return book.way_back(connection, rollout, self._repository.refusal)

    def tick(self) -> None:
        """Publish what is pending and take every step that can be taken now.

        Raises:
            StorageError: the database cannot be written; the next tick tries again.
        """
        with self._lock:
            self._publisher.publish()
            for record in self.records(active=True):
                self._advance(record.rollout.id)
            self._fleet.flush()
            self._publisher.keep_fresh()

    def records(self, *, active: bool = False) -> list[RolloutRecord]:
        """All rollouts, newest first; or only those under way."""
        return book.records(self._store, active=active)

    def record(self, rollout_id: str) -> RolloutRecord:
        """One rollout.

        Raises:
            NoRolloutError: no such rollout.
        """
        return book.record(self._store, rollout_id)

    def _advance(self, rollout_id: str) -> None:
        for _ in range(STEPS_MAX):
            turn = turns.turn(self._store)
            rollout = self.record(rollout_id).rollout
            if rollout.state not in ACTIVE:
                return
            stuck = ""
            if rollout.state is State.HALTED:
                rollout, stuck = self.way_back(rollout)
            observations = self._fleet.observations(rollout)
            decision = decide(rollout, observations, self._store.clock(), stuck)
            if decision == Decision(rollout):
                return
            try:
                self._apply(decision, "ticker", "decide", turn)
            except turns.OvertakenError:
                continue
            self._publisher.publish()

    def _apply(self, decision: Decision, who: str, action: str, turn: int) -> None:
        rollout, now = decision.rollout, self._store.clock()
        self._repository.refresh()
        with self._store.write() as connection:
            turns.take(connection, turn)
            row = book.row_of(rollout, now)
            if action == Verb.START.value:  # a draft may be older than a rollout that has begun
                row |= book.newest_number(connection, rollout.id)
            update = tables.rollouts.update().where(tables.rollouts.c.id == rollout.id)
            connection.execute(update.values(row))
            if decision.orders is not None:
                known = connection.execute(sa.select(sa.func.max(tables.rounds.c.sequence)))
                sequence = max(known.scalar() or 0, self._repository.round().sequence) + 1
                row = {
                    "sequence": sequence,
                    "rollout": rollout.id,
                    "orders": asdict(decision.orders),
                    "decided": now,
                }
                connection.execute(tables.rounds.insert().values(row))
            if decision.line:
                self._store.log(connection, who, action, rollout.id, decision.line)
        if decision.line:
            log.info("rollout %s: %s", rollout.id, decision.line)
