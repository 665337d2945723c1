"""Decisions about rollouts, one after the other, however many gateways there are.

A decision is made from what was read, and written later. So the database counts decisions: whoever
writes one says how many there were when it began to read, and is refused if somebody was quicker.
That also fences off a gateway which was asleep and still believes that it decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa

from federation import tables
from federation.store import Store
from federation.waves import RolloutError

T = TypeVar("T")
TURN = "turn"
TRIES = 8


class OvertakenError(RolloutError):
    """Somebody else has decided in between; what was read is no longer so."""


def turn(store: Store) -> int:
    """How many decisions there were; ask before reading what a decision is made from."""
    with store.read() as connection:
        return _number(connection)


def take(connection: sa.Connection, seen: int | None = None) -> None:
    """Count one more decision, in the transaction that writes it.

    Args:
        connection: in a transaction that writes.
        seen: what :func:`turn` said; None where all was read in this very transaction.

    Raises:
        OvertakenError: there was another one since.
    """
    now = _number(connection)
    if seen is not None and now != seen:
        raise OvertakenError("other gateways are deciding about rollouts at this moment: try again")
    mark = tables.marks.update().where(tables.marks.c.name == TURN)
    connection.execute(mark.values(value=str(now + 1)))


def settled(store: Store, attempt: Callable[[int], T]) -> T:
    """What an attempt gives that nobody overtook; it is told its turn.

    Raises:
        OvertakenError: after eight attempts.
    """
    for _ in range(TRIES - 1):
        try:
            return attempt(turn(store))
        except OvertakenError:
            continue
    return attempt(turn(store))


def _number(connection: sa.Connection) -> int:
    query = sa.select(tables.marks.c.value).where(tables.marks.c.name == TURN)
    return int(connection.execute(query).scalar_one())
