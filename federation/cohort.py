"""Which clients a round asks.

The draw depends on the seed, the round and the clients' stable names, never on Flower's node ids
or on the order in which nodes connect: the same clients are drawn on every backend.

    >>> names = [f"client-{i:05d}" for i in range(10)]
    >>> draw(names, round_number=1, fraction=0.3, sampling="fixed", seed=7)
    ('client-00003', 'client-00005', 'client-00007')
    >>> draw(names, 1, 0.3, "fixed", 7) == draw(reversed(names), 1, 0.3, "fixed", 7)
    True
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable

from federation.errors import FederationError


class CohortError(FederationError):
    """No client can be asked."""


def draw(
    clients: Iterable[str], round_number: int, fraction: float, sampling: str, seed: int
) -> tuple[str, ...]:
    """Draw a round's clients.

    Args:
        clients: stable names of the clients that are there.
        round_number: the round.
        fraction: share of the clients.
        sampling: ``fixed`` draws ``ceil(fraction * n)`` without replacement; ``poisson`` flips a
            coin for each client, so that a round may even be empty: that is what the amplification
            of client-level privacy by sampling asks for.
        seed: root seed of the run.

    Returns:
        names in ascending order.
    """
    # Each client's lot is a number in [0, 1) of its own: no generator, hence no order, is shared.
    lots = {name: _lot(seed, round_number, name) for name in clients}
    if sampling == "poisson":
        return tuple(sorted(name for name, lot in lots.items() if lot < fraction))
    count = math.ceil(fraction * len(lots) - 1e-9)
    return tuple(sorted(sorted(lots, key=lambda name: (lots[name], name))[:count]))


def gather(
    connected: Callable[[], Collection[int]],
    *,
    wanted: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[int]:
    """Wait until enough nodes are connected, but never for ever.

    Args:
        connected: gives the nodes that are there now.
        wanted: how many to wait for.
        seconds: how long to wait.
        clock: seconds that only grow.
        sleep: pauses between two looks.

    Returns:
        the nodes, in ascending order; fewer than wanted if the time is up.

    Raises:
        CohortError: if the time is up and there is none.
    """
    deadline = clock() + seconds
    while len(nodes := sorted(connected())) < wanted and clock() < deadline:
        sleep(min(1.0, max(0.05, seconds / 20)))
    if not nodes:
        raise CohortError(
            f"no client connected within {seconds:.0f} s: start them, or wait longer for them"
        )
    return nodes


def _lot(seed: int, round_number: int, name: str) -> float:
    digest = hashlib.sha256(f"cohort:{seed}:{round_number}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
