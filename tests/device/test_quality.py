"""The gate tells a worse adapter from bad luck."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from clients.probe import Measurement
from clients.quality import SIGNIFICANCE, luck

ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300)


def measured(right: tuple[bool, ...]) -> Measurement:
    return Measurement(len(right), sum(right) / len(right), 0.0, right)


@given(ANSWERS)
def test_a_probability_that_the_better_never_fails(answers: list[tuple[bool, bool]]) -> None:
    before, after = (measured(tuple(side)) for side in zip(*answers, strict=True))
    chance = luck(before, after)
    assert 0.0 <= chance <= 1.0
    if after.accuracy >= before.accuracy:
        assert chance > SIGNIFICANCE


@given(ANSWERS, st.integers(0, 299))
def test_one_more_lost_answer_makes_luck_less_likely(
    answers: list[tuple[bool, bool]], at: int
) -> None:
    at %= len(answers)
    answers[at] = (True, True)
    before, after = (measured(tuple(side)) for side in zip(*answers, strict=True))
    answers[at] = (True, False)
    worse = measured(tuple(now for _, now in answers))
    assert luck(before, worse) <= luck(before, after) + 1e-12


def test_an_adapter_that_is_no_worse_is_seldom_refused() -> None:
    rng = random.Random(5)  # noqa: S311 - a simulation
    refused, trials = 0, 2000
    for _ in range(trials):
        # Same accuracy, and a fifth of the answers differ, as between two noisy rounds.
        pairs = [
            (True, True) if rng.random() < 0.8 else (rng.random() < 0.5,) * 2 for _ in "x" * 99
        ]
        pairs = [(a, not a) if rng.random() < 0.2 else (a, b) for a, b in pairs]
        pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs]
        before, after = (measured(tuple(side)) for side in zip(*pairs, strict=True))
        refused += luck(before, after) <= SIGNIFICANCE
    assert refused / trials <= SIGNIFICANCE + 3 * (SIGNIFICANCE / trials) ** 0.5


def test_an_adapter_turned_round_is_refused_on_few_examples() -> None:
    assert luck(measured((True,) * 6 + (False,)), measured((False,) * 6 + (True,))) > SIGNIFICANCE
    assert luck(measured((True,) * 8 + (False,)), measured((False,) * 8 + (True,))) <= SIGNIFICANCE
    assert luck(measured((True,) * 4), measured((False,) * 4)) > SIGNIFICANCE
    assert luck(measured((True,) * 5), measured((False,) * 5)) <= SIGNIFICANCE
