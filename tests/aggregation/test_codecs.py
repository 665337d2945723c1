"""Codecs: what comes out is what went in up to the stated rounding, in exactly the stated bytes."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import codec_soundness
from aggregation.choices import CHOICES, read
from aggregation.codec import Codec, CodecError
from aggregation.codecs import (
    CODECS,
    BFloat16,
    FixedPoint,
    Float16,
    Float32,
    Int4,
    Int8,
    Segments,
    TopK,
    ZerosOmitted,
    read_codec,
)
from aggregation.errors import RecipeError
from aggregation.index_coding import decode_index, encode_index, index_bytes, largest
from aggregation.pieces import NoPrivacy
from aggregation.recipes import recipe
from aggregation.reducing import FactorMean
from aggregation.sent_mean import SentMean
from tests.aggregation.adapters import FEW

ALL: tuple[Codec, ...] = (
    Float32(),
    BFloat16(),
    Float16(),
    Int8(),
    Int8(block=8),
    Int4(),
    Int4(block=9),
    TopK(),
    TopK(density=0.01, values="float32"),
    TopK(density=1.0),
    Segments(),
    Segments(count=7, error_feedback=True),
    FixedPoint(clip=1e4),
    FixedPoint(clip=1e4, bits=24, clients=9),
    ZerosOmitted(),
)
FIXED = [codec for codec in ALL if not isinstance(codec, ZerosOmitted | Segments)]


def vector(n: int, seed: int, size: float = 1e-3) -> np.ndarray:
    return (size * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


codecs = st.sampled_from(ALL)
sizes = st.sampled_from([0, 1, 2, 7, 8, 63, 64, 65, 200, 1001])
scales = st.sampled_from([1e-30, 1e-9, 1e-3, 1.0, 1e3])


@FEW
@given(codecs, sizes, scales, st.integers(0, 99))
def test_decoding_is_deterministic_finite_and_of_the_stated_length(
    codec: Codec, n: int, size: float, seed: int
) -> None:
    x = vector(n, seed, size)
    data = codec.encode(x, turn=seed)
    assert data == codec.encode(x.copy(), turn=seed)
    back = codec.decode(data, n)
    assert back.dtype == np.float32
    assert back.shape == (n,)
    assert np.isfinite(back).all()
    assert len(data) <= codec.nbytes(n)
    if codec in FIXED:
        assert len(data) == codec.nbytes(n)
    if codec.lossless:
        assert (bits(back) == bits(x)).all()


@FEW
@given(sizes, scales, st.integers(0, 99))
def test_errors_stay_below_what_each_codec_states(n: int, size: float, seed: int) -> None:
    x = vector(n, seed, size)
    peak = np.abs(x).max(initial=0)
    for codec, bound in (
        (BFloat16(), 2**-8 * np.abs(x)),
        (Float16(), np.maximum(2**-11 * np.abs(x), 2**-24 * peak)),
        # the scale is rounded up by at most 2^-7, half a step is lost
        (Int8(), peak / 127 * (1 + 2**-7) / 2),
        (Int4(), peak / 7 * (1 + 2**-7) / 2),
    ):
        back = codec.decode(codec.encode(x), n)
        assert (np.abs(back - x) <= bound * (1 + 1e-5) + 1e-37).all(), codec


def test_each_block_has_a_scale_of_its_own() -> None:
    x = np.concatenate([vector(64, 1, 1.0), vector(64, 2, 1e-6)])
    back = Int8(block=64).decode(Int8(block=64).encode(x), 128)
    assert np.abs(back - x)[64:].max() < 1e-7
    coarse = Int8(block=128).decode(Int8(block=128).encode(x), 128)
    assert (coarse[64:] == 0).all()


def test_bytes_a_value_are_what_the_documentation_says() -> None:
    n = 100_000
    x = vector(n, 3)
    found = {
        str(codec): len(codec.encode(x)) / n
        for codec in (Float32(), BFloat16(), Float16(), Int8(), Int4(), TopK(), Segments())
    }
    expected = {
        "float32": 4.0,
        "bfloat16": 2.0,
        "float16": 2.0,
        "int8": 1.031,
        "int4": 0.531,
        "top-k": 0.266,
        "segments": 1.0,
    }
    assert found == pytest.approx(expected, abs=1e-3)
    for bits_, expected_bytes in ((32, 4.0), (24, 3.0), (16, 2.0)):
        assert len(FixedPoint(bits=bits_, clip=1.0).encode(x)) / n == expected_bytes


def test_lossless_means_every_bit_pattern() -> None:
    x = np.float32([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, 1.0])
    for codec in (Float32(), ZerosOmitted()):
        assert (bits(codec.decode(codec.encode(x), len(x))) == bits(x)).all()
    sparse = np.zeros(1000, np.float32)
    sparse[[3, 999]] = -0.0, 5
    assert len(ZerosOmitted().encode(sparse)) < 20
    nearly_all = np.arange(1000, dtype=np.float32)
    assert len(ZerosOmitted().encode(nearly_all)) == ZerosOmitted().nbytes(1000)
    assert (bits(ZerosOmitted().decode(ZerosOmitted().encode(sparse), 1000)) == bits(sparse)).all()


@pytest.mark.parametrize("codec", [c for c in ALL if not c.lossless], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.4e38])
def test_lossy_codecs_refuse_what_has_diverged(codec: Codec, bad: float) -> None:
    x = vector(40, 0)
    x[7] = bad
    with pytest.raises(CodecError, match="1 of 40 values are NaN, infinite"):
        codec.encode(x, turn=1)


def test_the_largest_numbers_survive_every_codec() -> None:
    x = np.float32([3e38, -3e38, 1.0, 0.0])
    for codec in (BFloat16(), Float16(), Int8(), Int4(), TopK(density=0.5)):
        back = codec.decode(codec.encode(x), 4)
        assert np.abs(back[:2]) == pytest.approx([3e38, 3e38], rel=0.01)


# --- top-k and where its values are ---------------------------------------------------------------


@FEW
@given(st.integers(1, 400), st.floats(0, 1), st.integers(0, 99))
def test_places_come_back_in_the_stated_bytes(n: int, share: float, seed: int) -> None:
    k = round(share * n)
    index = np.sort(np.random.default_rng(seed).choice(n, k, replace=False))
    data = encode_index(index, n)
    assert len(data) == index_bytes(k, n) <= -(-n // 8)
    assert decode_index(data, k, n).tolist() == index.tolist()


def test_few_places_cost_a_few_bits_each() -> None:
    n = 100_000
    for k, most in ((10_000, 5.3), (1_000, 8.6), (100, 12.1)):
        index = np.sort(np.random.default_rng(0).choice(n, k, replace=False))
        assert 8 * len(encode_index(index, n)) / k < most
    assert index_bytes(50_000, n) == n // 8  # a bitmap


def test_top_k_sends_the_largest_values_of_equal_ones_the_first() -> None:
    x = np.float32([1, -3, 2, -2, 2, 0, 0, 0])
    back = TopK(density=3 / 8, values="float32").decode(
        TopK(density=3 / 8, values="float32").encode(x), 8
    )
    assert back.tolist() == [0, -3, 2, -2, 0, 0, 0, 0]
    assert largest(np.zeros(5, np.float32), 2).tolist() == [0, 1]
    assert TopK(density=0.07).count(100) == 7
    assert TopK(density=1e-5).count(100) == 1


def test_top_k_keeps_more_than_chance() -> None:
    x = vector(10_000, 5)
    lost = TopK().decode(TopK().encode(x), 10_000) - x
    # a tenth of a Gaussian's values carries 44 % of its energy
    assert 0.5 < float((lost**2).sum() / (x**2).sum()) < 0.6


# --- segments -------------------------------------------------------------------------------------


@FEW
@given(st.integers(1, 100), st.integers(2, 9), st.integers(0, 99))
def test_segments_of_all_turns_are_the_whole_vector(n: int, count: int, seed: int) -> None:
    x = vector(n, seed)
    codec = Segments(count=count)
    parts = [codec.decode(codec.encode(x, turn), n) for turn in range(seed, seed + count)]
    assert (sum(parts) == x).all()
    assert len(codec.encode(x, seed)) <= codec.nbytes(n)


# --- malformed bytes ------------------------------------------------------------------------------


@FEW
@given(codecs, sizes, st.data())
def test_any_bytes_are_refused_in_our_words_or_make_finite_numbers(
    codec: Codec, n: int, data: Any
) -> None:
    good = codec.encode(vector(n, 1), turn=1)
    raw = bytearray(data.draw(st.sampled_from([good, good[:-1], good + b"\0", bytes(len(good))])))
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        out = codec.decode(bytes(raw), n)
    except CodecError:
        return
    assert out.shape == (n,)
    assert codec.lossless or np.isfinite(out).all()


@FEW
@given(codecs, sizes, st.binary(max_size=300))
def test_random_bytes_never_crash(codec: Codec, n: int, raw: bytes) -> None:
    with contextlib.suppress(CodecError):
        assert codec.decode(raw, n).shape == (n,)


@pytest.mark.parametrize(
    ("codec", "spoil", "match"),
    [
        (Int8(), lambda d: b"\x80\xff" + d[2:], "scale"),
        (Int8(), lambda d: d[:-1] + b"\x80", "below -127"),
        (Int4(), lambda d: d[:-1] + b"\x00", "below -7"),
        (Int4(), lambda d: d[:-1] + bytes([d[-1] | 0xF0]), "half a byte"),
        (BFloat16(), lambda d: d[:-2] + b"\x80\x7f", "infinite"),
        (Float16(), lambda d: b"\xff\x7f" + d[2:], "exponent"),
        (TopK(), lambda d: b"\xff" + d[1:], "places"),
        (TopK(), lambda d: d[:2] + b"\x00\x7c" + d[4:], "out of range|places"),
        (Segments(), lambda d: b"\x04\x00" + d[2:], "no segment"),
        (ZerosOmitted(), lambda d: b"\xff\xff\xff\xff" + d[4:], "count"),
        (ZerosOmitted(), lambda d: d[:-4] + bytes(4), "left out"),
        (Float32(), lambda d: d + b"\0", "65 bytes; 15 values|61 bytes; 15 values"),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_what_the_encoder_never_makes_is_refused(codec: Codec, spoil: Any, match: str) -> None:
    data = codec.encode(vector(15, 4), turn=0)
    with pytest.raises(CodecError, match=match):
        codec.decode(spoil(data), 15)


# --- as pieces of a recipe ------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [c for c in ALL if not isinstance(c, ZerosOmitted)], ids=str)
def test_a_codec_prints_itself_and_is_read_back(codec: Codec) -> None:
    assert read("codec", str(codec)) == codec
    assert read_codec(str(codec)) == codec


def test_the_lossless_form_is_no_choice_but_is_read_from_the_wire() -> None:
    assert CHOICES["codec"] == CODECS
    assert read_codec("zeros-omitted") == ZerosOmitted()
    with pytest.raises(RecipeError, match="allowed"):
        read("codec", "zeros-omitted")
    with pytest.raises(CodecError, match="did you mean int8"):
        read_codec("int9")


@pytest.mark.parametrize(
    "text",
    [
        "int8(block=4)",
        "int4(block=100000)",
        "top-k(density=0)",
        "top-k(density=nan)",
        "top-k(density=1.5)",
        "top-k(values=int8)",
        "segments(count=1)",
        "segments(count=5000)",
        "ring(clip=0)",
        "ring(clip=inf)",
        "ring(bits=8)",
        "ring(clients=0)",
        "ring(bits=16, clients=40000)",
    ],
)
def test_settings_out_of_bounds_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="codec="):
        read("codec", text)


def test_flags_say_what_a_secure_sum_and_a_client_must_know() -> None:
    linear = {c.kind for c in ALL if c.linear}
    assert linear == {"float32", "segments", "ring"}
    assert {c.kind for c in ALL if c.absolute} == {"float32"}
    assert [c.stateful for c in (Int8(), Int8(error_feedback=True), Float32())] == [0, 1, 0]


@pytest.mark.parametrize("codec", ["int8", "int4", "top-k", "bfloat16", "float16", "ring"])
def test_codecs_that_send_every_client_whole_go_with_any_mean(codec: str) -> None:
    for name in ("svd-warm-start", "fedit", "krum", "flora"):
        assert str(recipe(name, {"codec": codec}).codec) == codec


def test_segments_need_a_mean_over_those_who_sent_or_a_memory() -> None:
    mean = {"codec": "segments(count=8)", "reduce": "sent-mean"}
    memory = {"codec": "segments(error_feedback=true)"}
    for name in ("fedit", "ffa-lora", "fedrot-lora", "fedadam"):
        assert str(recipe(name, mean).codec) == "segments(count=8)"
        assert recipe(name, memory).codec.stateful
        with pytest.raises(RecipeError, match=r"codec=segments brings.* choose reduce=sent-mean"):
            recipe(name, {"codec": "segments"})
        with pytest.raises(RecipeError, match=r"several rounds.* choose reduce=factor-mean"):
            recipe(name, {**memory, "reduce": "sent-mean"})
    for name in ("flora", "krum", "raflora", "hetlora", "fedsvd"):
        for pieces in ({"codec": "segments"}, memory):
            with pytest.raises(RecipeError):
                recipe(name, pieces)
    for codec in ("float32", "int8", "top-k", "top-k(error_feedback=true)"):
        with pytest.raises(RecipeError, match=r"has no turns; choose reduce=factor-mean"):
            recipe("fedit", {"reduce": "sent-mean", "codec": codec})
    with pytest.raises(RecipeError, match=r"choose refactor=keep"):
        recipe("fedex-lora", memory)
    with pytest.raises(RecipeError, match=r"choose weigh=examples"):
        recipe("fedit", {**mean, "weigh": "frobenius"})


def test_who_chose_an_index_is_not_seen_through_a_memory() -> None:
    for name in ("lora-a2", "fed-plora"):
        chosen = recipe(name, {"codec": "int8", "reduce": "index-mean"})
        with pytest.raises(RecipeError, match=r"left over.*choose error_feedback=false"):
            chosen.with_pieces({"codec": "int8(error_feedback=true)"})


@dataclass(frozen=True)
class Blind(NoPrivacy):
    """Stands for a secure sum: the server sees nobody's update."""

    kind = "blind"
    secure = True


@dataclass(frozen=True)
class Hidden(NoPrivacy):
    """Stands for client-level noise at the server."""

    kind = "hidden"
    central = True


@pytest.mark.parametrize(("codec", "allowed"), [(c, c.linear) for c in ALL], ids=str)
def test_a_secure_sum_takes_only_what_adds_up(codec: Codec, allowed: bool) -> None:
    chosen = replace(recipe("fedit"))
    object.__setattr__(chosen, "private", Blind())
    object.__setattr__(chosen, "codec", codec)
    reason = codec_soundness.places_of_its_own_in_a_secure_sum(chosen)
    assert (reason == "") == allowed
    assert allowed or "choose codec=ring" in reason


def test_noise_at_the_server_needs_a_sum_over_a_fixed_number() -> None:
    for reduce, refused in ((SentMean(), True), (FactorMean(), False)):
        chosen = replace(recipe("fedit"))
        object.__setattr__(chosen, "private", Hidden())
        object.__setattr__(chosen, "reduce", reduce)
        reason = codec_soundness.noise_over_a_count_that_varies(chosen)
        assert ("choose reduce=factor-mean" in reason) == refused
