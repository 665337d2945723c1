from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.low_rank import LowRank
from aggregation.recipes import recipe
from aggregation.state import GlobalState, StateError, initial_state
from tests.aggregation.adapters import FEW, moved, plain_spec, random_adapter, specs, update


@FEW
@given(specs(), st.integers(0, 99))
def test_a_state_survives_a_checkpoint_bit_for_bit(spec: object, seed: int) -> None:
    state = initial_state(random_adapter(spec, seed))  # type: ignore[arg-type]
    reduction = recipe("svd-warm-start").begin(state)
    for k in range(3):
        reduction.add(update(f"c{k}", state.adapter, moved(state.adapter, k)))
    state, _ = reduction.finish()
    again = GlobalState.from_bytes(state.to_bytes())
    assert again.adapter.digest == state.adapter.digest
    assert again.round == state.round == 1
    for name, matrix in state.residual.items():
        assert np.array_equal(again.exact(name).dense(), state.exact(name).dense())
        assert again.residual.get(name, LowRank.zero(*matrix.shape)).rank == matrix.rank
    assert again.to_bytes() == state.to_bytes()


@FEW
@given(st.data())
def test_damaged_bytes_are_refused_and_nothing_else_happens(data: st.DataObject) -> None:
    good = initial_state(random_adapter(plain_spec(), 0)).to_bytes()
    kind = data.draw(st.sampled_from(["cut", "flip", "noise"]))
    position = data.draw(st.integers(0, 900))
    if kind == "cut":
        bad = good[:position]
    elif kind == "flip":
        bad = good[:position] + bytes([good[position] ^ 0x15]) + good[position + 1 :]
    else:
        bad = data.draw(st.binary(max_size=200))
    try:
        GlobalState.from_bytes(bad)
    except StateError:
        return
    assert kind == "flip"  # a flipped bit of a number or a name's letter is still a state


def test_a_state_that_contradicts_itself_is_refused() -> None:
    adapter = random_adapter(plain_spec(), 0)
    with pytest.raises(StateError, match="residual of elsewhere"):
        GlobalState(adapter, {"elsewhere": LowRank.zero(3, 3)})
    with pytest.raises(StateError, match="round=-1"):
        GlobalState(adapter, {}, -1)
    tensors = dict(adapter.tensors)
    key = next(iter(tensors))
    tensors[key] = np.full_like(tensors[key], np.inf)
    with pytest.raises(StateError, match="NaN or infinite"):
        initial_state(Adapter(adapter.spec, tensors))
