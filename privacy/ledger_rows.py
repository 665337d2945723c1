"""The rows of a ledger: what stands in them, and the hash that chains them.

A row says that something was spent, and since schema 2 under which terms; or, since schema 2, what
its owner allows a client to spend at most. A row of either schema is hashed in the same way, so a
ledger of schema 1 is read, verified and gone on with as it is: the first new row marks the file as
one of schema 2, which AirPEFT before that refuses instead of misreading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql

from privacy.budget import Accountant, BudgetError, PrivacyBudget
from privacy.events import Event, read_event

SCHEMA = 2
READABLE = (1, 2)
GENESIS = hashlib.sha256(b"airpeft privacy ledger 1").hexdigest()
HASHED = ("number", "client", "run", "round", "inputs", "event", "unix_micro", "previous")

metadata = sql.MetaData()
events = sql.Table(
    "events",
    metadata,
    sql.Column("number", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("client", sql.String, nullable=False, index=True),
    sql.Column("run", sql.String, nullable=False),
    sql.Column("round", sql.Integer, nullable=False),
    sql.Column("inputs", sql.String, nullable=False),
    sql.Column("event", sql.Text, nullable=False),
    sql.Column("unix_micro", sql.Integer, nullable=False),
    sql.Column("previous", sql.String, nullable=False),
    sql.Column("hash", sql.String, nullable=False),
    sql.UniqueConstraint("run", "client", "round", "inputs"),
)
head = sql.Table(
    "head",
    metadata,
    sql.Column("id", sql.Integer, sql.CheckConstraint("id = 1"), primary_key=True),
    sql.Column("schema", sql.Integer, nullable=False),
    sql.Column("count", sql.Integer, nullable=False),
    sql.Column("hash", sql.String, nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Under what something may be spent, or was.

    Attributes:
        delta: at which epsilon is computed.
        epsilon: what everything together may reach; None for no bound.
        accountant: how events are composed.
        model: what was trained, such as the digest of an adapter's specification; empty if nobody
            said.
    """

    delta: float
    epsilon: float | None = None
    accountant: Accountant = Accountant.RDP
    model: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "accountant", Accountant(self.accountant))
        PrivacyBudget(1.0 if self.epsilon is None else self.epsilon, self.delta)  # checks both

    def to_mapping(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "delta": self.delta,
            "epsilon": self.epsilon,
            "accountant": self.accountant.value,
            "model": self.model,
        }


@dataclass(frozen=True)
class Entry:
    """One event of the ledger.

    Attributes:
        number: its place in the chain.
        client: who spent it.
        run: in which run.
        round: in which round.
        event: what was done.
        unix_micro: when it was recorded.
        inputs: fingerprint of what it was done to.
        terms: under which terms; None in a row of schema 1.
    """

    number: int
    client: str
    run: str
    round: int
    event: Event
    unix_micro: int
    inputs: str = ""
    terms: Terms | None = None


@dataclass(frozen=True)
class Limit:
    """What the owner of a ledger allows a client to spend, from that row on; None lifts it."""

    number: int
    client: str
    terms: Terms | None


def hash_of(row: Mapping[str, Any]) -> str:
    """The hash of a row, hexadecimal; it covers the hash of the row before it."""
    doc = json.dumps([row[key] for key in HASHED], separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(doc.encode()).hexdigest()


def event_text(event: Event, terms: Terms) -> str:
    """What stands in a row that spends."""
    return json.dumps({"event": event.to_mapping(), "terms": terms.to_mapping()}, sort_keys=True)


def limit_text(terms: Terms | None) -> str:
    """What stands in a row that limits."""
    return json.dumps({"limit": None if terms is None else terms.to_mapping()}, sort_keys=True)


def read(row: Mapping[str, Any]) -> Entry | Limit:
    """A row of either schema.

    Raises:
        ValueError: if it is none of ours; also as BudgetError, KeyError or TypeError.
    """
    doc = json.loads(row["event"])
    if "kind" in doc:  # schema 1
        return _entry(row, doc, None)
    if set(doc) == {"limit"}:
        terms = None if doc["limit"] is None else Terms(**doc["limit"])
        return Limit(row["number"], row["client"], terms)
    if set(doc) != {"event", "terms"}:
        raise ValueError(f"unknown fields {', '.join(sorted(doc))}")
    return _entry(row, doc["event"], Terms(**doc["terms"]))


UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, BudgetError)


def _entry(row: Mapping[str, Any], event: Mapping[str, Any], terms: Terms | None) -> Entry:
    return Entry(
        row["number"],
        row["client"],
        row["run"],
        row["round"],
        read_event(event),
        row["unix_micro"],
        row["inputs"],
        terms,
    )
