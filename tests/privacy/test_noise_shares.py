"""Noise in shares: sampled as its pmf says, and counted at no less than it costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import dp_event, rdp
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import RecipeError
from aggregation.ring import RingError
from aggregation.secret_ring import LEAST_SHARE, TAILS, Ring
from aggregation.secure_pieces import SecureClientDdp, counted_on
from privacy import discrete_gaussian as sampler
from privacy.budget import BudgetError
from privacy.central import CentralPrivacy
from privacy.discrete_gaussian import NoiseError, discrete_gaussian
from privacy.events import CohortEvent
from privacy.noise_shares import closeness, concentrated, counted_multiplier
from privacy.randomness import Stream, derive
from tests.aggregation.adapters import FEW

COUNT = 60_000


def stream(*labels: str | int) -> Stream:
    return Stream(derive(b"t" * 32, *labels))


def pmf(sigma: float, reach: int) -> np.ndarray:
    x = np.arange(-reach, reach + 1)
    found = np.exp(-(x**2) / (2.0 * sigma * sigma))
    return np.asarray(found / found.sum())


def chi_square(drawn: np.ndarray, probabilities: np.ndarray) -> float:
    """In standard deviations from what is expected of it."""
    expected = probabilities * drawn.size
    seen = np.bincount(drawn, minlength=probabilities.size)
    big = expected > 8
    statistic = float((((seen - expected) ** 2) / expected)[big].sum())
    free = int(big.sum()) - 1
    return (statistic - free) / math.sqrt(2 * free)


@pytest.mark.parametrize("sigma", [1, 2, 3, 10])
def test_shares_are_drawn_as_the_pmf_says(sigma: int) -> None:
    drawn = discrete_gaussian(stream("pmf", sigma), sigma, COUNT)
    reach = 12 * sigma
    assert abs(chi_square(drawn + reach, pmf(sigma, reach))) < 5


def test_large_shares_are_drawn_as_the_pmf_says_and_their_low_bits_are_fair() -> None:
    sigma = 30_000_017
    drawn = discrete_gaussian(stream("large"), sigma, COUNT)
    edges = np.linspace(-4, 4, 61)  # at this size the sum of the pmf is the integral
    cdf = np.array([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
    shares = np.diff(np.concatenate([[0.0], cdf, [1.0]]))
    assert abs(chi_square(np.searchsorted(edges, drawn / sigma), shares)) < 5
    assert abs(chi_square(drawn & 255, np.full(256, 1 / 256))) < 5
    assert drawn.var() == pytest.approx(sigma**2, rel=0.03)


def test_the_slow_and_exact_path_decides_as_the_fast_one() -> None:
    quick = discrete_gaussian(stream("path"), 5, 3000)
    slow = discrete_gaussian(stream("path"), 5, 3000, margin=2.0)  # never trusts a float64
    assert np.array_equal(quick, slow)
    assert np.array_equal(quick, discrete_gaussian(stream("path"), 5, 3000))
    assert discrete_gaussian(stream("path"), 5, 0).size == 0


def test_what_64_bits_do_not_decide_is_decided_by_more() -> None:
    """At the very edge a decision falls with the fraction that 64 bits leave open."""

    def scaled(bits: int) -> int:
        return sampler._floor(sampler._power(1, 3, bits), bits)

    edge, open_part = scaled(64), (scaled(80) - (scaled(64) << 16)) / 2.0**16
    below = sum(sampler._below(edge, 64, scaled, stream("edge", n)) for n in range(400))
    assert abs(below / 400 - open_part) < 0.13  # five standard deviations
    assert sampler._below(edge - 5, 64, scaled, stream("edge"))
    assert not sampler._below(edge + 5, 64, scaled, stream("edge"))
    words = np.array([sampler._EDGES[0]] * 200, np.uint64)
    first = sampler._halves(words, stream("halves"))
    assert set(first.tolist()) == {0, 1}
    top = sampler._halves(np.array([2**64 - 1] * 3, np.uint64), stream("top"))
    assert all(9 <= k <= 12 for k in top)
    assert sampler._halves(np.array([0, 1], np.uint64), stream("low")).tolist() == [0, 0]


def test_sizes_that_cannot_be_sampled_are_refused() -> None:
    for sigma in (0, sampler.MOST_SIGMA + 1):
        with pytest.raises(NoiseError, match="is not in 1"):
            discrete_gaussian(stream(), sigma, 3)
    assert discrete_gaussian(stream(), sampler.MOST_SIGMA, 8).size == 8


@pytest.mark.parametrize(("sigma", "shares"), [(0.6, 2), (0.6, 4), (0.8, 3), (1.5, 3), (4.0, 3)])
def test_the_bound_is_above_the_exact_divergence_of_a_sum_of_shares(
    sigma: float, shares: int
) -> None:
    """Renyi divergences of the convolution itself, which no theorem went into."""
    reach = math.ceil(9 * sigma) + 3
    total = one = pmf(sigma, reach)
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    inner = slice(total.size // 2 - reach, total.size // 2 + reach)
    bound = concentrated(1.0, sigma, shares, 1)
    for order in (1.5, 2.0, 4.0, 8.0):
        shifted, there = np.log(np.roll(total, 1)[inner]), np.log(total[inner])
        exact = math.log(np.exp(order * shifted + (1 - order) * there).sum()) / (order - 1)
        assert exact <= order * bound**2 / 2
        if sigma >= 1.5:
            assert exact == pytest.approx(order * bound**2 / 2, rel=1e-3)


def test_the_distance_from_one_gaussian_is_as_in_the_paper_and_falls_fast() -> None:
    def by_hand(sigma: float, shares: int) -> float:
        terms = [math.exp(-2 * math.pi**2 * sigma**2 * k / (k + 1)) for k in range(1, shares)]
        return 10 * sum(terms)

    for sigma, shares in ((0.5, 2), (0.7, 10), (1.0, 100)):
        assert closeness(sigma, shares) == pytest.approx(by_hand(sigma, shares))
    assert closeness(3.0, 1) == 0.0
    assert closeness(LEAST_SHARE, 1000) * math.sqrt(2.0**28) < 1e-50
    with pytest.raises(BudgetError, match="more bits"):
        closeness(0.4, 3)


def shared(**changes: object) -> CentralPrivacy:
    fields = {"rounds": 10, "clients": 50, "delta": 1e-4, "mechanism": "distributed", **changes}
    return CentralPrivacy(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("sigma", "rounds"), [(0.9, 3), (2.0, 10), (8.0, 100)])
def test_epsilon_is_that_of_concentrated_privacy_counted_by_somebody_else(
    sigma: float, rounds: int
) -> None:
    of = shared(noise_multiplier=sigma, rounds=rounds)
    found = of.epsilon_after(rounds)
    account = rdp.RdpAccountant([1 + x / 20 for x in range(1, 4000)])
    account.compose(dp_event.ZCDpEvent(0.5 / sigma**2), rounds)
    assert found == pytest.approx(account.get_epsilon(of.delta), rel=0.02)
    # Bun and Steinke 2016, proposition 1.3: a looser conversion.
    rho = rounds / (2 * sigma**2)
    assert found <= rho + 2 * math.sqrt(rho * math.log(1 / of.delta))


def test_noise_is_calibrated_and_the_distance_of_shares_is_counted() -> None:
    of = shared(epsilon=4.0).calibrated()
    assert 3.99 < of.epsilon_after(of.rounds) <= 4.0
    assert of.event().noise_multiplier < of.noise()
    assert of.event() == CohortEvent.from_mapping(of.event().to_mapping())
    assert (of.event().mechanism, of.event().sample_rate) == ("distributed", 1.0)
    assert of.rounds_within(4.0) == of.rounds
    assert counted_multiplier(3.0) < 3.0
    assert isinstance(of.piece(), SecureClientDdp)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling": "poisson", "fraction": 0.5}, "knows who was drawn"),
        ({"quantile": 0.5}, "leave quantile out"),
        ({"accountant": "pld"}, "accountant='rdp'"),
        ({"restart": 5}, "means nothing to mechanism='distributed'"),
    ],
)
def test_what_shares_do_not_go_with_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(BudgetError, match=said):
        shared(noise_multiplier=1.0, **changes)
    with pytest.raises(BudgetError, match="earns nothing"):
        CohortEvent(
            noise_multiplier=1.0, sample_rate=0.5, steps=1, clip=1.0, mechanism="distributed"
        )


def ring(clients: int = 20, noise: float = 1.0, bits: int = 32, **changes: object) -> Ring:
    least, honest = counted_on(clients, 0.3, 0.1)
    fields = {"equal": True, "norm": 1.0, "noise": noise, "least": least, "honest": honest}
    return Ring(1.0 + 2.0**-20, clients, 1.0, bits, **{**fields, **changes})  # type: ignore[arg-type]


@FEW
@given(
    clients=st.integers(3, 5000),
    noise=st.floats(1e-3, 50),
    bits=st.sampled_from([16, 24, 32]),
)
def test_what_is_counted_on_is_added_and_the_ring_has_room_for_all_of_it(
    clients: int, noise: float, bits: int
) -> None:
    least, honest = counted_on(clients, 0.3, 0.1)
    assert least - honest >= 0.1 * clients
    assert clients - least >= 0.3 * clients - 1e-6
    try:
        made = ring(clients, noise, bits)
    except RecipeError as error:
        assert "choose bits=32" in str(error) or "a larger cohort" in str(error)  # noqa: PT017
        return
    levels = math.floor(made.norm / made.lsb)  # the longest vector, in steps
    assert made.share >= LEAST_SHARE
    assert made.share * math.sqrt(honest) * made.lsb >= noise * made.norm
    largest = clients * (levels + 1) + TAILS * made.share * math.sqrt(clients)
    assert largest < 2 ** (bits - 1)


def test_the_noise_of_a_sum_has_the_variance_that_those_in_it_bring() -> None:
    """Values and shares through the ring as they go through masks: only sums are read."""
    made, size = ring(clients=10, noise=0.7), 4000
    for inside in (10, 7):
        total, clean = np.zeros(size, np.uint32), np.zeros(size)
        for client in range(inside):
            vector = np.random.default_rng(client).normal(size=size)
            vector /= np.linalg.norm(vector) * 1.0001
            clean += vector
            drawn = discrete_gaussian(stream("sum", inside, client), made.share, size)
            total += made.numbers(vector) + drawn.astype(np.uint32)
        found = made.sums(made.from_bytes(made.to_bytes(total), size), inside)
        assert np.linalg.norm(found) <= made.longest(inside, size)
        noise = found - clean
        assert noise.std() == pytest.approx(0.7 * math.sqrt(inside / made.honest), rel=0.05)
        assert abs(noise.mean()) < 0.1
    with pytest.raises(RingError, match="void"):
        made.sums(np.full(3, 1 << 31, np.uint32), 10)
    with pytest.raises(RingError, match="at most 10"):
        made.sums(np.zeros(3, np.uint32), 11)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise": 1e5}, "no room for noise"),
        ({"noise": 1e-9, "bits": 24}, "no room for noise"),
        ({"honest": 0}, "a larger cohort"),
        ({"equal": False}, "equal weights"),
        ({"least": 25}, "least=25"),
    ],
)
def test_a_ring_without_room_or_without_honest_clients_is_refused(
    changes: dict[str, object], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        ring(**changes)  # type: ignore[arg-type]
