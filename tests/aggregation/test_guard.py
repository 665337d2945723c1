"""Everything that must not be loaded is refused, with its reason, and with nothing else."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from aggregation.adapter import Adapter
from aggregation.guard import GuardError, GuardLimits, GuardReason, check, check_safetensors
from tests.aggregation.adapters import BASE, FEW, plain_spec, random_adapter

SPEC = plain_spec((2, 2), width=4)
ADAPTER = random_adapter(SPEC, 0)
FILE = save(dict(ADAPTER.tensors), metadata={"format": "pt"})
SHAPES = {m.name: (m.d_out, m.d_in) for m in SPEC.modules}
HEADS = {t.name: t.shape for t in SPEC.others}
KEY = next(iter(ADAPTER.tensors))


def reason(adapter: Adapter, **options: Any) -> GuardReason:
    with pytest.raises(GuardError) as error:
        check(adapter, expected_base=options.pop("expected_base", BASE), **options)
    return error.value.reason


def file_reason(data: bytes, limits: GuardLimits | None = None) -> GuardReason:
    with pytest.raises(GuardError) as error:
        check_safetensors(data, SPEC, limits)
    return error.value.reason


def changed(key: str, value: np.ndarray) -> Adapter:
    return Adapter(SPEC, {**ADAPTER.tensors, key: value})


def raw(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def parts() -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", FILE[:8])[0]
    return json.loads(FILE[8 : 8 + length]), FILE[8 + length :]


def test_a_good_adapter_passes() -> None:
    check(ADAPTER, expected_base=BASE, shapes=SHAPES, heads=HEADS)
    assert check_safetensors(FILE, SPEC).digest == ADAPTER.digest


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(value: float) -> None:
    for key, array in ADAPTER:
        bad = array.copy()
        bad.flat[-1] = value
        assert reason(changed(key, bad)) is GuardReason.NOT_FINITE
        file = save({**ADAPTER.tensors, key: bad})
        assert file_reason(file) is GuardReason.NOT_FINITE


def test_sizes_out_of_all_proportion_are_refused() -> None:
    spike = ADAPTER.tensors[KEY].copy()
    spike.flat[0] = -101.0
    assert reason(changed(KEY, spike)) is GuardReason.TOO_LARGE
    assert reason(changed(KEY, np.full_like(spike, 11.0))) is GuardReason.TOO_LARGE
    assert reason(ADAPTER, limits=GuardLimits(max_spectral=0.1)) is GuardReason.TOO_STRONG


def test_the_spectral_norm_is_the_true_one() -> None:
    left, right = ADAPTER.factors("layer.0.query")
    exact = SPEC.scale("layer.0.query") * np.linalg.norm(left @ right, 2)
    others = Adapter(SPEC, {**Adapter.zeros(SPEC).tensors, **{
        key: ADAPTER.tensors[key] for key in SPEC.module("layer.0.query").keys
    }})  # fmt: skip
    check(others, expected_base=BASE, limits=GuardLimits(max_spectral=exact * 1.001))
    tight = GuardLimits(max_spectral=exact * 0.999)
    assert reason(others, limits=tight) is GuardReason.TOO_STRONG


def test_the_base_and_its_modules_must_be_this_device_s() -> None:
    assert reason(ADAPTER, expected_base="sha256:" + "1" * 64) is GuardReason.WRONG_BASE
    assert reason(ADAPTER, shapes={}) is GuardReason.WRONG_MODULE
    other = {**SHAPES, "layer.1.query": (4, 8)}
    assert reason(ADAPTER, shapes=other) is GuardReason.WRONG_MODULE
    assert reason(ADAPTER, heads={}) is GuardReason.UNKNOWN_TENSOR
    assert reason(ADAPTER, heads={"head.weight": (2, 4)}) is GuardReason.WRONG_SHAPE


def test_the_tensors_must_be_exactly_those_announced() -> None:
    tensors = dict(ADAPTER.tensors)
    assert file_reason(save({})) is GuardReason.MISSING_TENSOR
    gone = {k: v for k, v in tensors.items() if k != KEY}
    assert file_reason(save(gone)) is GuardReason.MISSING_TENSOR
    extra = {**tensors, "base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}
    assert file_reason(save(extra)) is GuardReason.UNKNOWN_TENSOR
    turned = {**tensors, KEY: np.ascontiguousarray(tensors[KEY].T)}
    assert file_reason(save(turned)) is GuardReason.WRONG_SHAPE
    for dtype in (np.float64, np.float16):
        assert file_reason(save({**tensors, KEY: tensors[KEY].astype(dtype)})) is (
            GuardReason.WRONG_DTYPE
        )
    assert file_reason(save({**tensors, KEY: tensors[KEY].astype(np.int32)})) is (
        GuardReason.WRONG_DTYPE
    )


HEADER, BODY = parts()
FIRST = next(k for k in HEADER if k != "__metadata__")


def entry(**changes: object) -> dict[str, Any]:
    return {**HEADER, FIRST: {**HEADER[FIRST], **changes}}


ABUSES: dict[str, tuple[bytes, GuardReason]] = {
    "empty": (b"", GuardReason.BAD_HEADER),
    "seven bytes": (FILE[:7], GuardReason.BAD_HEADER),
    "header of 2^60 bytes": (struct.pack("<Q", 1 << 60) + FILE[8:], GuardReason.BAD_HEADER),
    "header over the limit": (raw(b" " * (2 << 20)), GuardReason.BAD_HEADER),
    "header is not JSON": (raw(b"{nonsense"), GuardReason.BAD_HEADER),
    "header is not UTF-8": (raw(b"\xff\xfe{}"), GuardReason.BAD_HEADER),
    "header is a list": (raw([1]), GuardReason.BAD_HEADER),
    "header is deep": (raw(b'{"a":' * 50_000), GuardReason.BAD_HEADER),
    "metadata is not text": (raw({"__metadata__": {"a": 1}}), GuardReason.BAD_HEADER),
    "entry without offsets": (raw({"a": {"dtype": "F32"}}), GuardReason.BAD_HEADER),
    "negative shape": (raw(entry(shape=[-2, -4]), BODY), GuardReason.BAD_HEADER),
    "shape overflows": (raw(entry(shape=[1 << 31, 1 << 33]), BODY), GuardReason.BAD_HEADER),
    "huge shape": (raw(entry(shape=[1 << 31, 1 << 31]), BODY), GuardReason.BAD_LAYOUT),
    "empty tensor": (raw(entry(shape=[0, 4]), BODY), GuardReason.BAD_HEADER),
    "boolean sizes": (raw(entry(shape=[True, 4]), BODY), GuardReason.BAD_HEADER),
    "float offsets": (raw(entry(data_offsets=[0.0, 32.0]), BODY), GuardReason.BAD_HEADER),
    "offsets go back": (raw(entry(data_offsets=[32, 0]), BODY), GuardReason.BAD_LAYOUT),
    "overlap": (raw(entry(data_offsets=[4, 36]), BODY), GuardReason.BAD_LAYOUT),
    "unknown dtype": (raw(entry(dtype="I64"), BODY), GuardReason.WRONG_DTYPE),
    "dtype is a list": (raw(entry(dtype=["F32"]), BODY), GuardReason.WRONG_DTYPE),
    "hole": (
        raw({**HEADER, "x": {"dtype": "F32", "shape": [1], "data_offsets": [len(BODY) + 4,
            len(BODY) + 8]}}, BODY + b"\0" * 8),
        GuardReason.BAD_LAYOUT,
    ),
    "trailing bytes": (FILE + b"\0", GuardReason.BAD_LAYOUT),
    "cut short": (FILE[:-1], GuardReason.BAD_LAYOUT),
    "a name twice": (
        raw(json.dumps(HEADER)[:-1].encode() + b"," + json.dumps(HEADER)[1:].encode(), BODY),
        GuardReason.DUPLICATE_TENSOR,
    ),
    "thousands of tensors": (
        raw({str(i): 0 for i in range(20_000)}), GuardReason.TOO_BIG
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ABUSES)
def test_abuses_of_the_file_format(what: str) -> None:
    data, expected = ABUSES[what]
    assert file_reason(data) is expected


def test_a_file_over_the_quota_is_not_even_parsed() -> None:
    assert file_reason(FILE, GuardLimits(max_bytes=10)) is GuardReason.TOO_BIG


@FEW
@given(st.binary(max_size=400))
def test_noise_raises_guard_error_and_nothing_else(data: bytes) -> None:
    file_reason(data)


@FEW
@given(st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(0, 255)), min_size=1))
def test_damaged_files_raise_guard_error_or_are_whole(edits: list[tuple[int, int]]) -> None:
    data = bytearray(FILE)
    for position, value in edits:
        data[position] = value
    try:
        adapter = check_safetensors(bytes(data), SPEC)
    except GuardError:
        return
    check(adapter, expected_base=BASE, shapes=SHAPES, heads=HEADS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@FEW
@given(
    st.dictionaries(
        st.sampled_from([FIRST, "x", "__metadata__"]),
        JSON
        | st.fixed_dictionaries({"dtype": JSON, "shape": JSON, "data_offsets": JSON})
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F64"]),
                "shape": st.lists(st.integers(-1, 5), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 40), max_size=3),
            }
        ),
    ),
    st.binary(max_size=40),
)
def test_any_header_raises_guard_error_and_nothing_else(header: object, body: bytes) -> None:
    file_reason(raw(header, body))
