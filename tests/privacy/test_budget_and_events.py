from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.budget import Accountant, BudgetError, LocalPrivacy, PrivacyBudget
from privacy.events import SgdEvent

RATES = st.floats(1e-4, 1.0)
events = st.builds(
    SgdEvent,
    noise_multiplier=st.floats(0.0, 50.0),
    sample_rate=RATES,
    steps=st.integers(1, 10_000),
    max_grad_norm=st.floats(1e-3, 100.0),
)


@given(events)
def test_an_event_survives_its_mapping(event: SgdEvent) -> None:
    assert SgdEvent.from_mapping(event.to_mapping()) == event


@given(
    st.builds(
        LocalPrivacy,
        delta=st.floats(1e-12, 0.1),
        epsilon=st.floats(0.01, 50),
        noise_multiplier=st.none() | st.floats(0.1, 10),
        max_grad_norm=st.floats(0.01, 10),
        rounds=st.integers(1, 100),
        accountant=st.sampled_from(list(Accountant)),
    )
)
def test_local_privacy_survives_its_mapping(privacy: LocalPrivacy) -> None:
    assert LocalPrivacy.from_mapping(privacy.to_mapping()) == privacy


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"delta": 0.0, "epsilon": 1.0}, "delta=0.0"),
        ({"delta": 1.0, "epsilon": 1.0}, "delta=1.0"),
        ({"delta": 1e-5, "epsilon": 0.0}, "epsilon=0.0"),
        ({"delta": 1e-5, "epsilon": -1.0}, "epsilon=-1.0"),
        ({"delta": 1e-5, "epsilon": math.nan}, "epsilon=nan"),
        ({"delta": 1e-5, "epsilon": 8.0, "noise_multiplier": 0.0}, "gives no privacy"),
        ({"delta": 1e-5, "epsilon": 8.0, "max_grad_norm": 0.0}, "max_grad_norm"),
        ({"delta": 1e-5, "epsilon": 8.0, "rounds": 0}, "rounds=0"),
        ({"delta": 1e-5, "epsilon": 8.0, "accountant": "gdp"}, "under-states"),
        ({"delta": 1e-5}, "give epsilon"),
        ({"epsilon": 8.0}, "needs delta"),
        ({"delta": 1e-5, "epsilon": "8"}, "must be a number"),
        ({"delta": 1e-5, "epsilom": 8.0}, "epsilom"),
    ],
)
def test_nonsense_is_refused_with_its_name(values: dict[str, object], says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        LocalPrivacy.from_mapping(values)


def test_a_delta_that_would_let_a_whole_example_out_is_refused() -> None:
    privacy = LocalPrivacy(epsilon=8.0, delta=1e-2)
    privacy.check_examples(100)
    with pytest.raises(BudgetError, match="1/n"):
        privacy.check_examples(101)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"sample_rate": 1.01},
        {"sample_rate": 0.0},
        {"noise_multiplier": -0.1},
        {"max_grad_norm": 0.0},
        {"kind": "other"},
        {"extra": 1},
    ],
)
def test_an_event_with_a_wrong_field_is_refused(change: dict[str, object]) -> None:
    good = SgdEvent(noise_multiplier=1.0, sample_rate=0.5, steps=3, max_grad_norm=1.0).to_mapping()
    with pytest.raises(BudgetError):
        SgdEvent.from_mapping({**good, **change})


def test_a_budget_checks_itself() -> None:
    with pytest.raises(BudgetError):
        PrivacyBudget(8.0, 0.0)
    with pytest.raises(BudgetError):
        PrivacyBudget(0.0, 1e-5)
