"""The bound from guesses: right about mechanisms whose epsilon is known exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from privacy.audit_bound import AuditError, guess, lower_bound, p_value


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.data(), st.floats(0.0, 6.0), st.sampled_from([0.0, 1e-6, 1e-3]))
def test_more_right_guesses_are_never_more_probable(
    guesses: int, data: st.DataObject, epsilon: float, delta: float
) -> None:
    right = data.draw(st.integers(0, guesses - 1))
    fixed: dict[str, Any] = {"canaries": 400, "guesses": guesses, "delta": delta}
    one = p_value(right=right, epsilon=epsilon, **fixed)
    more = p_value(right=right + 1, epsilon=epsilon, **fixed)
    assert more <= one + 1e-9
    assert p_value(right=right, epsilon=epsilon + 0.5, **fixed) >= one - 1e-9
    assert lower_bound(right=right + 1, **fixed) >= lower_bound(right=right, **fixed) - 1e-6


def test_without_delta_it_is_the_binomial_bound() -> None:
    bound = lower_bound(canaries=500, guesses=500, right=450, delta=0.0)
    share = 1 / (1 + math.exp(-bound))
    assert binom.sf(449, 500, share) == pytest.approx(0.05, rel=1e-6)


def test_randomised_response_is_bounded_from_below_and_not_beyond_its_epsilon() -> None:
    draw = np.random.default_rng(0)
    epsilon, canaries = 1.0, 2000
    keep = math.exp(epsilon) / (1 + math.exp(epsilon))
    bounds = []
    for _ in range(200):
        planted = draw.random(canaries) < 0.5
        said = np.where(draw.random(canaries) < keep, planted, ~planted)
        guesses, right = guess(said.astype(float), planted, share=1.0, centre=0.5)
        bounds.append(lower_bound(canaries=canaries, guesses=guesses, right=right, delta=0.0))
    assert np.mean(np.array(bounds) > epsilon) <= 0.08  # 5 % is promised
    assert np.median(bounds) > 0.85


def test_what_cannot_be_audited_is_refused() -> None:
    with pytest.raises(AuditError, match="right=5"):
        p_value(canaries=10, guesses=4, right=5, epsilon=1.0, delta=0.0)
    with pytest.raises(AuditError, match="confidence=1"):
        lower_bound(canaries=10, guesses=4, right=4, delta=0.0, confidence=1.0)
    with pytest.raises(AuditError, match="plant more"):
        guess(np.zeros(3), np.zeros(3, bool), share=0.2)
