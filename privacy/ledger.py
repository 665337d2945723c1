"""What has been spent, by whom, for ever: append-only events in SQLite, chained by hashes.

    >>> import tempfile
    >>> from privacy.budget import PrivacyBudget
    >>> from privacy.events import SgdEvent
    >>> folder = tempfile.TemporaryDirectory()
    >>> ledger = Ledger(Path(folder.name) / "ledger.sqlite")
    >>> event = SgdEvent(noise_multiplier=1.0, sample_rate=0.1, steps=5, max_grad_norm=1.0)
    >>> first = ledger.spend("ann", "run-1", 1, event, PrivacyBudget(8.0, 1e-5))
    >>> ledger.spend("ann", "run-1", 1, event, PrivacyBudget(8.0, 1e-5)).repeated
    True
    >>> ledger.spent("ann", 1e-5) == first.epsilon
    True
    >>> ledger.close()

The rules it keeps:

* **Write-ahead.** :meth:`Ledger.spend` returns after the event is on the disk; training starts
  after it returns. A kill before that spends nothing, a kill after it has spent once.
* **Once.** An event is named by run, client, round and the fingerprint of what was trained; the
  same name again costs nothing, because the same noise would be released again.
* **Refusal before the step.** An event that would pass the budget raises and leaves no trace. So
  does one that would pass the limit that the ledger's owner has set in it, whatever budget whoever
  asks comes with (:meth:`Ledger.limit`).
* **Tamper evidence.** Each row's hash covers the row and the hash before it. Editing, removing or
  reordering rows is found when the ledger is opened; a ledger replaced as a whole by an older copy
  is found by whoever kept its :meth:`Ledger.head`.

Several processes may use one ledger; each spend is one exclusive transaction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from privacy import calibration
from privacy import ledger_rows as rows
from privacy.budget import Accountant, BudgetError, BudgetExceeded, PrivacyBudget
from privacy.events import Event
from privacy.ledger_file import LedgerError, locate, open_engine
from privacy.ledger_rows import GENESIS, Entry, Limit, Terms

__all__ = ["Entry", "Head", "Ledger", "LedgerEdited", "LedgerError", "Spent", "Terms"]

EVERYBODY = "*"  # in a limit: every client of the ledger that has none of its own


class LedgerEdited(LedgerError):  # noqa: N818 - says what happened
    """The chain of hashes does not hold: what was spent is no longer known."""


@dataclass(frozen=True)
class Head:
    """How many events there are, and the hash of the last one."""

    count: int
    hash: str


@dataclass(frozen=True)
class Spent:
    """What a client has spent after an event, and whether that event was already there."""

    epsilon: float
    repeated: bool


class Ledger:
    """An open ledger.

    Args:
        path: the SQLite file, made if it is missing; or a ``sqlite:///`` URL.
        now: seconds since 1970, for the record; nothing depends on it.
        read_only: look at a ledger that is there; make and change nothing.

    Raises:
        LedgerError: if the file is not a ledger, or, read-only, is not there.
        LedgerEdited: if it was edited or truncated.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        now: Callable[[], float] = time.time,
        read_only: bool = False,
    ) -> None:
        self.path = locate(path)
        self._now = now
        self.engine = open_engine(self.path, read_only=read_only)
        if not read_only:
            self._make_tables()
        self.verify()

    def _make_tables(self) -> None:
        with self._transaction() as connection:
            _metadata.create_all(connection)
            if connection.execute(sql.select(_head.c.id)).first() is None:
                if connection.execute(sql.select(_events.c.number).limit(1)).first() is not None:
                    raise self._edited("the head is missing")
                connection.execute(
                    _head.insert().values(id=1, schema=SCHEMA, count=0, hash=GENESIS)
                )

    def spend(
        self,
        client: str,
        run: str,
        round: int,  # noqa: A002 - the word of the domain
        event: Event,
        budget: PrivacyBudget | None,
        *,
        accountant: Accountant | str = Accountant.RDP,
        delta: float | None = None,
        inputs: str = "",
    ) -> Spent:
        """Record an event durably, or refuse it.

        Args:
            client: the client's stable name.
            run: name of the run.
            round: number of the round.
            event: what is about to be done; call this before it is done.
            budget: what the client's events of all runs may reach together; None for no limit.
            accountant: how to compose.
            delta: for the epsilon returned when there is no budget.
            inputs: fingerprint of everything that the training depends on; the same round with
                other inputs is another event.

        Raises:
            BudgetExceeded: if the budget would be passed; nothing is recorded.
            LedgerError: if the ledger is damaged or stays locked.
        """
        at = budget.delta if budget else delta
        if at is None:
            raise BudgetError("without a budget, give the delta at which epsilon is to be computed")
        name = {"run": run, "client": client, "round": round, "inputs": inputs}
        text = json.dumps(event.to_mapping(), sort_keys=True)
        with self._transaction() as connection:
            before = self._events_of(connection, client)
            known = connection.execute(
                sql.select(_events.c.event).where(*(_events.c[k] == v for k, v in name.items()))
            ).scalar()
            if known is not None:
                if known != text:
                    raise LedgerError(
                        f"{self.path}: {client} has already spent another event in round {round} "
                        f"of run {run}; a new training needs a new round or run"
                    )
                return Spent(calibration.epsilon(before, at, accountant), repeated=True)
            total = calibration.epsilon([*before, event], at, accountant)
            if budget is not None and total > budget.epsilon:
                raise BudgetExceeded(
                    f"{client}: round {round} of run {run} would bring epsilon from "
                    f"{calibration.epsilon(before, at, accountant):.3f} to {total:.3f}, above the "
                    f"budget of {budget.epsilon} at delta={budget.delta} per {budget.unit}; "
                    "nothing was spent. Stop here, raise the budget, or train with more noise or "
                    "fewer steps"
                )
            self._append(connection, {**name, "event": text})
        return Spent(total, repeated=False)

    def spent(
        self, client: str, delta: float, accountant: Accountant | str = Accountant.RDP
    ) -> float:
        """Epsilon of everything that a client has ever spent, at this delta."""
        with self._transaction("BEGIN") as connection:
            events = self._events_of(connection, client)
        return calibration.epsilon(events, delta, accountant)

    def clients(self) -> tuple[str, ...]:
        """Names of all clients that ever spent, sorted."""
        query = sql.select(_events.c.client).distinct().order_by(_events.c.client)
        with self._transaction("BEGIN") as connection:
            return tuple(connection.execute(query).scalars())

    def table(self, client: str | None = None) -> list[Entry]:
        """All events, or those of one client, oldest first."""
        query = sql.select(_events).order_by(_events.c.number)
        if client is not None:
            query = query.where(_events.c.client == client)
        with self._transaction("BEGIN") as connection:
            rows = connection.execute(query).mappings().all()
        return [
            Entry(**{k: r[k] for k in _HASHED if k not in _UNTOLD}, event=self._event(r))
            for r in rows
        ]

    def head(self) -> Head:
        """The number of events and the last hash; kept elsewhere, it reveals a swapped file."""
        with self._transaction("BEGIN") as connection:
            return self._read_head(connection)

    def verify(self, *, since: Head | None = None) -> Head:
        """Check every hash from the first event to the head.

        Args:
            since: an earlier head that must still be part of the chain.

        Raises:
            LedgerEdited: naming the first event that does not fit.
        """
        with self._transaction("BEGIN") as connection:
            head = self._read_head(connection)
            rows = connection.execute(sql.select(_events).order_by(_events.c.number)).mappings()
            previous, count = GENESIS, 0
            for row in rows:
                count += 1
                fits = row["number"] == count and row["previous"] == previous
                if not fits or row["hash"] != _hash(dict(row)):
                    raise self._edited(f"event {row['number']} does not fit the one before it")
                self._event(row)
                previous = row["hash"]
                if since is not None and count == since.count and previous != since.hash:
                    raise self._edited(f"event {count} is not the one that was there before")
        if (count, previous) != (head.count, head.hash):
            raise self._edited(f"the head tells of {head.count} events, there are {count}")
        if since is not None and count < since.count:
            raise self._edited(f"{since.count} events were there before, now there are {count}")
        return head

    def close(self) -> None:
        """Close the connections; the file stays."""
        self.engine.dispose()

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sql.Connection]:
        try:
            with (
                self.engine.connect().execution_options(begin=begin) as connection,
                connection.begin(),
            ):
                yield connection
        except sql.exc.OperationalError as error:
            raise LedgerError(
                f"{self.path}: cannot be used: {error.orig}. If another process holds it, wait for "
                "that; if the disk is full or the folder not writable, mend that"
            ) from error
        except sql.exc.DatabaseError as error:
            raise self._edited(str(error.orig)) from error

    def _append(self, connection: sql.Connection, values: dict[str, Any]) -> None:
        head = self._read_head(connection)
        row = {
            **values,
            "number": head.count + 1,
            "unix_micro": int(self._now() * 1_000_000),
            "previous": head.hash,
        }
        row["hash"] = _hash(row)
        connection.execute(_events.insert().values(**row))
        connection.execute(_head.update().values(count=row["number"], hash=row["hash"]))

    def _read_head(self, connection: sql.Connection) -> Head:
        row = connection.execute(sql.select(_head)).mappings().first()
        if row is None:
            raise self._edited("the head is missing")
        if row["schema"] != SCHEMA:
            raise LedgerError(
                f"{self.path}: schema {row['schema']} was written by another version of AirPEFT; "
                f"this one reads schema {SCHEMA}"
            )
        return Head(row["count"], row["hash"])

    def _events_of(self, connection: sql.Connection, client: str) -> list[Event]:
        query = sql.select(_events).where(_events.c.client == client).order_by(_events.c.number)
        events = []
        for row in connection.execute(query).mappings():
            if row["hash"] != _hash(dict(row)):
                raise self._edited(f"event {row['number']} does not fit its hash")
            events.append(self._event(row))
        return events

    def _event(self, row: Any) -> Event:
        try:
            return read_event(json.loads(row["event"]))
        except (ValueError, TypeError, BudgetError) as error:
            raise self._edited(f"event {row['number']} is not readable: {error}") from None

    def _edited(self, what: str) -> LedgerEdited:
        return LedgerEdited(
            f"{self.path}: the ledger was edited or damaged: {what}. Do not train with it: what "
            "was spent is no longer known. Restore the file from a backup, with its -wal file"
        )


def _hash(row: dict[str, Any]) -> str:
    doc = json.dumps([row[key] for key in _HASHED], separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(doc.encode()).hexdigest()
