"""What robust rules refuse: too few updates, second votes, pieces and settings that defeat them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from aggregation import choices, soundness
from aggregation.adapter import Adapter
from aggregation.distributing import Truncate
from aggregation.errors import RecipeError
from aggregation.piece import Piece
from aggregation.recipe import Recipe
from aggregation.recipes import recipe
from aggregation.state import initial_state
from aggregation.update import UpdateError, UpdateReason
from tests.aggregation.adapters import moved, plain_spec, random_adapter, update
from tests.aggregation.robust_cases import only_b, run

ALL = ["krum", "multi-krum", "rfa", "fltrust", "norm-clip", "bulyan", "trimmed-mean", "median"]


@pytest.mark.parametrize(
    ("rule", "count", "least", "said"),
    [
        ("krum(liars=2)", 6, 7, "liars=2 needs at least 7 updates (2 f + 3), and there are 6"),
        ("multi-krum", 4, 5, "choose reduce=geometric-median"),
        ("multi-krum(chosen=6)", 6, 7, "set chosen to 5 at most"),
        ("bulyan", 6, 7, "needs at least 7 updates (4 f + 3)"),
        ("bulyan(liars=2)", 10, 11, "set liars=1"),
        ("trimmed-mean", 4, 5, "would trim none of 4 updates"),
        ("trimmed-mean(share=0.05)", 19, 20, "choose share=0.06"),
        ("median", 2, 3, "at least 3"),
        ("fltrust", 1, 2, "at least one other"),
    ],
)
def test_too_few_updates_are_refused(rule: str, count: int, least: int, said: str) -> None:
    piece = choices.read("reduce", rule)
    assert said in piece.needs(count)
    assert piece.needs(least) == ""
    assert str(piece) == rule
    gauge = "only-b" if piece.coordinate_wise else "both"
    name = "median" if piece.coordinate_wise else "krum"
    chosen = recipe(name, {"reduce": rule, "train": gauge})
    start = random_adapter(plain_spec(), 0)
    state = initial_state(start)
    reduction = chosen.begin(state, trusted="c0" if piece.trusts else "")
    sums = piece.accumulator(start.spec, measure=True)
    for k in range(count):
        trained = only_b(start, moved(start, k))
        reduction.add(update(f"c{k}", start, trained))
        sums.add(trained, start, 1.0)
    assert said in reduction.lacks()
    with pytest.raises(RecipeError, match="reduce="):
        reduction.finish()
    with pytest.raises(RecipeError, match="reduce="):
        sums.finish(float(count))
    after, report = reduction.keep()
    assert after is state
    assert report.used == count
    assert said in report.unchanged
    assert report.influence == {}
    assert report.to_mapping()["unchanged"] == report.unchanged


def test_no_rule_needs_more_than_it_says() -> None:
    for kind in choices.CHOICES["reduce"]:
        piece = kind()
        assert piece.needs(1000) == ""
        assert piece.robust or piece.needs(1) == ""


def test_fltrust_wants_its_trusted_client() -> None:
    state = initial_state(random_adapter(plain_spec(), 0))
    start = state.adapter
    with pytest.raises(RecipeError, match="name that client with trusted="):
        recipe("fltrust").begin(state)
    with pytest.raises(RecipeError, match="means nothing to reduce=krum"):
        recipe("krum").begin(state, trusted="c0")
    reduction = recipe("fltrust").begin(state, trusted="root")
    for k in range(4):
        reduction.add(update(f"c{k}", start, moved(start, k)))
    with pytest.raises(RecipeError, match="trusted client root has sent no usable update"):
        reduction.finish()
    bad = moved(start, 9, 1e7)
    with pytest.raises(UpdateError):
        reduction.add(update("root", start, bad))
    assert "root" in reduction.lacks()
    after, report = reduction.keep()
    assert after is state
    assert report.refused == {"root": "too-large"}


def test_a_client_has_one_vote() -> None:
    state = initial_state(random_adapter(plain_spec(), 0))
    reduction = recipe("rfa").begin(state)
    reduction.add(update("c0", state.adapter, moved(state.adapter, 1)))
    again = replace(update("c0", state.adapter, moved(state.adapter, 2)), round=2)
    with pytest.raises(UpdateError, match="counts heads") as refused:
        reduction.add(again)
    assert refused.value.reason is UpdateReason.DUPLICATE


def test_the_report_says_who_counted_under_a_plain_mean_too() -> None:
    start = random_adapter(plain_spec(), 0)
    updates = [update("a", start, moved(start, 1), 3.0), update("b", start, start, 1.0)]
    _, report = run(recipe("fedit"), initial_state(start), updates)
    assert report.influence == {"a": 0.75, "b": 0.25}
    assert report.to_mapping()["influence"] == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ({"train": "both"}, "choose train=only-b, or reduce=geometric-median"),
        ({"train": "core"}, "choose train=only-b"),
        ({"train": "alternate-select"}, "choose train=only-b"),
        ({"distribute": "truncate"}, "choose distribute=same"),
        ({"refactor": "svd"}, "choose refactor=keep"),
    ],
)
@pytest.mark.parametrize("name", ["median", "trimmed-mean", "bulyan"])
def test_coordinates_in_another_gauge_are_refused(
    name: str, pieces: dict[str, str], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(name, pieces)


@dataclass(frozen=True)
class Private(Piece):
    """A private piece as far as the rules look at it."""

    kind = "stand-in"
    secure: bool = False
    central: bool = False


@pytest.mark.parametrize("name", ALL)
def test_robust_rules_must_see_each_update(name: str) -> None:
    pieces = {f.name: getattr(recipe(name), f.name) for f in fields(Recipe)}
    for private, said in (
        (Private(), ""),
        (Private(secure=True), "has to see each update by itself"),
        (Private(central=True), "change who is believed"),
    ):
        judged = cast(Recipe, SimpleNamespace(**pieces | {"private": private}))
        reason = soundness.objection(judged)
        assert reason == "" if not said else said in reason


def test_whole_updates_do_not_fit_into_old_factors() -> None:
    with pytest.raises(RecipeError, match="choose refactor=svd"):
        recipe("krum", {"refactor": "keep"})
    assert isinstance(recipe("krum").distribute, Truncate)


@pytest.mark.parametrize(
    "wrong",
    [
        "krum(liars=0)",
        "multi-krum(chosen=-1)",
        "bulyan(liars=-1)",
        "trimmed-mean(share=0.5)",
        "trimmed-mean(share=0)",
        "trimmed-mean(share=nan)",
        "norm-clip(norm=-1)",
        "norm-clip(norm=inf)",
        "geometric-median(nu=0)",
        "geometric-median(iterations=0)",
    ],
)
def test_settings_out_of_bounds(wrong: str) -> None:
    with pytest.raises(RecipeError, match="must be"):
        choices.read("reduce", wrong)


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "bulyan"])
def test_adapters_of_named_tensors_alone(name: str) -> None:
    spec = replace(plain_spec(), modules=())
    start = Adapter.zeros(spec)
    trained = [moved(start, 1, 1.0 + k / 10) for k in range(8)]
    updates = [update(f"c{k}", start, one) for k, one in enumerate(trained)]
    change, _ = run(recipe(name), initial_state(start), updates)
    across = np.array([one.pack() for one in trained])
    assert 0 < np.linalg.norm(change) <= np.linalg.norm(across, axis=1).max()
    assert (change <= across.max(axis=0) + 1e-6).all()
    assert (change >= across.min(axis=0) - 1e-6).all()
