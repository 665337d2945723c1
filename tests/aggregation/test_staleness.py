"""Updates that come late, and updates that changed what was to stay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.recipe import Recipe
from aggregation.recipes import RECIPES, recipe
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState, initial_state
from aggregation.update import Update, UpdateError, UpdateReason
from tests.aggregation.adapters import (
    FEW,
    SEEDS,
    honest,
    moved,
    plain_spec,
    products,
    random_adapter,
    relative,
    specs,
    update,
)

FEDBUFF = recipe("fedbuff")


def some_rounds(chosen: Recipe, state: GlobalState, count: int) -> list[GlobalState]:
    """Rounds in which one client trains; each turns the factors."""
    states = [state]
    for number in range(count):
        start = chosen.hand_out(states[-1])
        reduction = chosen.begin(states[-1])
        trained = honest(chosen, start, 100 + number, number=number + 1)
        reduction.add(Update("steady", number + 1, start.digest, trained, 1.0))
        states.append(reduction.finish()[0])
    return states


@FEW
@given(specs(), SEEDS, st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_late_update_contributes_its_own_change_discounted_whatever_was_turned_since(
    spec: AdapterSpec, seed: int, behind: int, exponent: float
) -> None:
    chosen = recipe("fedbuff", {"weigh": f"staleness(exponent={exponent})"})
    states = some_rounds(chosen, initial_state(random_adapter(spec, seed)), 3)
    old, now = states[3 - behind], states[3]
    rng = np.random.default_rng(seed)
    ranks = {m.name: int(rng.integers(1, min(m.d_in, m.d_out) + 1)) for m in spec.modules}
    first = chosen.hand_out(old, spec.with_ranks(ranks))
    late = Update("late", 4 - behind, first.digest, moved(first, seed + 1), 2.0)
    prompt = Update("prompt", 4, now.adapter.digest, moved(now.adapter, seed + 2), 3.0)
    reduction = chosen.begin(now, starts={first.digest: first})
    reduction.add(late)
    reduction.add(prompt)
    after, report = reduction.finish()
    discount = (1.0 + behind) ** -exponent
    for m in spec.modules:
        stale = products(late.adapter)[m.name] - products(first)[m.name]
        fresh = products(prompt.adapter)[m.name] - products(now.adapter)[m.name]
        step = (discount * 2.0 * stale + 3.0 * fresh) / 5.0
        got = after.exact(m.name).dense() - now.exact(m.name).dense()
        assert relative(got, step) < 1e-5
    for tensor in spec.others:
        stale = late.adapter.tensors[tensor.key].astype(float) - first.tensors[tensor.key]
        fresh = prompt.adapter.tensors[tensor.key].astype(float) - now.adapter.tensors[tensor.key]
        expected = now.adapter.tensors[tensor.key] + (discount * 2.0 * stale + 3.0 * fresh) / 5.0
        assert relative(after.adapter.tensors[tensor.key], expected) < 1e-5
    assert report.influence == pytest.approx({"late": discount * 0.4, "prompt": 0.6})


def test_what_is_too_late_is_refused_and_what_claims_to_be_early_gains_nothing() -> None:
    chosen = recipe("fedbuff", {"weigh": "staleness(max_staleness=1)"})
    states = some_rounds(chosen, initial_state(random_adapter(plain_spec(), 0)), 3)
    starts = {s.adapter.digest: s.adapter for s in states}
    for behind, refused in ((0, False), (1, False), (2, True)):
        start = states[3 - behind].adapter
        late = Update("c", 4 - behind, start.digest, moved(start, 1), 1.0)
        reduction = chosen.begin(states[3], starts=starts)
        if not refused:
            reduction.add(late)
            continue
        with pytest.raises(UpdateError, match="is 2 versions behind; at most 1") as error:
            reduction.add(late)
        assert error.value.reason is UpdateReason.STALE
    shares = []
    for claimed in (4, 400):
        reduction = chosen.begin(states[3])
        start = states[3].adapter
        reduction.add(Update("c", claimed, start.digest, moved(start, 1), 1.0))
        shares.append(reduction.finish()[0].adapter.digest)
    assert shares[0] == shares[1]


def test_a_mean_of_factors_takes_no_start_from_before_the_gauge_was_turned() -> None:
    chosen = recipe("fedsvd")
    states = some_rounds(chosen, initial_state(random_adapter(plain_spec(), 0)), 1)
    starts = {s.adapter.digest: s.adapter for s in states}
    reduction = chosen.begin(states[1], starts=starts)
    for state, fits in ((states[1], True), (states[0], False)):
        start = state.adapter
        one = Update("c", state.round + 1, start.digest, honest(chosen, start, 1), 1.0)
        if fits:
            reduction.add(one)
            continue
        with pytest.raises(UpdateError, match="turned the factors") as error:
            reduction.add(one)
        assert error.value.reason is UpdateReason.STALE
    plain = recipe("ffa-lora").begin(states[1], starts=starts)
    start = states[0].adapter
    plain.add(update("c", start, honest(recipe("ffa-lora"), start, 1)))


FROZEN = [
    name for name, r in RECIPES.items() if r.train.assignment(1).sends != "both" or r.train.personal
]


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("number", [1, 2])
def test_what_a_client_does_not_send_may_not_change(name: str, number: int) -> None:
    spec, chosen = plain_spec(), recipe(name)
    task = chosen.train.assignment(number)
    start = random_adapter(spec, 0)
    state = GlobalState(start, round=number - 1)
    good = honest(chosen, start, 1, number=number)
    frozen = [key for key, value in good if np.array_equal(value, start.tensors[key])]
    wanted = {"A": ["lora_B"], "B": ["lora_A"], "core": ["lora_A"], "both": []}[task.sends]
    wanted += ["head"] if task.keeps == "B" else []
    if not wanted:
        assert name == "feddpa"
        return
    assert len(frozen) == 2 * len([w for w in wanted if "lora" in w]) + ("head" in wanted)
    for key in frozen:
        assert any(part in key for part in wanted)
        value = np.array(good.tensors[key])
        value[0, 0] = np.nextafter(value[0, 0], np.float32(9))  # by one bit
        reduction = chosen.begin(state, trusted="c" if chosen.reduce.trusts else "")
        bad = Update("c", number, start.digest, Adapter(spec, {**good.tensors, key: value}), 1.0)
        with pytest.raises(UpdateError, match="frozen in round") as error:
            reduction.add(bad)
        assert error.value.reason is UpdateReason.FROZEN_CHANGED
        assert key in str(error.value)
        reduction.add(Update("c", number, start.digest, good, 1.0))
