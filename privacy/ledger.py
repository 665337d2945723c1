"""What has been spent, by whom, for ever: append-only events in SQLite, chained by hashes.

    >>> import tempfile
    >>> from pathlib import Path
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

from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sql

from privacy import calibration
from privacy import ledger_rows as rows
from privacy.budget import Accountant, BudgetError, BudgetExceeded, PrivacyBudget
from privacy.events import Event
from privacy.ledger_chain import Chain, Head, LedgerEdited
from privacy.ledger_file import LedgerError
from privacy.ledger_rows import Entry, Limit, Terms

__all__ = ["Entry", "Head", "Ledger", "LedgerEdited", "LedgerError", "Spent", "Terms"]

EVERYBODY = "*"  # in a limit: every client of the ledger that has none of its own


@dataclass(frozen=True)
class Spent:
    """What a client has spent after an event, and whether that event was already there."""

    epsilon: float
    repeated: bool


class Ledger(Chain):
    """An open ledger.

    Args:
        path: the SQLite file, made if it is missing; or a ``sqlite:///`` URL.
        now: seconds since 1970, for the record; nothing depends on it.
        read_only: look at a ledger that is there; make and change nothing.

    Raises:
        LedgerError: if the file is not a ledger, or, read-only, is not there.
        LedgerEdited: if it was edited or truncated.
    """

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
        model: str = "",
    ) -> Spent:
        """Record an event durably, or refuse it.

        Args:
            client: the client's stable name.
            run: name of the run.
            round: number of the round.
            event: what is about to be done; call this before it is done.
            budget: what the client's events of all runs and models may reach together; None for
                no limit.
            accountant: how to compose.
            delta: for the epsilon returned when there is no budget.
            inputs: fingerprint of everything that the training depends on; the same round with
                other inputs is another event.
            model: what is trained, for the record.

        Raises:
            BudgetExceeded: if the budget would be passed, or the limit that stands in the ledger;
                nothing is recorded.
            LedgerError: if the ledger is damaged or stays locked.
        """
        at = budget.delta if budget else delta
        if at is None:
            raise BudgetError("without a budget, give the delta at which epsilon is to be computed")
        terms = Terms(
            delta=at,
            epsilon=budget.epsilon if budget else None,
            accountant=Accountant(accountant),
            model=model,
        )
        name = {"run": run, "client": client, "round": round, "inputs": inputs}
        what = f"{client}: round {round} of run {run}"
        with self._transaction() as connection:
            before = [entry.event for entry in self._entries(connection, client)]
            query = sql.select(rows.events).where(*(rows.events.c[k] == v for k, v in name.items()))
            known = connection.execute(query).mappings().first()
            if known is not None:
                found = self._read(known)
                if not isinstance(found, Entry) or found.event != event:
                    raise LedgerError(
                        f"{self.path}: {client} has already spent another event in round {round} "
                        f"of run {run}; a new training needs a new round or run"
                    )
                return Spent(calibration.epsilon(before, at, accountant), repeated=True)
            total = calibration.epsilon([*before, event], at, accountant)
            _refuse(what, before, event, terms, "the budget", f"per {event.unit.value}")
            limit = self._limit(connection, client)
            if limit is not None:
                _refuse(what, before, event, limit, "the limit in this ledger", "set by its owner")
            text = rows.event_text(event, terms)
            self._append(connection, {**name, "event": text})
        return Spent(total, repeated=False)

    def set_limit(self, terms: Terms | None, client: str = EVERYBODY) -> None:
        """Allow a client no more than this from now on, whoever asks; durable on return.

        Args:
            terms: epsilon, delta and accountant; None takes an earlier limit back.
            client: of whom; ``*`` for every one who has no limit of its own.

        Raises:
            BudgetError: if the terms name no epsilon.
        """
        if terms is not None and terms.epsilon is None:
            raise BudgetError("a limit needs an epsilon; None instead of terms lifts a limit")
        with self._transaction() as connection:
            number = self._read_head(connection).count + 1
            name = {"run": "", "client": client, "round": number, "inputs": ""}
            self._append(connection, {**name, "event": rows.limit_text(terms)})

    def limit(self, client: str) -> Terms | None:
        """What the ledger's owner allows a client at most, or None."""
        with self._transaction("BEGIN") as connection:
            return self._limit(connection, client)

    def spent(
        self, client: str, delta: float, accountant: Accountant | str = Accountant.RDP
    ) -> float:
        """Epsilon of everything that a client has ever spent, at this delta."""
        return calibration.epsilon([e.event for e in self.table(client)], delta, accountant)

    def clients(self) -> tuple[str, ...]:
        """Names of all clients that ever spent, sorted."""
        return tuple(sorted({entry.client for entry in self.table()}))

    def table(self, client: str | None = None) -> list[Entry]:
        """All events, or those of one client, oldest first."""
        with self._transaction("BEGIN") as connection:
            return list(self._entries(connection, client))

    def _entries(self, connection: sql.Connection, client: str | None) -> Iterator[Entry]:
        query = sql.select(rows.events).order_by(rows.events.c.number)
        if client is not None:
            query = query.where(rows.events.c.client == client)
        for row in connection.execute(query).mappings():
            found = self._read(row)
            if isinstance(found, Entry):
                yield found

    def _limit(self, connection: sql.Connection, client: str) -> Terms | None:
        """The last limit of the client itself, or else of everybody."""
        query = sql.select(rows.events).where(
            rows.events.c.client.in_([client, EVERYBODY]), rows.events.c.run == ""
        )
        found: dict[str, Terms | None] = {}
        for row in connection.execute(query.order_by(rows.events.c.number)).mappings():
            limit = self._read(row)
            if isinstance(limit, Limit):
                found[limit.client] = limit.terms
        return found.get(client) or found.get(EVERYBODY)


def _refuse(
    what: str, before: list[Event], event: Event, terms: Terms, bound: str, whose: str
) -> None:
    """Raise if an event would pass a bound."""
    if terms.epsilon is None:
        return
    total = calibration.epsilon([*before, event], terms.delta, terms.accountant)
    if total > terms.epsilon:
        spent = calibration.epsilon(before, terms.delta, terms.accountant)
        raise BudgetExceeded(
            f"{what} would bring epsilon from {spent:.3f} to {total:.3f}, above {bound} of "
            f"{terms.epsilon} at delta={terms.delta} {whose}; nothing was spent. Stop here, raise "
            "it, or train with more noise or fewer steps"
        )
