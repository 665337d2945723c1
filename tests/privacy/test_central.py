"""Client-level privacy: what it costs, by whose count, and that it is paid before it is had."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.client_dp import ClientDp, ClientDpFtrl
from privacy.budget import Accountant, BudgetError, BudgetExceeded, PrivacyBudget, Unit
from privacy.calibration import CalibrationError, epsilon
from privacy.central import CentralPrivacy
from privacy.cohort_account import EVERY_CLIENT, CohortAccount
from privacy.cohort_statement import section
from privacy.events import CohortEvent, SgdEvent, read_event
from privacy.ledger import Ledger
from privacy.randomness import seeded_key
from privacy.statement import explain, statement
from privacy.tree_noise import increment, prefix, sensitivity

RUN = {"delta": 1e-5, "rounds": 50, "clients": 1000, "fraction": 0.05}


def central(**changes: object) -> CentralPrivacy:
    fields = {**RUN, "noise_multiplier": 1.0, "sampling": "poisson", **changes}
    return CentralPrivacy(**fields)  # type: ignore[arg-type]


def tree(**changes: object) -> CentralPrivacy:
    fields = {"sampling": "fixed", "mechanism": "tree", "rounds": 8, "separation": 4, **changes}
    return central(**fields)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "server.sqlite")
    yield opened
    opened.close()


def account(of: CentralPrivacy, ledger: Ledger, run: str = "run", seed: int = 1) -> CohortAccount:
    return CohortAccount(of, run=run, ledger=ledger, key=seeded_key(seed), randomness="test")


@pytest.mark.parametrize(("rate", "sigma", "rounds"), [(0.05, 1.0, 50), (0.1, 0.8, 20), (1, 5, 10)])
def test_epsilon_is_that_of_dp_accounting_and_of_opacus(
    rate: float, sigma: float, rounds: int
) -> None:
    from dp_accounting import dp_event, pld
    from opacus.accountants import PRVAccountant, RDPAccountant

    sampling = "poisson" if rate < 1 else "fixed"
    of = central(fraction=rate, noise_multiplier=sigma, rounds=rounds, sampling=sampling)
    events = [of.event()] * rounds
    rdp = RDPAccountant()
    rdp.history = [(sigma, rate, rounds)]
    safe = epsilon(events, of.delta)
    assert safe == pytest.approx(rdp.get_epsilon(of.delta), rel=0.04)
    tight = epsilon(events, of.delta, Accountant.PLD)
    reference = pld.PLDAccountant()
    reference.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma)), rounds)
    assert tight == pytest.approx(reference.get_epsilon(of.delta), rel=0.01)
    prv = PRVAccountant()
    prv.history = [(sigma, rate, rounds)]
    assert tight == pytest.approx(prv.get_epsilon(of.delta), rel=0.02, abs=0.02)
    assert tight <= safe == of.epsilon_after(rounds)


def test_only_coins_earn_amplification() -> None:
    """facts/ml.md section 5: N=100, m=10, R=50, z=1 is 5.88; without coins it is ten times that."""
    coins = central(clients=100, fraction=0.1)
    fixed = replace(coins, sampling="fixed")
    assert coins.epsilon_after(50) == pytest.approx(5.88, rel=0.02)
    assert (coins.cohort, fixed.cohort) == (10.0, 10.0)
    assert (coins.sample_rate, fixed.sample_rate) == (0.1, 1.0)
    assert fixed.epsilon_after(50) > 40
    everybody = replace(fixed, fraction=1.0)
    assert everybody.epsilon_after(50) == fixed.epsilon_after(50)


@pytest.mark.parametrize(
    ("target", "accountant"), [(1.0, Accountant.RDP), (8.0, Accountant.RDP), (3.0, Accountant.PLD)]
)
def test_noise_is_calibrated_to_the_whole_run(target: float, accountant: Accountant) -> None:
    of = central(epsilon=target, noise_multiplier=None, accountant=accountant).calibrated()
    assert 0.98 * target < of.epsilon_after(50) <= target
    assert of.epsilon_after(25) < 0.9 * target
    assert of.noise_multiplier == of.piece().noise_multiplier == of.event().noise_multiplier
    assert of.budget() == PrivacyBudget(target, 1e-5, Unit.CLIENT)


def test_an_adaptive_clip_costs_no_more_and_a_tree_is_one_event() -> None:
    of = central(quantile=0.5)
    piece = of.piece()
    assert isinstance(piece, ClientDp)
    assert of.event().noise_multiplier == 1.0 < piece.multiplier
    grown = tree(noise_multiplier=10.0)
    assert grown.event().noise_multiplier == pytest.approx(10.0 / grown.sensitivity)
    assert grown.epsilon_after(8) == grown.epsilon_after(1)
    twice = replace(grown, restart=4)
    assert twice.spends(8) == 2
    reached = tree(noise_multiplier=None, epsilon=3.0).calibrated()
    assert 2.9 < reached.epsilon_after(8) <= 3.0
    piece = reached.piece()
    assert isinstance(piece, ClientDpFtrl)
    assert (piece.separation, piece.participations, piece.restart) == (4, 2, 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"delta": 0.0}, "delta=0.0"),
        ({"delta": 0.01}, "above 1/n = 0.001"),
        ({"noise_multiplier": None}, "give epsilon"),
        ({"noise_multiplier": 0.0}, "without noise nothing is promised"),
        ({"noise_multiplier": 0.0, "epsilon": 8.0}, "without noise nothing is promised"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be above 0"),
        ({"epsilon": -1.0}, "epsilon=-1.0 must be above 0"),
        ({"clip": 0.0}, "clip=0"),
        ({"sampling": "maybe"}, "not fixed or poisson"),
        ({"mechanism": "banded"}, "not gaussian or tree"),
        ({"accountant": "gdp"}, "under-states"),
        ({"separation": 3}, "separation means nothing"),
        ({"restart": 3}, "restart means nothing"),
        ({"mechanism": "tree"}, "choose sampling='fixed'"),
        ({"mechanism": "tree", "sampling": "fixed", "quantile": 0.5}, "leave quantile out"),
        ({"mechanism": "tree", "sampling": "fixed", "separation": 21}, "choose a separation of 20"),
        ({"quantile": 0.5, "count_noise": 0.1}, "count_noise=0.1 must be above"),
    ],
)
def test_nonsense_is_refused_with_its_remedy(changes: dict[str, object], says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        central(**changes)


def test_noise_that_would_overspend_is_refused_before_the_first_round() -> None:
    with pytest.raises(BudgetError, match="train for 16 rounds at most"):
        central(clients=100, fraction=0.1, epsilon=4.0).calibrated()
    with pytest.raises(CalibrationError, match="fewer steps"):
        central(epsilon=1e-5, noise_multiplier=None, sampling="fixed").calibrated()


@given(
    st.builds(
        CohortEvent,
        noise_multiplier=st.floats(0.0, 50.0),
        sample_rate=st.just(1.0),
        steps=st.integers(0, 5),
        clip=st.floats(1e-3, 10.0),
        mechanism=st.just("tree"),
    )
)
def test_events_survive_their_mapping(event: CohortEvent) -> None:
    assert read_event(json.loads(json.dumps(event.to_mapping()))) == event
    sgd = SgdEvent(noise_multiplier=1.0, sample_rate=0.5, steps=1, max_grad_norm=1.0)
    assert read_event(sgd.to_mapping()) == sgd
    for change in (
        {"mechanism": "x"},
        {"sample_rate": 0.5},
        {"steps": -1},
        {"clip": 0.0},
        {"y": 1},
    ):
        with pytest.raises(BudgetError):
            read_event({**event.to_mapping(), **change})


@given(number=st.integers(1, 3000), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_noise_of_the_rounds_adds_up_to_that_of_their_prefix(number: int, seed: int) -> None:
    def normals(name: str, count: int) -> np.ndarray:
        words = [int(word) for word in name.split()[1:]]
        return np.random.default_rng([seed, *words]).standard_normal(count)

    nodes = prefix(number)
    covered = [range(i << level, (i + 1) << level) for level, i in nodes]
    assert [r for part in covered for r in part] == list(range(number))
    assert len(nodes) <= math.log2(number) + 1
    whole = sum(normals(f"node {level} {i}", 3) for level, i in nodes)
    if number <= 200:
        added = sum(increment(n, normals, 3) for n in range(1, number + 1))
        assert np.allclose(added, whole, atol=1e-9)


def exact_sensitivity(rounds: int, most: int, apart: int) -> float:
    """By trying every way of taking part."""
    nodes = {node for n in range(1, rounds + 1) for node in prefix(n)}
    largest = 0
    for times in range(1, most + 1):
        for when in itertools.combinations(range(rounds), times):
            if all(b - a >= apart for a, b in itertools.pairwise(when)):
                parts = [sum(t >> level == i for t in when) for level, i in nodes]
                largest = max(largest, sum(part**2 for part in parts))
    return math.sqrt(largest)


@pytest.mark.parametrize("rounds", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_way_of_taking_part_moves_a_tree_by_more_than_is_counted(rounds: int, most: int) -> None:
    for apart in range(1, rounds + 1):
        counted = sensitivity(rounds=rounds, participations=most, separation=apart)
        exact = exact_sensitivity(rounds, most, apart)
        assert exact <= counted + 1e-12
        assert counted <= 1.2 * exact
        if most == 1:
            assert counted == pytest.approx(exact)


def test_a_round_is_paid_once_and_its_noise_is_repeated(ledger: Ledger) -> None:
    of = account(central(), ledger)
    first = of.pay(1, "aa")("sum", 4)
    assert np.array_equal(of.pay(1, "aa")("sum", 4), first)
    assert len(of.events()) == 1
    # Other updates in the same round: other noise, and counted again.
    assert not np.any(of.pay(1, "bb")("sum", 4) == first)
    assert len(of.events(1)) == 2
    # Other names, rounds, runs and keys: other noise.
    others = [
        of.pay(1, "aa")("count", 4),
        of.pay(2, "aa")("sum", 4),
        account(central(), ledger, "other").pay(1, "aa")("sum", 4),
    ]
    for other in others:
        assert not np.any(other == first)
    assert of.sampling_seed != account(central(), ledger, "other").sampling_seed
    assert len(of.events()) == 3  # the other run has an account of its own
    assert ledger.clients() == (EVERY_CLIENT,)
    ledger.verify()


@pytest.mark.parametrize(("rate", "noise"), [(0.05, 1.0), (1.0, 1.0)])
def test_releases_of_one_draw_cost_what_one_coin_can_hide(
    ledger: Ledger, rate: float, noise: float
) -> None:
    """Repeated rounds have the same coins: k releases are one sampled Gaussian of 1/sqrt(k)."""
    of = account(central(fraction=rate, noise_multiplier=noise), ledger)
    for releases, inputs in enumerate(("aa", "bb", "cc"), 1):
        for _ in range(2):  # repeating either costs nothing more
            of.pay(1, inputs)
        together = CohortEvent(
            noise_multiplier=noise / math.sqrt(releases), sample_rate=rate, steps=1, clip=1.0
        )
        counted = epsilon(of.events(), 1e-5, Accountant.PLD)
        assert len(of.events()) == releases
        assert counted >= epsilon([together], 1e-5, Accountant.PLD) * 0.999
    assert of.pay(1, "aa") is not None
    of.pay(2, "aa")
    assert of.events(2) == [of.central.event()]


def test_nobody_guesses_the_seed_of_the_cohorts(ledger: Ledger) -> None:
    assert account(central(), ledger).sampling_seed.bit_length() > 200


def test_a_reopened_account_goes_on_where_it_was(tmp_path: Path) -> None:
    noise = []
    for _ in range(2):
        ledger = Ledger(tmp_path / "server.sqlite")
        of = account(central(), ledger)
        noise.append(of.pay(1, "aa")("sum", 4))
        assert len(of.events()) == 1
        ledger.close()
    assert np.array_equal(*noise)


def test_a_budget_refuses_before_the_round_and_again_before_the_release(ledger: Ledger) -> None:
    generous = central(clients=100, fraction=0.1, epsilon=4.0, rounds=16)
    of = account(generous, ledger)
    for number in range(1, 17):
        of.check(number)
        of.pay(number, "aa")
    head = ledger.head()
    with pytest.raises(BudgetExceeded, match="nobody was asked"):
        of.check(17)
    with pytest.raises(BudgetExceeded, match="nothing was spent"):
        of.pay(17, "aa")
    assert ledger.head() == head
    of.check(3)  # repeating what was paid for is free
    of.pay(3, "aa")
    # The budget is that of the clients, over all runs.
    with pytest.raises(BudgetExceeded):
        account(generous, ledger, "another run").check(1)


def test_a_tree_is_paid_with_its_first_round(ledger: Ledger) -> None:
    of = account(tree(restart=3, separation=3, rounds=9), ledger)
    noise = [of.pay(number, f"{number:02x}")("sum", 2) for number in range(1, 8)]
    assert [e.steps for e in of.events()] == [1, 0, 0, 1, 0, 0, 1]
    assert of.tree_start(8) == 7
    assert epsilon(of.events(), 1e-5) == epsilon([of.central.event()] * 3, 1e-5)
    assert np.array_equal(of.pay(5, "05")("sum", 2), noise[4])
    assert len(of.events()) == 7


def test_a_tree_ends_where_a_round_comes_out_otherwise(ledger: Ledger) -> None:
    of = account(tree(rounds=8), ledger)
    for number in (1, 2, 3):
        seen = of.pay(number, f"0{number}")("sum", 3)
    again = of.pay(3, "ff")("sum", 3)
    assert not np.any(again == seen)
    assert [e.steps for e in of.events()] == [1, 0, 0, 1]
    of.pay(4, "04")
    assert [e.steps for e in of.events()] == [1, 0, 0, 1, 0]
    # A checkpoint was put back: round 2 is repeated as it was, and what follows is a new tree.
    of.pay(2, "02")
    of.pay(3, "77")
    assert [e.steps for e in of.events()] == [1, 0, 0, 1, 0, 1]


def test_the_statement_says_who_is_trusted_and_what_was_drawn() -> None:
    of = central()
    part = section(of, [of.event()] * 50, rounds=50, randomness="test")
    doc = statement({}, None, randomness="x", client=part)
    assert json.loads(json.dumps(doc, allow_nan=False)) == doc
    assert doc["example"] is None
    assert (part["unit"], part["delta"], part["clients"]) == ("client", 1e-5, 1000)
    assert part["epsilon"] == epsilon([of.event()] * 50, 1e-5)
    assert part["mechanism"]["sampling"]["sample_rate"] == 0.05
    text = explain(doc)
    for words in (
        "One client: epsilon",
        "delta 1e-05",
        "trusted: the server",
        "with probability 0.05 in each round",
        "the accounting assumes just that",
        "divided by 50, whoever came; 50 rounds",
        "one client added or removed",
        "Not covered for clients",
    ):
        assert words in text
    fixed = replace(of, sampling="fixed")
    part = section(fixed, [fixed.event()] * 50, rounds=50, randomness="test")
    text = explain(statement({}, None, randomness="x", client=part))
    assert "50 of 1000 clients in each round" in text
    assert "as if it were always drawn" in text
    assert "or nothing in their place" in text
    grown = tree(quantile=None)
    part = section(grown, [grown.event(), grown.event(0)], rounds=2, randomness="test")
    assert part["epsilon"] == grown.epsilon_after(2)
    assert "at most once in 4 rounds and 2 times in 8" in explain(
        statement({}, None, randomness="x", client=part)
    )
