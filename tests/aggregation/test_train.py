"""The train piece: what each choice asks of a client, round by round, and what none may ask."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.choices import CHOICES, read
from aggregation.errors import RecipeError
from aggregation.recipes import recipe
from aggregation.train import Assignment

PIECES = [kind() for kind in CHOICES["train"]]


@pytest.mark.parametrize("piece", PIECES, ids=str)
@given(number=st.integers(1, 1000))
def test_what_a_choice_asks_survives_the_wire_and_alternates_by_two(
    piece: Any, number: int
) -> None:
    asked = piece.assignment(number)
    assert Assignment.from_mapping(asked.to_mapping()) == asked
    assert piece.assignment(number + 2) == asked
    assert read("train", str(piece)) == piece
    # A fixed gauge is one in which a factor, or both, stays as it was.
    assert piece.fixed_gauge == (asked.trains != "both")
    # What is personal is kept, and what is kept is not sent.
    assert piece.personal == bool(asked.keeps)


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("both", {}, {}),
        ("only-b", {"trains": "B", "sends": "B"}, {"trains": "B", "sends": "B"}),
        ("alternate", {"trains": "B", "sends": "B"}, {"trains": "A", "sends": "A"}),
        (
            "alternate-select(share=0.25)",
            {"trains": "B", "sends": "B", "select": "importance", "share": 0.25},
            {"trains": "A", "sends": "A", "select": "importance", "share": 0.25},
        ),
        ("aligned(softness=0.4)", {"align": 0.4, "align_to": "A"}, {"align": 0.4, "align_to": "B"}),
        ("core(seed=7)", {"trains": "core", "sends": "core", "seed": 7}, None),
        ("share-a", {"sends": "A", "keeps": "B"}, None),
        ("overlay(mix=0.2)", {"keeps": "overlay", "mix": 0.2}, None),
        ("random-ranks(share=0.75, seed=3)", {"select": "random", "share": 0.75, "seed": 3}, None),
    ],
)
def test_what_the_papers_ask(
    text: str, first: dict[str, Any], second: dict[str, Any] | None
) -> None:
    piece = read("train", text)
    assert piece.assignment(1).to_mapping() == first
    assert piece.assignment(2).to_mapping() == (first if second is None else second)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"trains": "C"}, "both, A, B, core"),
        ({"trains": "B", "sends": "A"}, "not trained"),
        ({"trains": "B", "sends": "both"}, "not trained"),
        ({"sends": "core"}, "not trained"),
        ({"align": 0.5}, "belong together"),
        ({"align_to": "A"}, "belong together"),
        ({"align": 0.5, "align_to": "A", "trains": "B", "sends": "B"}, "turns both"),
        ({"align": 1.5, "align_to": "A"}, "align=1.5"),
        ({"share": 0.5}, "needs select"),
        ({"select": "random", "share": 0.0}, "share=0"),
        ({"select": "best"}, "random, importance"),
        ({"trains": "core", "sends": "core", "select": "random"}, "rank indices"),
        ({"keeps": "B"}, "never sent"),
        ({"keeps": "A"}, "overlay"),
        ({"noise_multiplier": 1.0}, "needs clip"),
        ({"clip": 1.0, "trains": "B", "sends": "B"}, "both whole factors"),
        ({"sketch": 4, "trains": "A", "sends": "A"}, "sketch sends"),
        ({"sketch": 4, "select": "random"}, "sketch sends"),
        ({"sketch": 1 << 20}, "sketch=1048576"),
        ({"holdout": 0.95}, "holdout"),
        ({"mix": float("nan")}, "mix=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.0}, "must be int"),
        ({"trains": 1}, "must be str"),
        ({"share": True}, "must be float"),
        ({"everything": 1}, "unknown field 'everything'; allowed: trains"),
    ],
)
def test_an_assignment_that_cannot_be_is_refused_with_the_remedy(
    values: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        Assignment.from_mapping(values)


def test_a_whole_number_may_stand_for_a_fraction() -> None:
    assert Assignment.from_mapping({"select": "random", "share": 1}).share == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alternate-select(share=0)", "share=0"),
        ("random-ranks(share=1.5)", "share=1.5"),
        ("random-ranks(seed=-1)", "seed=-1"),
        ("core(seed=-2)", "seed=-2"),
        ("aligned(softness=0)", "choose train=both"),
        ("overlay(mix=2)", "mix=2"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        read("train", text)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ffa-lora", "only-b | float32 | examples | factor-mean | none | sgd | keep | same"),
        ("rolora", "alternate | float32 | examples | factor-mean | none | sgd | keep | same"),
        ("fedsa-lora", "share-a | float32 | examples | factor-mean | none | sgd | keep | same"),
        ("feddpa", "overlay | float32 | examples | factor-mean | none | sgd | keep | same"),
    ],
)
def test_the_recipes_that_are_pure_compositions(name: str, line: str) -> None:
    assert str(recipe(name)) == f"{name}: {line}"
