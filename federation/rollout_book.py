"""The rollouts in the database: reading them, and what the next one starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from federation import tables
from federation.orders import BASE, Target
from federation.rollout import ACTIVE, Rollout, State
from federation.store import Store
from federation.waves import RolloutError

Refusal = Callable[[str], str]


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


def check_governs(known: Sequence[RolloutRecord], rollout: Rollout | None) -> None:
    """Refuse if another rollout is under way, or came after this one.

    Args:
        known: all rollouts, newest first.
        rollout: that is to govern the fleet; None for one that is not drafted yet.

    Raises:
        RolloutError: names the other one.
    """
    newer = True
    for record in known:
        other = record.rollout
        if rollout is not None and other.id == rollout.id:
            newer = False
        elif other.state in ACTIVE:
            raise RolloutError(
                f"rollout {other.id} of {other.release.release} is {other.state}: wait for it,"
                f" or stop it with: airpeft rollout abort {other.id}"
            )
        elif newer and rollout is not None and rollout.wave >= 0 and other.wave >= 0:
            raise RolloutError(
                f"rollout {other.id} came after {rollout.id}: start a new rollout of the"
                " release that you want"
            )


def next_number(connection: sa.Connection) -> int:
    """Which rollout it is that is drafted next, from 1 on."""
    newest = connection.execute(sa.select(sa.func.max(tables.rollouts.c.number))).scalar()
    return (newest or 0) + 1


def newest_number(connection: sa.Connection, rollout_id: str) -> dict[str, Any]:
    """The column that makes a rollout the newest of all; empty if it is.

    The order of rollouts is that in which they began.
    """
    number = tables.rollouts.c.number
    newest = connection.execute(sa.select(tables.rollouts.c.id).order_by(number.desc())).scalar()
    return {} if newest == rollout_id else {"number": next_number(connection)}


def next_id(connection: sa.Connection) -> str:
    """The name of the rollout that is drafted next."""
    return f"r-{next_number(connection)}"


def baseline(
    connection: sa.Connection, refusal: Refusal = lambda name: "", but: Sequence[Target] = ()
) -> Target:
    """The release that the fleet has when nothing is under way.

    After a comparison it is the one before: a rollout of the winner brings it to everybody. One
    that devices refuse by now (revoked, or below the floor) they have left or will leave, so the
    newest one before it counts that they take; where there is none, the newest after all.

    Args:
        connection: to the database.
        refusal: why devices would refuse a release, by its name; empty if they would not.
        but: never one of these instead of a refused one.
    """
    found = _baselines(connection)
    newest = next(found)
    if not refusal(newest.release):
        return newest
    return next((one for one in found if one not in but and not refusal(one.release)), newest)


def way_back(connection: sa.Connection, rollout: Rollout, refusal: Refusal) -> tuple[Rollout, str]:
    """The rollout with a release before that devices take; and why they don't, if there is none.

    Args:
        connection: to the database.
        rollout: that is to be rolled back.
        refusal: as for :func:`baseline`.
    """
    why = refusal(rollout.previous.release)
    if not why:
        return rollout, ""
    for one in _baselines(connection, without=rollout.id):
        if one not in rollout.targets and not refusal(one.release):
            return replace(rollout, previous=one), ""
    return rollout, why


def _baselines(connection: sa.Connection, without: str = "") -> Iterator[Target]:
    """What the fleet had after each rollout that began, the newest first; at last the base."""
    query = sa.select(tables.rollouts.c.body).order_by(tables.rollouts.c.number.desc())
    for (body,) in connection.execute(query):
        rollout = Rollout.from_mapping(body)
        if rollout.id == without or rollout.wave < 0:
            continue
        if rollout.state is State.DONE and rollout.other is None:
            yield rollout.release
        else:
            yield rollout.previous
    yield BASE


def row_of(rollout: Rollout, now: float) -> dict[str, Any]:
    """The columns that change with a rollout."""
    return {"state": rollout.state.value, "updated": now, "body": rollout.to_mapping()}


def _record(row: Any) -> RolloutRecord:
    return RolloutRecord(Rollout.from_mapping(row.body), row.created, row.updated)
