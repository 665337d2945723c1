from __future__ import annotations

import itertools
import random
import threading

from hypothesis import given
from hypothesis import strategies as st

from clients.link import Backoff, Watchdog
from tests.waiting import until


@given(st.integers(), st.floats(0.01, 10), st.floats(10, 1000))
def test_backoff_stays_below_a_doubling_bound_and_starts_again(seed, base, cap):
    backoff = Backoff(random.Random(seed), base=base, cap=cap)  # noqa: S311
    for tries in range(80):
        assert 0 <= backoff.next() <= min(cap, base * 2.0**tries)
    assert backoff.next(at_least=7.0) >= 7.0
    backoff.reset()
    assert backoff.next() <= base


def test_a_fleet_comes_back_spread_out():
    waits = sorted(Backoff(random.Random(n), base=8.0).next() for n in range(400))  # noqa: S311
    assert waits[0] < 0.5
    assert waits[-1] > 7.5
    assert max(b - a for a, b in itertools.pairwise(waits)) < 0.5


def test_watchdog_bites_on_silence_only():
    now, bitten, late = [0.0], threading.Event(), threading.Event()
    with Watchdog(0.2, bitten.set, clock=lambda: now[0]) as dog:
        for _ in range(10):
            now[0] += 0.15
            dog.feed()
        dog.rest()
        now[0] += 60.0
        assert not bitten.wait(0.3), "the receiver's own work is not silence"
        dog.feed()
        assert not bitten.is_set()
        now[0] += 0.25
        until(bitten.is_set, what="the bite")
    with Watchdog(0.05, late.set, clock=lambda: now[0]):
        pass
    now[0] += 60.0
    assert not late.wait(0.2), "a call that has ended is left alone"
