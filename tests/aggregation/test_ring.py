"""The fixed-point ring: sums are right to the stated bound, and what could overflow is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.codec import CodecError
from aggregation.errors import RecipeError
from aggregation.reducing import FactorMean
from aggregation.ring import BITS, FixedPoint, RingError
from tests.aggregation.adapters import FEW, moved, plain_spec, random_adapter

CLIP = 0.05


def clients(k: int, n: int, seed: int, most: float) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors = [rng.uniform(-CLIP, CLIP, n).astype(np.float32) for _ in range(k)]
    vectors[0][0] = np.float32(CLIP)  # at the very edge
    return vectors, rng.uniform(1, most, k)


@FEW
@given(
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from(BITS),
    st.floats(1, 1e6),
    st.integers(0, 99),
)
def test_the_mean_of_weighted_vectors_is_within_half_an_lsb_a_client(
    k: int, n: int, bits: int, most: float, seed: int
) -> None:
    ring = FixedPoint(clip=CLIP, clients=40, max_weight=most, bits=bits)
    vectors, weights = clients(k, n, seed, most)
    total = np.zeros(n, np.uint32)
    for vector, weight in zip(vectors, weights, strict=True):
        total += ring.from_bytes(ring.to_bytes(ring.numbers(vector, weight)), n)
    truth = sum(w * v.astype(np.float64) for v, w in zip(vectors, weights, strict=True))
    assert (np.abs(ring.total(total, k) - truth) <= k * ring.lsb / 2 * (1 + 1e-5)).all()
    mean = ring.mean(total, weights.sum(), k)
    assert (np.abs(mean - truth / weights.sum()) <= k * ring.lsb / weights.sum()).all()


@FEW
@given(st.integers(1, 300), st.sampled_from(BITS), st.integers(0, 99))
def test_the_largest_cohort_at_full_range_does_not_wrap_around(
    k: int, bits: int, seed: int
) -> None:
    ring = FixedPoint(clip=CLIP, clients=k, max_weight=20.0, bits=bits)
    edge = np.full(3, CLIP, np.float32)
    total = np.zeros(3, np.uint32)
    for _ in range(k):
        total += ring.numbers(-edge, 20.0)
    assert ring.mean(total, 20.0 * k, k) == pytest.approx(-edge.astype(np.float64), rel=1e-6)


def test_masks_that_cancel_leave_the_same_sum_in_any_number_of_bits() -> None:
    rng = np.random.default_rng(0)
    for bits in BITS:
        ring = FixedPoint(clip=CLIP, clients=2, bits=bits)
        one, two = (rng.uniform(-CLIP, CLIP, 9).astype(np.float32) for _ in range(2))
        mask = rng.integers(0, 2**32, 9, dtype=np.uint32)
        sent = [ring.to_bytes(ring.numbers(one) + mask), ring.to_bytes(ring.numbers(two) - mask)]
        total = ring.from_bytes(sent[0], 9) + ring.from_bytes(sent[1], 9)
        truth = one.astype(np.float64) + two
        assert ring.total(total, 2) == pytest.approx(truth, abs=ring.lsb * 1.01)
        assert len(sent[0]) == 9 * bits // 8 <= 9 * 4


def test_a_factor_mean_of_adapters_is_the_ring_s_mean() -> None:
    spec = plain_spec((2, 3))
    start = random_adapter(spec, 0)
    trained = [moved(start, seed, 0.01) for seed in (1, 2, 3)]
    weights = [3.0, 1.0, 7.0]
    ring = FixedPoint(clip=CLIP, clients=3, max_weight=7.0)
    total = np.zeros(spec.size, np.uint32)
    for adapter, weight in zip(trained, weights, strict=True):
        total += ring.numbers(adapter.pack() - start.pack(), weight)
    accumulator = FactorMean().accumulator(spec, measure=False)
    for adapter, weight in zip(trained, weights, strict=True):
        accumulator.add(adapter, start, weight)
    reduced = accumulator.finish(sum(weights))
    mean = ring.mean(total, sum(weights), 3)
    for module in spec.modules:
        key_a, key_b = module.keys
        left, right = reduced.factors[module.name]  # type: ignore[index]
        for key, value in ((key_b, left), (key_a, right)):
            first, behind, _ = spec.layout[key]
            error = np.abs(mean[first:behind] - value.ravel()).max()
            # FactorMean may work in float32
            assert error <= 3 * ring.lsb / 2 / sum(weights) + 1e-8


@pytest.mark.parametrize("weight", [0.0, -1.0, 7.001, math.nan, math.inf])
def test_weights_out_of_range_raise(weight: float) -> None:
    ring = FixedPoint(clip=CLIP, max_weight=7.0)
    with pytest.raises(RingError, match="max_weight"):
        ring.numbers(np.zeros(3, np.float32), weight)


def test_values_out_of_range_raise_or_saturate() -> None:
    ring = FixedPoint(clip=CLIP)
    far = np.float32([0.0, -0.06, 0.07])
    with pytest.raises(RingError, match=r"2 of 3 values lie beyond clip=0\.05 .*saturate=true"):
        ring.numbers(far)
    cut = FixedPoint(clip=CLIP, saturate=True)
    assert cut.decode(cut.encode(far), 3) == pytest.approx([0.0, -CLIP, CLIP], rel=1e-6)
    with pytest.raises(CodecError, match="NaN"):
        cut.numbers(np.float32([math.nan]))


def test_sums_that_cannot_be_are_void() -> None:
    ring = FixedPoint(clip=CLIP, clients=10, max_weight=2.0)
    good = ring.numbers(np.full(2, CLIP, np.float32), 2.0)
    with pytest.raises(RingError, match="sum of 11 clients; at most 10"):
        ring.total(good, 11)
    with pytest.raises(RingError, match="the sum is void"):
        ring.total(good + good, 1)
    with pytest.raises(RingError, match="total weight 5"):
        ring.mean(good, 5.0, 2)
    with pytest.raises(RingError, match="total weight 0"):
        ring.mean(good, 0.0, 1)
    with pytest.raises(CodecError, match="7 bytes; 2 values have 8"):
        ring.from_bytes(bytes(7), 2)


def test_a_cohort_that_leaves_no_level_is_refused() -> None:
    with pytest.raises(RecipeError, match="choose bits=32"):
        FixedPoint(bits=16, clients=40_000)
    assert FixedPoint(bits=16, clients=32_767).levels == 1


@FEW
@given(st.binary(max_size=64), st.integers(0, 20))
def test_bytes_of_one_client_are_checked(data: bytes, n: int) -> None:
    ring: Any = FixedPoint(clip=CLIP)
    try:
        out = ring.decode(data, n)
    except CodecError:
        return
    assert (np.abs(out) <= np.float32(CLIP) * (1 + 1e-6)).all()
