from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter, AdapterError
from aggregation.init import initial_adapter
from aggregation.spec import AdapterSpec, ModuleSpec, Orientation, SpecError, TensorSpec
from tests.aggregation.adapters import BASE, FEW, plain_spec, random_adapter, specs

SPEC = plain_spec()


@FEW
@given(specs(), st.integers(0, 99))
def test_json_and_vectors_round_trip_and_digests_cover_every_value(
    spec: AdapterSpec, seed: int
) -> None:
    again = AdapterSpec.from_json(spec.to_json())
    assert again == spec
    assert again.digest == spec.digest
    adapter = random_adapter(spec, seed)
    assert Adapter.unpack(spec, adapter.pack()).digest == adapter.digest
    said = spec.to_json().encode()  # releases are signed over this: it must never change
    for key, value in adapter.tensors.items():
        said += b"\0" + key.encode() + b"\0" + value.astype("<f4").tobytes()
    assert adapter.digest == "sha256:" + hashlib.sha256(said).hexdigest()
    vector = adapter.pack().copy()
    vector[seed % vector.size] = np.nextafter(vector[seed % vector.size], np.float32(9))
    assert Adapter.unpack(spec, vector).digest != adapter.digest
    for module in spec.modules:
        root = math.sqrt(module.rank) if spec.use_rslora else module.rank
        assert spec.scale(module.name) == pytest.approx(module.alpha / root)
    reordered = replace(spec, modules=spec.modules[::-1])
    assert reordered.digest == spec.digest


DOCUMENT = json.loads(SPEC.to_json())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@FEW
@given(st.sampled_from(sorted(DOCUMENT)), JSON, st.booleans())
def test_any_field_may_be_anything_and_only_spec_error_comes_out(
    field: str, value: object, inside: bool
) -> None:
    document = json.loads(SPEC.to_json())
    if inside:
        key = sorted(document["modules"][0])[len(field) % 6]
        document["modules"][0][key] = value
    else:
        document[field] = value
    try:
        spec = AdapterSpec.from_json(json.dumps(document))
    except SpecError:
        return
    assert AdapterSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "1" * 10_000,
        "{}",
        SPEC.to_json().replace('"rank":4', '"rank":4,"rank2":4'),
        SPEC.to_json().replace('"alpha_micro":16000000', '"alpha_micro":1' + "0" * 400),
        SPEC.to_json().replace('"labels":[]', '"labels":"abc"'),
        SPEC.to_json().replace('"schema":1', '"schema":2'),
    ],
)
def test_what_is_not_a_specification_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        AdapterSpec.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank=0 is outside 1..8"),
        ({"rank": 9}, "rank=9 is outside 1..8"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": 1e-7}, "whole millionths"),
        ({"d_in": 0}, "d_in=0"),
        ({"name": "a..b"}, "dotted path"),
        ({"name": "(a+)+"}, "dotted path"),
    ],
)
def test_impossible_modules_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(ModuleSpec("a.b", 8, 12, 2, 16.0), **changes)  # type: ignore[arg-type]


def test_impossible_specifications_are_refused() -> None:
    module = ModuleSpec("a", 8, 8, 2, 16.0)
    with pytest.raises(SpecError, match="named twice: a"):
        AdapterSpec(BASE, (module, module))
    with pytest.raises(SpecError, match="neither"):
        AdapterSpec(BASE)
    with pytest.raises(SpecError, match="base_digest"):
        AdapterSpec("0" * 64, (module,))
    with pytest.raises(SpecError, match="task"):
        AdapterSpec(BASE, (module,), task="poetry")
    with pytest.raises(SpecError, match="no module 'b'"):
        AdapterSpec(BASE, (module,)).module("b")
    with pytest.raises(SpecError, match="shape"):
        TensorSpec("head.weight", (0, 3))


def test_tensors_must_fit_and_cannot_be_changed_afterwards() -> None:
    tensors = dict(random_adapter(SPEC, 0).tensors)
    key = next(iter(tensors))
    for bad in (tensors[key].T, tensors[key].astype(np.int32), np.zeros(3)):
        with pytest.raises(AdapterError, match="expected floats of shape"):
            Adapter(SPEC, {**tensors, key: bad})
    with pytest.raises(AdapterError, match="missing"):
        Adapter(SPEC, {k: v for k, v in tensors.items() if k != key})
    with pytest.raises(AdapterError, match="unknown"):
        Adapter(SPEC, {**tensors, "x": np.zeros(1)})
    with pytest.raises(AdapterError, match="in one vector"):
        Adapter.unpack(SPEC, np.zeros(SPEC.size + 1, np.float32))
    mine = tensors[key].copy()
    adapter = Adapter(SPEC, {**tensors, key: mine})
    digest = adapter.digest
    mine[:] = 0
    with pytest.raises(ValueError, match="read-only"):
        adapter.tensors[key][0, 0] = 1.0
    assert Adapter(SPEC, dict(adapter.tensors)).digest == digest


def test_nobody_gets_a_writable_alias() -> None:
    vector = random_adapter(SPEC, 0).pack().copy()
    adapter = Adapter.unpack(SPEC, vector)
    digest = adapter.digest
    vector[:] = 0
    key = next(iter(adapter.tensors))
    for array in (adapter.pack(), adapter.tensors[key], adapter.factors(SPEC.modules[0].name)[0]):
        assert array.base is not None
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1.0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    with pytest.raises(TypeError):
        adapter.tensors[key] = np.zeros(1)  # type: ignore[index]
    assert Adapter.unpack(SPEC, adapter.pack()).digest == digest


@FEW
@given(specs(), st.integers(0, 99), st.sampled_from([0.0, 1e-3, np.nan, np.inf, -np.inf]))
def test_what_is_said_of_all_values_is_true_of_each(
    spec: AdapterSpec, seed: int, change: float
) -> None:
    one = random_adapter(spec, seed)
    vector = one.pack().copy()
    vector[seed % vector.size] += np.float32(change)
    other = Adapter.unpack(spec, vector)
    assert np.array_equal(np.concatenate([v.ravel() for _, v in other]), vector, equal_nan=True)
    assert one.same_values(one)
    assert one.same_values(other) == (change == 0.0)
    assert not one.same_values(Adapter.zeros(replace(spec, use_rslora=not spec.use_rslora)))
    assert other.is_finite() == bool(np.isfinite(change))
    largest = float(np.abs(vector).max())
    for limit in (1e-3, 0.5, 1e6):
        assert other.within(limit) == bool(largest <= limit)
    assert one.within(float(np.abs(one.pack()).max()))
    big = Adapter.unpack(spec, np.full(spec.size, 3e38, np.float32))
    assert big.is_finite()  # though the sum of squares is not
    assert not big.within(1e38)


def test_adapters_of_many_values_are_compared_to_the_last_one() -> None:
    spec = AdapterSpec(BASE, (), (TensorSpec("head.weight", (40, 100)),))
    one = random_adapter(spec, 0)
    vector = one.pack().copy()
    vector[-1] += 1
    assert not one.same_values(Adapter.unpack(spec, vector))


def test_the_initial_adapter_changes_nothing_and_can_learn() -> None:
    spec = AdapterSpec(
        BASE,
        (
            ModuleSpec("linear", 400, 30, 8, 16.0),
            ModuleSpec("embedding", 400, 30, 8, 16.0, Orientation.EMBEDDING),
        ),
        (TensorSpec("head.weight", (30, 40)), TensorSpec("head.bias", (30,))),
    )
    adapter = initial_adapter(spec, 3)
    assert not adapter.factors("linear")[0].any()
    a = adapter.factors("linear")[1]
    assert np.abs(a).max() <= 1 / 20
    assert a.std() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)
    assert adapter.factors("embedding")[1].std() == pytest.approx(1, rel=0.05)
    assert adapter.tensors["base_model.model.head.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert not adapter.tensors["base_model.model.head.bias"].any()
    assert initial_adapter(spec, 4).digest != adapter.digest
    smaller = initial_adapter(replace(spec, modules=spec.modules[:1]), 3)
    name = spec.modules[0].name
    assert np.array_equal(smaller.factors(name)[1], adapter.factors(name)[1])
