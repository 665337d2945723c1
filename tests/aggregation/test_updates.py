"""Bad updates are refused one by one, with a reason, and never spoil the round."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.recipes import RECIPES, recipe
from aggregation.spec import AdapterSpec, ModuleSpec
from aggregation.state import initial_state
from aggregation.update import Update, UpdateError, UpdateReason
from tests.aggregation.adapters import honest, moved, plain_spec, random_adapter, update

SPEC = plain_spec()
STATE = initial_state(random_adapter(SPEC, 0))
GOOD = update("good", STATE.adapter, moved(STATE.adapter, 1))


def with_value(value: float) -> Adapter:
    tensors = {key: array.copy() for key, array in GOOD.adapter}
    next(iter(tensors.values()))[0, 0] = value
    return Adapter(SPEC, tensors)


def other_spec(**changes: object) -> Adapter:
    return random_adapter(replace(SPEC, **changes), 0)  # type: ignore[arg-type]


BAD: dict[str, tuple[Update, UpdateReason]] = {
    "nan": (replace(GOOD, adapter=with_value(np.nan)), UpdateReason.NOT_FINITE),
    "infinite": (replace(GOOD, adapter=with_value(-np.inf)), UpdateReason.NOT_FINITE),
    "huge": (replace(GOOD, adapter=with_value(3e38)), UpdateReason.TOO_LARGE),
    "no weight": (replace(GOOD, weight=0.0), UpdateReason.BAD_WEIGHT),
    "negative weight": (replace(GOOD, weight=-1.0), UpdateReason.BAD_WEIGHT),
    "nan weight": (replace(GOOD, weight=float("nan")), UpdateReason.BAD_WEIGHT),
    "weight without an inverse": (replace(GOOD, weight=5e-324), UpdateReason.BAD_WEIGHT),
    "infinite weight": (replace(GOOD, weight=float("inf")), UpdateReason.BAD_WEIGHT),
    "unknown start": (replace(GOOD, start="sha256:" + "5" * 64), UpdateReason.UNKNOWN_START),
    "wrong base": (
        replace(GOOD, adapter=other_spec(base_digest="sha256:" + "1" * 64)),
        UpdateReason.WRONG_BASE,
    ),
    "missing module": (replace(GOOD, adapter=other_spec(modules=SPEC.modules[:1])),
                       UpdateReason.WRONG_SHAPE),
    "missing head": (replace(GOOD, adapter=other_spec(others=())), UpdateReason.WRONG_SHAPE),
    "other dimensions": (
        replace(
            GOOD,
            adapter=random_adapter(
                AdapterSpec(
                    SPEC.base_digest,
                    (ModuleSpec("layer.0.query", 8, 8, 2, 4.0), SPEC.modules[1]),
                    SPEC.others,
                ),
                0,
            ),
        ),
        UpdateReason.WRONG_SHAPE,
    ),
}  # fmt: skip


def some(name: str) -> list[Update]:
    """As many sound updates as every recipe can do with; the first is by the trusted client."""
    chosen = recipe(name)
    start = chosen.hand_out(STATE)
    return [update(f"good-{k}", start, honest(chosen, start, k), weight=1.0 + k) for k in range(12)]


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("what", BAD)
def test_a_bad_update_is_refused_and_leaves_no_trace(name: str, what: str) -> None:
    bad, reason = BAD[what]
    good, chosen = some(name), recipe(name)
    if bad.start == STATE.adapter.digest:
        bad = replace(bad, start=good[0].start)
    bad = replace(bad, client="bad")
    trusted = good[0].client if chosen.reduce.trusts else ""
    clean, dirty = (chosen.begin(STATE, trusted=trusted) for _ in range(2))
    with pytest.raises(UpdateError, match="bad") as error:
        dirty.add(bad)
    assert error.value.reason is reason
    for one in good:
        clean.add(one)
        dirty.add(one)
    (one, _), (two, report) = clean.finish(), dirty.finish()
    assert two.adapter.digest == one.adapter.digest
    assert report.refused == {"bad": reason.value}
    assert report.used == len(good)


def test_fedit_refuses_another_rank_and_names_the_recipe_that_takes_it() -> None:
    low = recipe("svd-warm-start").hand_out(STATE, SPEC.with_ranks(2))
    reduction = recipe("fedit").begin(STATE, starts={low.digest: low})
    with pytest.raises(UpdateError, match="svd-warm-start takes mixed ranks") as error:
        reduction.add(update("c", low, moved(low, 1)))
    assert error.value.reason is UpdateReason.WRONG_SHAPE


def test_what_is_refused_for_its_scale_alone_is_told_so() -> None:
    """rsLoRA beside plain LoRA: the same rank and alpha, and another scale."""
    other = replace(SPEC, use_rslora=True)
    start = recipe("svd-warm-start").hand_out(STATE, other)
    reduction = recipe("fedit").begin(STATE, starts={start.digest: start})
    with pytest.raises(UpdateError, match="has rank 4 and scale 8, expected 4 and 4"):
        reduction.add(update("c", start, moved(start, 1)))


def test_the_same_reply_counts_once() -> None:
    reduction = recipe("svd-warm-start").begin(STATE)
    reduction.add(GOOD)
    with pytest.raises(UpdateError) as error:
        reduction.add(GOOD)
    assert error.value.reason is UpdateReason.DUPLICATE
    _, report = reduction.finish()
    assert report.used == 1


def test_a_finished_aggregation_takes_nothing_more() -> None:
    reduction = recipe("fedit").begin(STATE)
    reduction.finish()
    for call in (lambda: reduction.add(GOOD), reduction.finish):
        with pytest.raises(AggregationError, match="begin another"):
            call()
