"""What is kept beside an adapter: as further adapters, and stacked into one without loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import beside, peft_layout
from aggregation.adapter import Adapter
from aggregation.beside import StackError, residual_adapters, stacked
from aggregation.low_rank import LowRank
from aggregation.spec import AdapterSpec, ModuleSpec
from aggregation.state import GlobalState
from tests.aggregation.adapters import plain_spec, products, random_adapter, relative


def rest_of(adapter: Adapter, rank: int, seed: int = 7) -> GlobalState:
    rng = np.random.default_rng(seed)
    residual = {
        m.name: LowRank(rng.normal(size=(m.d_out, rank)), rng.normal(size=(rank, m.d_in)))
        for m in adapter.spec.modules
    }
    return GlobalState(adapter, residual)


def total(adapter: Adapter, extra: tuple[Adapter, ...]) -> dict[str, np.ndarray]:
    whole = products(adapter)
    for one in extra:
        for name, matrix in products(one).items():
            whole[name] = whole[name] + matrix
    return whole


@given(rank=st.integers(1, 20), seed=st.integers(0, 99), rslora=st.booleans())
def test_one_adapter_does_what_the_two_do_together(rank: int, seed: int, rslora: bool) -> None:
    adapter = random_adapter(replace(plain_spec(), use_rslora=rslora), seed)
    state = rest_of(adapter, rank, seed)
    extra = residual_adapters(state)
    assert all(not one.spec.others for one in extra)
    one = stacked(adapter, extra)
    assert [m.rank for m in one.spec.modules] == [
        min(m.rank + rank, m.d_in, m.d_out) for m in adapter.spec.modules
    ]
    for name, matrix in total(adapter, extra).items():
        assert relative(products(one)[name], matrix) < 1e-6
        assert relative(matrix, state.exact(name).B @ state.exact(name).A) < 1e-6
    for tensor in adapter.spec.others:
        assert np.array_equal(one.tensors[tensor.key], adapter.tensors[tensor.key])
    assert one.spec.labels == adapter.spec.labels


def test_nothing_beside_changes_nothing() -> None:
    adapter = random_adapter(plain_spec(), 1)
    assert residual_adapters(GlobalState(adapter)) == ()
    assert stacked(adapter, ()) is adapter


def test_what_no_single_adapter_can_hold_is_refused_with_the_remedy() -> None:
    spec = plain_spec((160,), width=600)
    adapter = random_adapter(spec, 1)
    extra = residual_adapters(rest_of(adapter, 300))
    assert [one.spec.modules[0].rank for one in extra] == [256, 44]
    with pytest.raises(StackError, match=r"layer\.0\.query.*rank 460.*may have 256.*svd-warm"):
        stacked(adapter, extra)


def test_what_belongs_to_something_else_is_refused() -> None:
    adapter = random_adapter(plain_spec(), 1)
    with pytest.raises(StackError, match="for base sha256:1111"):
        stacked(
            adapter, [random_adapter(replace(plain_spec(), base_digest="sha256:" + "1" * 64), 1)]
        )
    with pytest.raises(StackError, match="may have a head"):
        stacked(adapter, [adapter])
    other = AdapterSpec(adapter.spec.base_digest, (ModuleSpec("elsewhere", 4, 4, 2, 2.0),))
    with pytest.raises(StackError, match="elsewhere"):
        stacked(adapter, [Adapter.zeros(other)])


def test_folders_are_read_back(tmp_path: Path) -> None:
    adapter = random_adapter(plain_spec((160,), width=600), 1)
    extra = residual_adapters(rest_of(adapter, 300))
    files = beside.files(extra, "some/base")
    assert {name.partition("/")[0] for name in files} == {"residual", "residual-2"}
    peft_layout.write(tmp_path / "a", adapter, base_name="some/base", extra=files)
    assert [one.digest for one in beside.read(tmp_path / "a")] == [one.digest for one in extra]
    peft_layout.write(tmp_path / "b", adapter, base_name="some/base")
    assert beside.read(tmp_path / "b") == ()
