"""The rollouts in the database: reading them, and what the next one starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from federation import tables
from federation.orders import BASE, Target
from federation.rollout import ACTIVE, Rollout, State
from federation.store import Store
from federation.waves import RolloutError


class NoRolloutError(RolloutError):
    """No rollout of that name."""


@dataclass(frozen=True)
class RolloutRecord:
    """A rollout as stored. Times are Unix seconds."""

    rollout: Rollout
    created: float
    updated: float


def records(store: Store, *, active: bool = False) -> list[RolloutRecord]:
    """All rollouts, newest first; or only those under way."""
    query = sa.select(tables.rollouts).order_by(tables.rollouts.c.number.desc())
    if active:
        query = query.where(tables.rollouts.c.state.in_([state.value for state in ACTIVE]))
    with store.read() as connection:
        return [_record(row) for row in connection.execute(query)]


def record(store: Store, rollout_id: str) -> RolloutRecord:
    """One rollout.

    Raises:
        NoRolloutError: no such rollout.
    """
    query = sa.select(tables.rollouts).where(tables.rollouts.c.id == rollout_id)
    with store.read() as connection:
        row = connection.execute(query).first()
    if row is None:
        raise NoRolloutError(f"no rollout {rollout_id!r}; see: airpeft rollout status")
    return _record(row)


def next_number(connection: sa.Connection) -> int:
    """Which rollout it is that is drafted next, from 1 on."""
    newest = connection.execute(sa.select(sa.func.max(tables.rollouts.c.number))).scalar()
    return (newest or 0) + 1


def next_id(connection: sa.Connection) -> str:
    """The name of the rollout that is drafted next."""
    return f"r-{next_number(connection)}"


def baseline(connection: sa.Connection) -> Target:
    """The release that the fleet has when nothing is under way.

    After a comparison it is the one before: a rollout of the winner brings it to everybody.
    """
    query = sa.select(tables.rollouts.c.body).order_by(tables.rollouts.c.number.desc())
    for (body,) in connection.execute(query):
        rollout = Rollout.from_mapping(body)
        if rollout.state is State.DONE and rollout.other is None:
            return rollout.release
        if rollout.state is not State.DRAFT and rollout.wave >= 0:
            return rollout.previous
    return BASE


def row_of(rollout: Rollout, now: float) -> dict[str, Any]:
    """The columns that change with a rollout."""
    return {"state": rollout.state.value, "updated": now, "body": rollout.to_mapping()}


def _record(row: Any) -> RolloutRecord:
    return RolloutRecord(Rollout.from_mapping(row.body), row.created, row.updated)
