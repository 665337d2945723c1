from __future__ import annotations

import json

import pytest

from privacy.budget import LocalPrivacy
from privacy.calibration import epsilon
from privacy.events import SgdEvent
from privacy.randomness import SEEDED
from privacy.statement import StatementError, explain, statement

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
