from __future__ import annotations

import io
import tracemalloc
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.payload import (
    Payload,
    PayloadError,
    PayloadLimits,
    decode,
    encode,
    peek_spec,
)
from aggregation.spec import AdapterSpec
from aggregation.values import packed_length
from tests.aggregation.adapters import FEW, plain_spec, random_adapter, specs

SPEC = plain_spec()
ADAPTER = random_adapter(SPEC, 0)
GOOD = encode(ADAPTER)


def opened(payload: Payload, spec: AdapterSpec) -> Adapter:
    return decode(payload.data, spec_digest=spec.digest, adapter_digest=payload.adapter_digest)


def refused(data: bytes, match: str | None, **options: Any) -> None:
    with pytest.raises(PayloadError, match=match):
        decode(data, spec_digest=SPEC.digest, adapter_digest=GOOD.adapter_digest, **options)


@FEW
@given(specs(), st.integers(0, 99), st.sampled_from(["bf16", "f32", "int8"]))
def test_what_comes_out_is_what_went_in_up_to_rounding(
    spec: AdapterSpec, seed: int, dtype: Any
) -> None:
    adapter = random_adapter(spec, seed)
    payload = encode(adapter, dtype=dtype)
    again = opened(payload, spec)
    assert again.digest == payload.adapter_digest
    assert payload.length == len(payload.data)
    assert payload.plain_length == packed_length(spec, dtype)
    assert peek_spec(payload.data, spec.digest) == spec
    for key, value in adapter:
        rounding = {
            "f32": 0.0,
            "bf16": 2**-8 * np.abs(value),
            "int8": np.abs(value).max() / 127 * 0.501,
        }[dtype]
        assert (np.abs(again.tensors[key] - value) <= rounding + 1e-12).all()
    assert encode(again, dtype=dtype).adapter_digest == again.digest  # rounding happens once
    assert encode(adapter, dtype=dtype).data == payload.data


def test_bfloat16_rounds_as_torch_does() -> None:
    import torch

    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    values[:4] = [0.0, -0.0, 1.00390625, 1.01171875]
    values *= np.exp2(np.arange(5000) % 60 - 30).astype(np.float32)
    spec = AdapterSpec(SPEC.base_digest, (), (type(SPEC.others[0])("head.weight", (5000,)),))
    payload = encode(Adapter(spec, {"base_model.model.head.weight": values}))
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(opened(payload, spec).pack(), expected)


def test_int8_keeps_weak_directions_beside_strong_ones() -> None:
    """B carries singular values a thousandfold apart; each column has scales of its own."""
    spec = plain_spec((4,), width=64)
    tensors = dict(random_adapter(spec, 0).tensors)
    key = spec.modules[0].keys[1]
    tensors[key] = tensors[key] * np.float32([1000, 100, 1, 0.1])
    again = opened(encode(Adapter(spec, tensors), dtype="int8"), spec)
    for column in range(4):
        truth = tensors[key][:, column]
        assert np.linalg.norm(again.tensors[key][:, column] - truth) < 0.02 * np.linalg.norm(truth)


def test_small_where_it_should_be() -> None:
    spec = plain_spec((8, 8, 8, 8), width=384)
    adapter = random_adapter(spec, 0, 0.02)
    f32, bf16, int8 = (encode(adapter, dtype=d).length for d in ("f32", "bf16", "int8"))  # type: ignore[arg-type]
    assert bf16 < 0.8 * 2 * spec.size
    assert int8 < 1.1 * spec.size
    assert f32 < 0.95 * 4 * spec.size


@pytest.mark.parametrize("position", range(0, len(GOOD.data), 37))
def test_no_flipped_bit_and_no_cut_gets_through(position: int) -> None:
    flipped = bytearray(GOOD.data)
    flipped[position] ^= 1 << (position % 8)
    refused(bytes(flipped), None)
    refused(GOOD.data[:position], None)


@FEW
@given(st.binary(max_size=300), st.integers(0, 3))
def test_noise_raises_payload_error_and_nothing_else(noise: bytes, prefix: int) -> None:
    head = (b"", GOOD.data[:14], GOOD.data[: 14 + len(SPEC.to_json())], GOOD.data)[prefix]
    if noise or prefix < 3:
        refused(head + noise, None)


def head(spec: AdapterSpec) -> bytes:
    text = spec.to_json().encode()
    return b"airpeft\0" + bytes([1, 1]) + len(text).to_bytes(4, "little") + text


def test_a_bomb_is_refused_in_little_memory() -> None:
    """Frames that announce or unpack to far more than the specification allows."""
    announced = zstandard.ZstdCompressor().compress(b"\0" * (64 << 20))
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    silent = compressor.compress(b"\0" * (64 << 20)) + compressor.flush()
    length = packed_length(SPEC, "bf16")
    lying = zstandard.ZstdCompressor().compress(b"\0" * length)
    # The header's content size says what is expected, the blocks hold another amount.
    at = announced.index((64 << 20).to_bytes(4, "little"))
    lies = announced[:at] + length.to_bytes(4, "little") + announced[at + 4 :]
    tracemalloc.start()
    for bomb in (announced, silent, lies):
        refused(head(SPEC) + bomb, "announces|decompress|more bytes|bytes, expected")
    refused(head(SPEC) + lying, "has digest")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_limits_hold_before_anything_is_opened() -> None:
    refused(GOOD.data, "larger than 99", limits=PayloadLimits(max_bytes=99))
    refused(GOOD.data, "at most 10 are", limits=PayloadLimits(max_plain=10))
    refused(GOOD.data, "specification length", limits=PayloadLimits(max_spec=10))
    stream = io.BytesIO(GOOD.data + b"\0" * 1000)
    with pytest.raises(PayloadError, match="larger than"):
        decode(
            stream,
            spec_digest=SPEC.digest,
            adapter_digest=GOOD.adapter_digest,
            limits=PayloadLimits(max_bytes=len(GOOD.data)),
        )
    assert stream.tell() == len(GOOD.data) + 1


def test_the_signed_digests_decide() -> None:
    stranger = encode(random_adapter(plain_spec(alpha=8.0), 0))
    refused(stranger.data, "specification has digest")
    refused(encode(random_adapter(SPEC, 1)).data, "adapter has digest")
    assert decode(
        io.BytesIO(GOOD.data), spec_digest=SPEC.digest, adapter_digest=GOOD.adapter_digest
    ).spec == SPEC  # fmt: skip
    with pytest.raises(PayloadError, match="specification has digest"):
        peek_spec(GOOD.data, "sha256:" + "1" * 64)


def test_the_specification_is_not_parsed_before_its_digest_fits() -> None:
    deep = b"[" * 100_000
    data = b"airpeft\0" + bytes([1, 1]) + len(deep).to_bytes(4, "little") + deep
    refused(data, "specification has digest")
    import hashlib

    with pytest.raises(PayloadError, match="does not parse"):
        peek_spec(data, "sha256:" + hashlib.sha256(deep).hexdigest())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_only_finite_adapters_are_delivered(value: float) -> None:
    tensors = {key: np.full_like(array, value) for key, array in ADAPTER}
    with pytest.raises(PayloadError, match="NaN or infinite"):
        encode(Adapter(SPEC, tensors))
    largest = {key: np.full_like(array, 3.4e38) for key, array in ADAPTER}
    with pytest.raises(PayloadError, match="overflow bf16"):
        encode(Adapter(SPEC, largest))
    with pytest.raises(PayloadError, match="dtype 'fp4'"):
        encode(ADAPTER, dtype="fp4")  # type: ignore[arg-type]
