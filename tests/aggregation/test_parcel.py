"""Parcels: what arrives is what the client says, bit for bit; error feedback loses nothing."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.codec import Codec, CodecError
from aggregation.codecs import Float32, Int8, Segments, TopK, read_codec
from aggregation.core_basis import core_of, settle, with_core
from aggregation.index_mean import IndexMean
from aggregation.parcel import (
    MAX_VALUES,
    Parcel,
    check_expected,
    needs_start,
    pack,
    pack_down,
    send,
    sent_keys,
    turn_of,
    unpack,
)
from aggregation.parcel_keys import key_text, keys_from
from aggregation.rank_selection import keep_only, random_ranks
from aggregation.recipes import recipe
from aggregation.reducing import FactorMean
from aggregation.sent_mean import SentMean
from aggregation.spec import AdapterSpec
from aggregation.state import initial_state
from aggregation.update import Update
from tests.aggregation.adapters import FEW, moved, plain_spec, random_adapter, relative, specs

WRITTEN = (
    "float32",
    "bfloat16",
    "float16",
    "int8",
    "int4(block=16)",
    "top-k(density=0.3)",
    "top-k(density=0.05, values=float32)",
    "segments(count=3)",
    "ring(clip=10)",
)
LOSSY = tuple(
    w[:-1] + ", error_feedback=true)" if "(" in w else w + "(error_feedback=true)"
    for w in WRITTEN[1:]
)
ASSIGNED = (
    Assignment(),
    Assignment(trains="B", sends="B"),
    Assignment(trains="A", sends="A"),
    Assignment(sends="A", keeps="B"),
    Assignment(sketch=4),
    Assignment(trains="core", sends="core", seed=5),
)
WHOLE = Assignment()


def start_for(spec: AdapterSpec, assignment: Assignment, seed: int = 0) -> Adapter:
    start = random_adapter(spec, seed, 0.05)
    return settle(start, assignment.seed) if assignment.sends == "core" else start


@FEW
@given(specs(), st.sampled_from(WRITTEN), st.sampled_from(ASSIGNED), st.integers(0, 9))
def test_server_and_client_arrive_at_the_same_bits(
    spec: AdapterSpec, written: str, assignment: Assignment, turn: int
) -> None:
    start = start_for(spec, assignment)
    trained = moved(start, 1, 1e-3)
    keys = sent_keys(spec, assignment)
    parcel, arrived, memory = pack(read_codec(written), trained, start, keys, turn=turn)
    assert memory is None
    came = unpack(replace(parcel, data=bytes(parcel.data)), spec, start)
    assert came.digest == arrived.digest
    assert keys_from(key_text(parcel.keys, spec), spec) == keys
    check_expected(parcel, spec, assignment, written)
    assert parcel.nbytes <= read_codec(written).nbytes(sum_of(spec, keys))
    if assignment.sends != "core":
        for key in set(spec.shapes()) - set(keys):
            assert (arrived.tensors[key] == start.tensors[key]).all()
    if written == "float32" and assignment == WHOLE:
        assert arrived.digest == trained.digest


def sum_of(spec: AdapterSpec, keys: tuple[str, ...]) -> int:
    ranks = {m.name: m.rank**2 for m in spec.modules}
    return sum(
        ranks[k.split(":", 2)[2]] if k.startswith("core:") else math.prod(spec.shapes()[k])
        for k in keys
    )


def test_assignments_say_what_travels() -> None:
    spec = plain_spec((2, 3))
    head = "base_model.model.head.weight"
    both = sent_keys(spec, WHOLE)
    assert both == tuple(spec.shapes())
    only_b = sent_keys(spec, Assignment(trains="B", sends="B"))
    assert set(only_b) == {m.keys[1] for m in spec.modules} | {head}
    assert set(sent_keys(spec, Assignment(sends="A", keeps="B"))) == {
        m.keys[0] for m in spec.modules
    }
    assert sent_keys(spec, Assignment(sketch=8)) == (head,)
    core = sent_keys(spec, Assignment(trains="core", sends="core", seed=3))
    assert core == ("core:3:layer.0.query", "core:3:layer.1.query", head)


def test_a_core_costs_r_squared_up_and_down_and_the_mean_is_exact() -> None:
    spec = replace(plain_spec((4, 8)), others=())
    assignment = Assignment(trains="core", sends="core", seed=11)
    start = settle(random_adapter(spec, 0, 0.1), 11)
    assert pack_down(start, None, assignment)[0].nbytes == 4 * (16 + 64)
    total = {m.name: np.zeros((m.rank, m.rank)) for m in spec.modules}
    accumulator = FactorMean().accumulator(spec, measure=False)
    for seed in range(3):
        cores = {
            name: core + np.random.default_rng(seed).normal(size=core.shape).astype(np.float32)
            for name, core in core_of(start, 11).items()
        }
        trained = with_core(spec, cores, 11)
        update = Update(f"client-{seed}", 1, start.digest, trained, 1.0)
        sent, _ = send(update, start, assignment, Float32())
        assert sent.parcel is not None
        assert sent.parcel.nbytes == 4 * (16 + 64)
        came = unpack(sent.parcel, spec, start)
        assert came.digest == sent.adapter.digest
        accumulator.add(came, start, 1.0)
        for name, core in core_of(trained, 11).items():
            total[name] += core / 3
    reduced = accumulator.finish(3.0)
    for module in spec.modules:
        left = start.factors(module.name)[0] + reduced.factors[module.name][0]  # type: ignore[index]
        exact = with_core(spec, total, 11).factors(module.name)[0]
        assert relative(left, exact) < 1e-6


def test_a_core_outside_the_basis_travels_as_it_is() -> None:
    spec = plain_spec()
    assignment = Assignment(trains="core", sends="core", seed=2)
    free = random_adapter(spec, 4)
    parcel, built_on = pack_down(free, None, assignment)
    assert unpack(parcel, spec, None).digest == free.digest
    assert (parcel.nbytes, built_on) == (4 * spec.size, "")


# --- error feedback -------------------------------------------------------------------------------


@FEW
@given(st.sampled_from(LOSSY), st.sampled_from(ASSIGNED[:4]), st.integers(0, 99))
def test_error_feedback_telescopes(written: str, assignment: Assignment, seed: int) -> None:
    """sum sent + memory == sum of updates, to 1e-6, whatever the codec leaves behind."""
    spec, codec = plain_spec((2, 3), width=12), read_codec(written)
    assert codec.stateful
    start, memory = random_adapter(spec, seed, 0.05), None
    sent, updates = np.zeros(spec.size), np.zeros(spec.size)
    keys = sent_keys(spec, assignment)
    for number in range(12):
        trained = moved(start, 100 * seed + number, 1e-3)
        parcel, arrived, memory = pack(codec, trained, start, keys, memory, turn=number)
        assert unpack(parcel, spec, start).digest == arrived.digest
        for key in keys:
            place = slice(*spec.layout[key][:2])
            before = start.pack()[place].astype(np.float64)
            sent[place] += arrived.pack()[place] - before
            updates[place] += trained.pack()[place] - before
        start = arrived
    assert memory is not None
    assert np.abs(sent + memory - updates).max() <= 1e-6 * np.abs(updates).max()


def test_feedback_delivers_what_is_lost_without_it() -> None:
    """Top 5 %, 200 rounds of one direction and noise: the total arrives, or a fraction of it."""
    spec = plain_spec((2, 3), width=12)
    step, rng = random_adapter(spec, 1, 1e-3), np.random.default_rng(0)
    off = {}
    for feedback in (False, True):
        codec = TopK(density=0.05, error_feedback=feedback)
        at, memory, wanted = random_adapter(spec, 0, 0.05), None, np.zeros(spec.size)
        begin = at.pack().astype(np.float64)
        for _ in range(200):
            noise = 2e-4 * rng.standard_normal(spec.size).astype(np.float32)
            trained = Adapter.unpack(spec, at.pack() + step.pack() + noise)
            wanted += trained.pack().astype(np.float64) - at.pack()
            _, at, memory = pack(codec, trained, at, tuple(spec.layout), memory)
        off[feedback] = relative(at.pack() - begin, wanted)
    assert off[True] < 0.1
    assert off[False] > 0.6


def test_the_memory_of_one_factor_waits_while_the_other_travels() -> None:
    spec, codec = plain_spec((2, 3), width=12), TopK(density=0.1, error_feedback=True)
    start = random_adapter(spec, 0, 0.05)
    trained = moved(start, 1, 1e-3)
    b, a = (sent_keys(spec, Assignment(trains=f, sends=f)) for f in ("B", "A"))
    _, _, first = pack(codec, trained, start, b)
    _, _, second = pack(codec, trained, start, a, first)
    assert first is not None
    assert second is not None
    for key in b:
        place = slice(*spec.layout[key][:2])
        if key not in a:
            assert first[place].any()
            assert (second[place] == first[place]).all()


def test_cores_have_a_memory_of_their_own() -> None:
    spec, assignment = plain_spec(), Assignment(trains="core", sends="core", seed=1)
    start, codec = settle(random_adapter(spec, 0, 0.1), 1), Int8(error_feedback=True)
    trained = settle(moved(start, 2, 0.01), 1)
    keys = sent_keys(spec, assignment)
    parcel, arrived, memory = pack(codec, trained, start, keys)
    assert memory is not None
    assert memory.shape == (sum_of(spec, keys),)
    assert unpack(parcel, spec, start).digest == arrived.digest
    assert pack(codec, trained, start, keys, memory)[2] is not None
    with pytest.raises(CodecError, match="another adapter; start without"):
        pack(codec, trained, start, tuple(spec.layout), memory)


@pytest.mark.parametrize(
    "memory", [np.zeros(3, np.float32), np.zeros(1, np.float64), np.full(1, np.nan, np.float32)]
)
def test_a_memory_that_does_not_fit_is_refused(memory: np.ndarray) -> None:
    spec = plain_spec()
    start = random_adapter(spec, 0)
    if memory.size == 1:
        memory = np.repeat(memory, spec.size)
    with pytest.raises(CodecError, match="start without"):
        pack(Int8(error_feedback=True), start, start, tuple(spec.layout), memory)


# --- fewer bytes ----------------------------------------------------------------------------------


def test_what_did_not_change_costs_a_bit_or_less() -> None:
    spec = plain_spec((8, 8), width=40)
    start = random_adapter(spec, 0)
    masks = random_ranks(spec, 0.25, 1, "client-00001", 1)
    trained = keep_only(moved(start, 1), start, masks)
    parcel, arrived, _ = pack(Float32(), trained, start, tuple(spec.layout))
    assert parcel.codec == "zeros-omitted"
    assert arrived.digest == unpack(parcel, spec, start).digest == trained.digest
    changed = int((trained.pack() != start.pack()).sum())
    assert parcel.nbytes < 4 * changed + spec.size / 8 + 16
    reduced = [IndexMean().accumulator(spec, measure=False) for _ in range(2)]
    reduced[0].add(trained, start, 1.0)
    reduced[1].add(unpack(parcel, spec, start), start, 1.0)
    one, other = (r.finish(1.0).factors for r in reduced)
    assert one is not None
    assert other is not None
    assert all((one[k][0] == other[k][0]).all() for k in one)


def test_a_server_sends_no_tensor_that_the_client_still_has() -> None:
    spec = plain_spec((4, 4))
    held = random_adapter(spec, 0)
    tensors = dict(held.tensors)
    key = spec.modules[0].keys[1]
    tensors[key] = tensors[key] + 1
    adapter = Adapter(spec, tensors)
    parcel, built_on = pack_down(adapter, held, WHOLE)
    assert (parcel.keys, built_on, parcel.nbytes) == ((key,), held.digest, tensors[key].nbytes)
    assert unpack(parcel, spec, held).digest == adapter.digest
    assert pack_down(held, held, WHOLE)[0].nbytes == 0
    other = random_adapter(spec.with_ranks(2), 0)
    for nothing in (None, other, random_adapter(spec, 9)):
        parcel, built_on = pack_down(adapter, nothing, WHOLE)
        assert (parcel.nbytes, built_on) == (4 * spec.size, "")


def test_zeros_cost_nothing_on_the_way_down() -> None:
    spec = plain_spec((4, 4), width=60)
    values = random_adapter(spec, 0).pack().copy()
    values[np.random.default_rng(0).random(spec.size) < 0.9] = 0
    values[0] = -0.0
    sparse = Adapter.unpack(spec, values)
    parcel, built_on = pack_down(sparse, None, WHOLE)
    assert built_on == ""
    assert parcel.nbytes < 0.5 * spec.size  # 10 % of 4 bytes, and half a bit a value
    assert unpack(parcel, spec, Adapter.zeros(spec)).digest == sparse.digest


# --- turns ----------------------------------------------------------------------------------------


def test_clients_take_turns() -> None:
    turns = [turn_of(f"client-{i:05d}", 3) % 4 for i in range(8)]
    assert sorted(turns) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [turn_of("pi-kitchen", n) - turn_of("pi-kitchen", 1) for n in (1, 2, 3)] == [0, 1, 2]


def test_segments_are_averaged_over_those_whose_turn_it_was() -> None:
    spec = plain_spec((2, 3), width=12)
    start, weights = random_adapter(spec, 0, 0.05), [3.0, 1.0, 1.0, 2.0, 5.0, 1.0]
    accumulator = SentMean().accumulator(spec, measure=True)
    sums, shares = np.zeros(spec.size), np.zeros(spec.size)
    for index, weight in enumerate(weights):
        update = Update(f"client-{index:05d}", 1, start.digest, moved(start, index, 1e-3), weight)
        sent, _ = send(update, start, WHOLE, Segments(count=8))
        accumulator.add(sent.adapter, start, weight)
        part = turn_of(update.client, 1) % 8
        place = slice(part * spec.size // 8, (part + 1) * spec.size // 8)
        sums[place] += weight * (update.adapter.pack() - start.pack())[place]
        shares[place] += weight
    reduced = accumulator.finish(sum(weights))
    assert reduced.factors is not None
    assert set(reduced.products) == {m.name for m in spec.modules}
    found = {t.key: reduced.others[t.key] for t in spec.others}
    for module in spec.modules:
        found[module.keys[1]], found[module.keys[0]] = reduced.factors[module.name]
    flat = np.concatenate([found[key].ravel() for key in spec.layout])
    assert (flat[shares == 0] == 0).all()
    assert (shares == 0).sum() > spec.size // 5  # nobody has two of the turns
    expected = np.divide(sums, shares, out=np.zeros_like(sums), where=shares > 0)
    assert relative(flat, expected) < 1e-4


def test_rounds_of_segments_reach_what_all_coordinates_reach() -> None:
    """Six clients pull towards six points; a round of segments is a part of a round of all."""
    spec = plain_spec((2, 2), width=10)
    goals = [random_adapter(spec, seed, 0.1).pack() for seed in range(6)]
    best = np.mean(goals, axis=0)
    left = {}
    for pieces in (
        {},
        {"codec": "segments(count=3)", "reduce": "sent-mean"},
        {"codec": "segments(count=3, error_feedback=true)"},
    ):
        chosen, memories = recipe("fedit", pieces), dict.fromkeys(range(6))
        state, last = initial_state(random_adapter(spec, 99, 0.1)), []
        for number in range(1, 61):
            reduction, start = chosen.begin(state, measure=False), state.adapter
            for index, goal in enumerate(goals):
                trained = Adapter.unpack(spec, start.pack() + 0.1 * (goal - start.pack()))
                update = Update(f"client-{index}", number, start.digest, trained, 1.0)
                memory = memories[index]
                sent, memories[index] = send(update, start, WHOLE, chosen.codec, memory)
                reduction.add(sent)
            state, _ = reduction.finish()
            last = [*last[-2:], state.adapter.pack()]  # one turn of everybody
        left[str(chosen.codec)] = relative(np.mean(last, axis=0), best)
    assert set(left) == {"float32", "segments(count=3)", "segments(count=3, error_feedback=true)"}
    assert max(left.values()) < 0.02, left


# --- what is refused ------------------------------------------------------------------------------


def test_a_client_that_has_diverged_is_told_so() -> None:
    spec = plain_spec()
    start = random_adapter(spec, 0)
    tensors = {k: v.copy() for k, v in start}
    tensors[spec.modules[0].keys[0]][0, 0] = np.nan
    broken = Adapter(spec, tensors)
    for written in WRITTEN[1:]:
        with pytest.raises(CodecError, match="NaN, infinite or beyond"):
            pack(read_codec(written), broken, start, tuple(spec.layout))
    parcel, arrived, _ = pack(Float32(), broken, start, tuple(spec.layout))  # the server refuses it
    assert not arrived.is_finite()
    assert unpack(parcel, spec, start).digest == arrived.digest


def test_what_was_not_asked_for_is_refused() -> None:
    spec = plain_spec()
    start = random_adapter(spec, 0)
    parcel, _, _ = pack(Int8(), moved(start, 1), start, tuple(spec.layout))
    check_expected(parcel, spec, WHOLE, "int8")
    with pytest.raises(CodecError, match=r"5 tensors came, not the 3 .*sends=B"):
        check_expected(parcel, spec, Assignment(trains="B", sends="B"), "int8")
    with pytest.raises(CodecError, match="asked for was 'int4'"):
        check_expected(parcel, spec, WHOLE, "int4")
    other = Assignment(trains="core", sends="core", seed=1)
    cores = replace(parcel, keys=sent_keys(spec, replace(other, seed=2)))
    with pytest.raises(CodecError, match="sends=core"):
        check_expected(cores, spec, other, "")


def test_starts_that_are_missing_or_of_another_shape_are_refused() -> None:
    spec = plain_spec()
    start = random_adapter(spec, 0)
    parcel, _, _ = pack(Int8(), moved(start, 1), start, tuple(spec.layout))
    assert needs_start(parcel, spec)
    with pytest.raises(CodecError, match="builds on the start"):
        unpack(parcel, spec, None)
    with pytest.raises(CodecError, match="needs the start"):
        pack(Int8(), start, None, tuple(spec.layout))
    with pytest.raises(CodecError, match="another specification"):
        unpack(parcel, spec, random_adapter(spec.with_ranks(2), 0))


def test_an_adapter_too_large_to_be_one_is_refused_before_anything_is_made_of_it() -> None:
    spec = plain_spec((1,), width=4)
    huge = replace(spec, others=(replace(spec.others[0], shape=(1 << 15, 1 << 14)),))
    assert huge.size > MAX_VALUES
    with pytest.raises(CodecError, match="at most"):
        unpack(Parcel("zeros-omitted", (), bytes(4)), huge, None)


@FEW
@given(
    st.sampled_from([*WRITTEN, "zeros-omitted", "int8(block=1)", "x", "", "top-k(density=)"]),
    st.text("core:0123456789,;al-", max_size=20),
    st.binary(max_size=400),
    st.booleans(),
)
def test_any_parcel_is_refused_in_our_words_or_makes_an_adapter(
    written: str, keys: str, data: bytes, with_start: bool
) -> None:
    spec = plain_spec((1, 2), width=6)
    start = random_adapter(spec, 0) if with_start else None
    try:
        came = unpack(Parcel(written, keys_from(keys, spec), data), spec, start)
    except CodecError:
        return
    assert came.spec == spec


@FEW
@given(st.sampled_from([*WRITTEN, *LOSSY]), st.data())
def test_a_parcel_damaged_on_its_way_is_refused_or_makes_an_adapter(
    written: str, data: Any
) -> None:
    spec = plain_spec((1, 2), width=6)
    start = random_adapter(spec, 0, 0.05)
    codec: Codec = read_codec(written)
    parcel, _, _ = pack(codec, moved(start, 1, 1e-3), start, tuple(spec.layout))
    raw = bytearray(parcel.data)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CodecError):
        assert unpack(replace(parcel, data=bytes(raw)), spec, start).spec == spec


@pytest.mark.parametrize(
    "text", ["core:x;all", "core:01;", "9", "1,0", "0,0", "0,", ",", "all,0", "-1", "core:;", "0;1"]
)
def test_malformed_lists_of_keys_are_refused(text: str) -> None:
    with pytest.raises(CodecError, match="keys:"):
        keys_from(text, plain_spec())
