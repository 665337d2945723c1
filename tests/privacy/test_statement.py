from __future__ import annotations

import json
import math

import pytest

from privacy import secure_statement
from privacy.budget import LocalPrivacy
from privacy.calibration import epsilon
from privacy.central import CentralPrivacy
from privacy.cohort_statement import section
from privacy.events import SgdEvent
from privacy.randomness import SEEDED
from privacy.statement import StatementError, explain, statement
from privacy.wording import odds

PRIVACY = LocalPrivacy(epsilon=8.0, delta=1e-5, rounds=3)


def event(sigma: float, steps: int = 10) -> SgdEvent:
    return SgdEvent(noise_multiplier=sigma, sample_rate=0.1, steps=steps, max_grad_norm=1.0)


def test_the_statement_gives_the_worst_client_composed_over_all_its_rounds() -> None:
    events = {"ann": [event(1.0)] * 3, "bob": [event(2.0)], "eve": [event(1.5)] * 2}
    doc = statement(events, PRIVACY, randomness=SEEDED, rounds=3)
    example = doc["example"]
    assert example["epsilon"] == epsilon([event(1.0)] * 3, 1e-5)
    assert example["epsilon_median"] == epsilon([event(1.5)] * 2, 1e-5)
    assert example["mechanism"]["steps"] == [10, 30]
    assert example["mechanism"]["noise_multiplier"] == [1.0, 2.0]
    assert not {"ann", "bob", "eve"} & set(json.dumps(doc).split('"'))  # no client is named
    assert json.loads(json.dumps(doc, allow_nan=False)) == doc


def test_the_explanation_says_what_holds_and_what_does_not() -> None:
    text = explain(statement({"ann": [event(1.0)]}, PRIVACY, randomness=SEEDED, rounds=1))
    for words in (
        "One example: epsilon",
        "delta 1e-05",
        "the server",
        "at each of 10 steps",
        "10 % of a client's examples",
        "RDP (dp-accounting",
        "simulation only",
        "Not covered:",
        "which clients took part",
    ):
        assert words in text


def test_without_privacy_it_says_so() -> None:
    doc = statement({}, None, randomness=SEEDED)
    assert doc["example"] is None
    assert "without differential privacy" in explain(doc)


def test_steps_without_noise_promise_nothing() -> None:
    doc = statement({"ann": [event(0.0)]}, PRIVACY, randomness=SEEDED)
    assert doc["example"]["epsilon"] is None
    json.dumps(doc, allow_nan=False)
    assert "No privacy is promised" in explain(doc)


@pytest.mark.parametrize(
    "doc", [{}, {"schema": 2, "example": None, "client": None}, {"schema": 1, "example": {}}]
)
def test_other_documents_are_refused(doc: dict[str, object]) -> None:
    with pytest.raises(StatementError):
        explain(doc)
    with pytest.raises(StatementError, match="lacks a field"):
        explain({"schema": 1, "example": {"mechanism": {}}, "client": None})


def test_what_holds_at_most_is_rounded_up() -> None:
    doc = statement({"ann": [event(1.0)]}, PRIVACY, randomness=SEEDED)
    exact = doc["example"]["epsilon"]
    said = explain(doc)
    assert float(said.split("epsilon ")[1].split()[0]) >= exact
    for number in (0.0, 0.3, 1.0, 2.31, 4.7, 8.0):
        assert float(odds(number).replace(",", "")) >= math.exp(number)
    assert "power of 21" in odds(20.4)


def test_what_is_not_counted_is_said() -> None:
    told = {"ann": [event(1.0)]}
    assert "never answered" not in explain(statement(told, PRIVACY, randomness=SEEDED))
    said = explain(statement(told, PRIVACY, randomness=SEEDED, silent=3))
    assert "3 clients that were asked and never answered" in said
    assert "other trainings on the same examples" in said


def test_members_of_a_secure_sum_know_who_takes_part() -> None:
    central = CentralPrivacy(delta=1e-3, noise_multiplier=1.0, rounds=1, clients=12)
    part = section(central, [central.event()], rounds=1, randomness=SEEDED)
    clear = statement({}, None, randomness=SEEDED, client=part)
    assert "took part at all" in explain(clear)
    sums = secure_statement.section(
        [{"members": 12, "threshold": 9, "summed": 11, "bound": 2e-7, "given_up": ""}],
        bits=32,
        identities="test",
    )
    hidden = statement({}, None, randomness=SEEDED, client=part, secure_sum=sums)
    said = explain(hidden)
    assert hidden["client"]["epsilon"] == clear["client"]["epsilon"]
    assert "zeros in their place; that it takes part is not hidden" in said
    assert "took part at all" not in said
    assert "keeps to itself who takes part" not in said
    assert "members of a secure sum are told who the others are" in said
