"""Audits of the central mechanism, honest and broken, and the verdict itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.clipped_sum import Normals, Release, VectorSum
from privacy.audit import Audit, canaries_for, ceiling, judge, most, refutable
from privacy.audit_bound import AuditError, lower_bound, widest_gap
from privacy.audit_canaries import SCALE, Canaries, log_ratio
from privacy.audit_central import Central, NoisySums, audit
from privacy.calibration import epsilon, noise_multiplier
from privacy.events import SgdEvent
from privacy.randomness import Stream, derive, seeded_key

SIZE, CLIP, EXPECTED, DELTA = 4000, 0.5, 7.0, 1e-6
KEY = seeded_key(5)


def event(claimed: float, *, rate: float = 0.2, rounds: int = 30) -> SgdEvent:
    sigma = noise_multiplier(claimed, DELTA, rate, rounds)
    return SgdEvent(noise_multiplier=sigma, sample_rate=rate, steps=rounds, max_grad_norm=CLIP)


class Keystream:
    """Noise as the server's account gives it, without a ledger."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def pay(self, number: int, inputs: str) -> Normals:
        stream = Stream(derive(KEY, number, inputs))
        return lambda name, count: self.scale * stream.normal(count)


def mechanism(of: SgdEvent, noise: Keystream | None = None, **broken: float) -> NoisySums:
    release = replace(Release(of.max_grad_norm, of.noise_multiplier, EXPECTED), **broken)
    return NoisySums(lambda number: VectorSum(SIZE, release, number, noise or Keystream()))


def unclipped(of: SgdEvent) -> NoisySums:
    """The right noise on vectors that nobody clips."""
    return mechanism(of, clip=1e3 * of.max_grad_norm, multiplier=of.noise_multiplier / 1e3)


def audited(
    run: Central, of: SgdEvent, claimed: float, *, canaries: int = 2000, seed: int = 1
) -> Audit:
    """Twenty clients beside the canaries, all drawn, with updates of three times the clip."""
    draw = np.random.default_rng(seed)
    set_of = Canaries(canaries, of, seeded_key(seed))
    audit(
        run,
        set_of,
        size=SIZE,
        denominator=EXPECTED,
        others=lambda _: (draw.normal(0.0, 3 * CLIP / SIZE**0.5, SIZE) for _ in range(20)),
    )
    return judge(set_of, claimed=claimed, delta=DELTA, mechanism="central")


@pytest.mark.parametrize("claimed", [1.0, 4.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_an_honest_sum_is_not_refuted(claimed: float, seed: int) -> None:
    of = event(claimed)
    found = audited(mechanism(of), of, claimed, seed=seed)
    assert not found.broken, found.faults
    assert 0.0 <= found.measured < claimed
    assert found.refutable
    assert found.noise_seen == pytest.approx(of.noise_multiplier, rel=0.03)
    assert found.reach_seen == pytest.approx(1.0, abs=0.1)


def test_the_audit_has_power_where_little_is_promised() -> None:
    of = event(30.0)
    found = audited(mechanism(of), of, 30.0)
    assert 3.0 < found.measured < 30.0
    assert not found.broken
    weaker = audited(mechanism(event(8.0)), event(8.0), 8.0)
    assert 1.0 < weaker.measured < found.measured


def test_noise_that_is_left_out_is_caught() -> None:
    of = event(4.0)
    found = audited(mechanism(of, Keystream(0.0)), of, 4.0)
    assert found.measured > 4.0
    assert "promises 4" in found.faults[0]
    assert (found.noise_seen, found.broken) == (pytest.approx(0.0, abs=0.2), True)


def test_a_clip_that_is_left_out_is_caught() -> None:
    of = event(4.0)
    found = audited(unclipped(of), of, 4.0)
    assert found.measured > 4.0
    assert found.reach_seen == pytest.approx(SCALE, rel=0.1)


def test_an_accountant_that_counts_one_round_is_caught() -> None:
    of = event(15.0, rate=0.5, rounds=50)
    counted = epsilon([replace(of, steps=1)], DELTA)
    found = audited(mechanism(of), of, counted, canaries=1000)
    assert found.measured > counted
    assert len(found.faults) == 1  # the mechanism itself does what it says
    assert found.measured < epsilon([of], DELTA)


def test_noise_that_is_too_small_is_seen_even_where_the_bound_is_not_reached() -> None:
    of = event(4.0)
    found = audited(mechanism(of, Keystream(0.85)), of, 4.0)
    assert found.measured < 4.0
    assert [fault.split()[1] for fault in found.faults] == ["noise"]
    twice = audited(mechanism(of, clip=2 * CLIP, multiplier=of.noise_multiplier / 2), of, 4.0)
    assert any("one canary moves" in fault for fault in twice.faults)


def test_a_true_claim_survives_as_often_as_is_promised() -> None:
    """Gaussian noise at its exact epsilon, many audits: at most one in twenty may err."""
    of = event(1.0, rate=1.0, rounds=1)
    bounds = []
    for seed in range(60):
        canaries = Canaries(1000, of, seeded_key(seed))
        canaries.point(np.ones(1000, np.bool_))
        canaries.draw()
        noise = Stream(derive(seeded_key(seed), "noise")).normal(1000) * of.noise_multiplier
        # The sum of the clipped canaries, each along its own coordinate, and the noise.
        clipped = canaries.vectors(np.flatnonzero(canaries.planted)).sum(axis=0) / SCALE
        canaries.see(clipped + CLIP * noise)
        bounds.append(judge(canaries, claimed=1.0, delta=DELTA, mechanism="central").measured)
    assert np.mean(np.array(bounds) > 1.0) <= 0.05


@settings(max_examples=25, deadline=None)
@given(st.integers(100, 400), st.integers(400, 3000), st.data())
def test_canaries_are_orthonormal_and_touch_only_what_trains(
    count: int, size: int, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 2**32))
    trains = np.random.default_rng(seed).random(size) < 0.9
    canaries = Canaries(count, event(4.0), seeded_key(seed))
    if trains.sum() < count:
        with pytest.raises(AuditError, match=f"plant at most {trains.sum()}"):
            canaries.point(trains)
        return
    canaries.point(trains)
    vectors = canaries.vectors(np.arange(count)).astype(np.float64)
    assert np.allclose(vectors @ vectors.T, (SCALE * CLIP) ** 2 * np.eye(count), atol=1e-4)
    assert not vectors[:, ~trains].any()
    blocks = canaries.blocks(np.arange(count))
    assert np.concatenate(blocks).tolist() == list(range(count))


def test_coins_are_fair_and_canaries_are_drawn_at_the_rate() -> None:
    canaries = Canaries(20_000, event(4.0, rate=0.3), KEY)
    assert abs(canaries.planted.mean() - 0.5) < 0.02
    drawn = canaries.draw()
    assert canaries.planted[drawn].all()
    assert len(drawn) / canaries.planted.sum() == pytest.approx(0.3, abs=0.02)
    assert not np.array_equal(drawn, canaries.draw())


def test_directions_stay_until_other_entries_train() -> None:
    canaries = Canaries(100, event(4.0), KEY)
    canaries.point(np.ones(300, np.bool_))
    first = canaries.vectors(np.arange(100))
    canaries.point(np.ones(300, np.bool_))
    assert np.array_equal(first, canaries.vectors(np.arange(100)))
    canaries.point(np.arange(300) < 150)
    assert not canaries.vectors(np.arange(100))[:, 150:].any()


@given(st.floats(-20, 20), st.floats(0.3, 5), st.floats(0.01, 1))
def test_the_score_is_the_log_of_the_ratio_of_densities(x: float, s: float, q: float) -> None:
    def density(mean: float) -> float:
        return float(np.exp(-((x - mean) ** 2) / (2 * s * s)))

    found = float(log_ratio(np.array([x]), s, q)[0])
    if density(0.0) > 1e-250:
        expected = np.log(((1 - q) * density(0.0) + q * density(1.0)) / density(0.0))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert np.isfinite(log_ratio(np.array([1e6, -1e6]), 0.0, q)[0])


def test_how_many_canaries_a_claim_needs() -> None:
    assert canaries_for(2.0, 1e-5) == 5000
    needed = canaries_for(8.0, 1e-7)
    assert refutable(needed, 8.0, 1e-7)
    assert not refutable(needed // 2, 8.0, 1e-7)
    assert canaries_for(8.0, 1e-7, most=6000) == 5000  # no room: the usual number
    assert canaries_for(8.0, 1e-7, most=900) == 900
    # Beyond the ceiling of the theorem, no number of canaries helps.
    assert not refutable(10**6, ceiling(1e-4) + 0.1, 1e-4)
    assert refutable(10**5, ceiling(1e-4) - 1.0, 1e-4)
    assert most(5000, 1e-5) == max(
        lower_bound(canaries=5000, guesses=n, right=n, delta=1e-5, confidence=0.975)
        for n in (5000, 250)
    )


def test_the_widest_gap_is_between_the_heaps() -> None:
    scores = np.concatenate([np.linspace(-5, -4, 480), np.linspace(2, 3, 520), [50.0]])
    assert -4 < widest_gap(scores) < 2
    with pytest.raises(AuditError, match="no middle"):
        widest_gap(np.zeros(1))


def test_what_makes_no_audit_is_refused() -> None:
    with pytest.raises(AuditError, match="at least 100"):
        Canaries(99, event(4.0), KEY)
    fresh = Canaries(200, event(4.0), KEY)
    with pytest.raises(AuditError, match="released nothing"):
        judge(fresh, claimed=1.0, delta=DELTA, mechanism="local")
    fresh.point(np.ones(SIZE, np.bool_))
    fresh.draw()
    with pytest.raises(AuditError, match="not finite"):
        fresh.see(np.full(SIZE, np.nan))
    for values, message in (
        ({"claimed": 0.0}, "promises nothing"),
        ({"claimed": float("inf")}, "promises nothing"),
        ({"delta": 0.0}, "delta=0.0 must be above 0"),
        ({"confidence": 1.0}, "confidence=1.0 must be"),
    ):
        arguments: dict[str, Any] = {"claimed": 1.0, "delta": DELTA, "confidence": 0.95, **values}
        with pytest.raises(AuditError, match=message):
            judge(fresh, mechanism="local", **arguments)


def test_a_mechanism_of_another_size_is_refused() -> None:
    of = event(4.0)
    with pytest.raises(AuditError, match="give the size of what it returns"):
        audited(Wrong(), of, 4.0)


class Wrong:
    def release(self, vectors: Iterable[Any]) -> Any:
        return np.zeros(3)
