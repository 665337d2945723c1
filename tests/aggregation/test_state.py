from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.low_rank import LowRank
from aggregation.recipes import recipe
from aggregation.spec import AdapterSpec, ModuleSpec
from aggregation.state import GlobalState, StateError, initial_state
from tests.aggregation.adapters import BASE, FEW, moved, plain_spec, random_adapter, specs, update


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
    spec = plain_spec()
    good = GlobalState(random_adapter(spec, 0), {}, 0, buffers_of(spec, 0)).to_bytes()
    kind = data.draw(st.sampled_from(["cut", "flip", "noise"]))
    position = data.draw(st.integers(0, 1500))
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


def buffers_of(spec: AdapterSpec, seed: int) -> dict[str, np.ndarray]:
    """One of each kind."""
    rng = np.random.default_rng(seed)
    out = {
        f"first-moment/{key}": rng.standard_normal(shape) for key, shape in spec.shapes().items()
    }
    for m in spec.modules:
        out[f"momentum/{m.name}/B"] = rng.standard_normal((m.d_out, 7))
        out[f"momentum/{m.name}/A"] = rng.standard_normal((7, m.d_in))
    return out | {"steps": np.array([3.0])}


@FEW
@given(specs(), st.integers(0, 99))
def test_buffers_survive_a_checkpoint_bit_for_bit(spec: AdapterSpec, seed: int) -> None:
    buffers = buffers_of(spec, seed)
    state = GlobalState(random_adapter(spec, seed), {}, 2, buffers)
    again = GlobalState.from_bytes(state.to_bytes())
    assert again.buffers.keys() == buffers.keys()
    for name, value in buffers.items():
        assert again.buffers[name].tobytes() == value.tobytes()
        assert again.buffers[name].dtype == np.float64
        assert not again.buffers[name].flags.writeable
    assert again.to_bytes() == state.to_bytes()
    value[...] = 0.0  # what the caller does with its own array later is the caller's business
    assert state.to_bytes() == again.to_bytes()


def test_a_state_of_schema_1_is_read_and_has_no_buffers() -> None:
    state = GlobalState(random_adapter(plain_spec(), 0), round=4)
    data = state.to_bytes()
    old = data.replace(rb"\"schema\": 2, \"spec\"", rb"\"schema\": 1, \"spec\"")
    assert old != data
    read = GlobalState.from_bytes(old)
    assert (read.round, read.adapter.digest, dict(read.buffers)) == (4, state.adapter.digest, {})
    with_buffers = GlobalState(state.adapter, {}, 4, {"steps": np.ones(1)}).to_bytes()
    with pytest.raises(StateError, match="unknown tensors"):
        GlobalState.from_bytes(with_buffers.replace(rb"\"schema\": 2, ", rb"\"schema\": 1, "))
    with pytest.raises(StateError, match="schema 3"):
        GlobalState.from_bytes(data.replace(rb"\"schema\": 2, ", rb"\"schema\": 3, "))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("momentum/elsewhere.weight", np.zeros((2, 2))),
        ("momentum/base_model.model.head.weight", np.zeros((2, 2))),
        ("momentum/base_model.model.head.weight/B", np.zeros((3, 24))),
        ("momentum/layer.0.query/B", np.zeros((24, 3))),  # without its A
        ("momentum/layer.0.query/C", np.zeros((24, 3))),
        ("Momentum", np.zeros(1)),
        ("../momentum", np.zeros(1)),
        ("steps", np.zeros(2)),
        ("steps", np.array([np.nan])),
        ("momentum/base_model.model.head.weight", np.full((3, 24), np.inf)),
    ],
)
def test_a_buffer_that_belongs_to_nothing_is_refused(name: str, value: np.ndarray) -> None:
    with pytest.raises(StateError, match=r"^buffer "):
        GlobalState(random_adapter(plain_spec(), 0), {}, 0, {name: value})


def test_factors_of_a_buffer_have_to_fit_together() -> None:
    pair = {
        "momentum/layer.0.query/B": np.ones((24, 3)),
        "momentum/layer.0.query/A": np.ones((4, 24)),
    }
    with pytest.raises(StateError, match=r"expected \(24, 4\)"):
        GlobalState(random_adapter(plain_spec(), 0), {}, 0, pair)


def test_a_state_of_the_largest_adapter_can_be_read_again() -> None:
    """4,096 modules with residual and two buffers per tensor: more than a payload may have."""
    modules = tuple(ModuleSpec(f"layer.{i}.q", 1, 1, 1, 1.0) for i in range(4096))
    spec = AdapterSpec(BASE, modules)
    adapter = random_adapter(spec, 0)
    residual = {m.name: LowRank(np.ones((1, 1)), np.ones((1, 1))) for m in modules}
    buffers = {f"{what}/{key}": value for what in ("m", "v") for key, value in adapter}
    state = GlobalState(adapter, residual, 1, buffers)
    assert GlobalState.from_bytes(state.to_bytes()).to_bytes() == state.to_bytes()


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
