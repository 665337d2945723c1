"""protos.flower: what is converted comes back, and whatever is not what it says is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.codecs import CODECS, read_codec
from aggregation.core_basis import settle
from aggregation.parcel import send
from aggregation.spec import AdapterSpec, ModuleSpec
from aggregation.update import Update
from protos import flower
from protos.flower import MissingStart, RecordError
from tests.simulations.toy import SPEC, START, honest

TASK = flower.TrainTask(
    run="r", round=2, adapter=START, plan={"epochs": 1.5}, privacy={"delta": 1e-5}, seed=9,
    data_folder="/data", base="minilm",
)  # fmt: skip


def test_everything_comes_back() -> None:
    task = flower.train_task_from(flower.train_task_record(TASK))
    assert task.adapter.digest == START.digest
    assert (task.run, task.round, task.seed, task.base) == ("r", 2, 9, "minilm")
    assert (task.plan, task.privacy, task.data_folder) == (
        {"epochs": 1.5},
        {"delta": 1e-5},
        "/data",
    )
    update = honest(TASK, "client-00004")
    back = flower.update_from(flower.update_record(update))
    assert back.adapter.digest == update.adapter.digest
    assert (back.client, back.round, back.start, back.weight) == (
        "client-00004",
        2,
        START.digest,
        5,
    )
    assert back.metrics == {"seconds": 0.5}
    asked = flower.EvaluateTask(run="r", round=0, adapter=START, data_folder="d", base="b")
    assert flower.evaluate_task_from(flower.evaluate_task_record(asked)).data_folder == "d"
    result = flower.EvaluateResult(client="c", round=1, examples=7, accuracy=0.5, loss=0.7)
    assert flower.evaluate_result_from(flower.evaluate_result_record(result)) == result
    assert flower.identity_from(flower.identity_record(flower.Identity("x"))).client == "x"


def test_one_array_carries_the_adapter() -> None:
    record = flower.train_task_record(TASK)
    assert [len(arrays) for arrays in record.array_records.values()] == [1]


def sent(codec: str, assignment: Assignment, start: Adapter = START) -> Update:
    """A client's update as it leaves, in a codec."""
    task = replace(TASK, adapter=start)
    return send(honest(task, "client-00003"), start, assignment, read_codec(codec))[0]


WHOLE, ONLY_B = Assignment(), Assignment(trains="B", sends="B")
CODEC_NAMES = [kind.kind if kind.kind != "ring" else "ring(clip=9)" for kind in CODECS]


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("assignment", [WHOLE, ONLY_B, Assignment(sends="A", keeps="B")])
def test_an_update_arrives_bit_for_bit_as_its_client_says(
    codec: str, assignment: Assignment
) -> None:
    update = sent(codec, assignment)
    record = flower.update_record(update)
    starts = {START.digest: START}
    came = flower.update_from(record, starts.get, assignment=assignment, codec=codec)
    assert came.adapter.digest == update.adapter.digest
    assert came.parcel is not None
    assert update.parcel is not None
    assert came.parcel.data == update.parcel.data
    assert flower.record_bytes(record) == len(update.parcel.data)
    if codec != "float32" or assignment != WHOLE:
        with pytest.raises(MissingStart, match="builds on the adapter"):
            flower.update_from(record)
    for other, name in ((replace(assignment, seed=1, trains="core", sends="core", keeps=""), codec),
                        (assignment, "int8(block=32)")):  # fmt: skip
        with pytest.raises(RecordError, match="asked for"):
            flower.update_from(record, starts.get, assignment=other, codec=name)


def test_an_update_says_nothing_of_what_stays_on_the_device() -> None:
    """Two clients whose private factors differ send the same record."""
    task = replace(TASK, adapter=START)
    one, other = honest(task, "client-00003"), honest(task, "client-00003")
    tensors = dict(one.adapter.tensors)
    for key in tensors:
        if "lora_A" not in key:
            tensors[key] = tensors[key] + 1
    other = replace(other, adapter=Adapter(SPEC, tensors))
    assignment = Assignment(sends="A", keeps="B")
    said = []
    for update in (one, other):
        update, _ = send(update, START, assignment, read_codec("float32"))
        record = flower.update_record(update)
        said.append((dict(record["task"]), dict(record["metrics"]), record["adapter"]))
    assert said[0] == said[1]


def message_bytes(record: RecordDict) -> int:
    """Length of the whole content as Flower serialises it."""
    return int(recorddict_to_proto(record).ByteSize())


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_reported_bytes_are_the_message_but_for_its_frame(codec: str) -> None:
    wide = AdapterSpec(SPEC.base_digest, (ModuleSpec("query", 256, 256, rank=32, alpha=4.0),))
    start = Adapter.zeros(wide)
    trained = {k: np.full(v.shape, 1e-3) for k, v in start}
    update = Update("client-00001", 2, start.digest, Adapter(wide, trained), 1.0)
    update, _ = send(update, start, WHOLE, read_codec(codec))
    record = flower.update_record(update)
    frame = len(record["task"]["spec"]) + 1000  # the specification, digests and names
    assert 0 < message_bytes(record) - flower.record_bytes(record) < frame
    task = flower.train_task_record(replace(TASK, adapter=update.adapter), held=start)
    assert 0 < message_bytes(task) - flower.record_bytes(task) < frame


def test_a_task_leaves_out_what_the_client_still_has() -> None:
    key = SPEC.modules[0].keys[1]
    held = Adapter(SPEC, {**START.tensors, key: START.tensors[key] + 1})
    task = replace(TASK, assignment=ONLY_B.to_mapping(), codec="int4")
    record = flower.train_task_record(task, held=held)
    assert flower.record_bytes(record) == START.tensors[key].nbytes
    came = flower.train_task_from(record, {held.digest: held}.get)
    assert came.adapter.digest == START.digest
    assert (came.held, came.codec, came.assignment) == (held.digest, "int4", task.assignment)
    kept = SPEC.modules[0].keys[0]
    other = Adapter(SPEC, {**START.tensors, kept: START.tensors[kept] + 2})
    for find in ({}.get, {held.digest: Adapter.zeros(replace(SPEC, use_rslora=True))}.get):
        with pytest.raises(MissingStart, match="which is not here"):
            flower.train_task_from(record, find)
    with pytest.raises(RecordError, match="digest"):
        flower.train_task_from(record, {held.digest: other}.get)
    whole = flower.train_task_record(task)
    assert flower.record_bytes(whole) == START.nbytes
    assert flower.train_task_from(whole).held == ""


def test_cores_travel_both_ways_in_r_squared_numbers() -> None:
    assignment = Assignment(trains="core", sends="core", seed=4)
    start = settle(START, 4)
    head = start.tensors["base_model.model.classifier.weight"].nbytes
    record = flower.train_task_record(
        replace(TASK, adapter=start, assignment=assignment.to_mapping())
    )
    assert flower.record_bytes(record) == 2 * 4 * 2 * 2 + head
    assert flower.train_task_from(record).adapter.digest == start.digest
    reply = flower.update_record(sent("float32", assignment, start))
    assert flower.record_bytes(reply) == 2 * 4 * 2 * 2 + head
    came = flower.update_from(reply, {start.digest: start}.get, assignment=assignment)
    assert came.adapter.factors("query")[1].tobytes() == start.factors("query")[1].tobytes()


def test_adapters_beside_travel_with_the_task() -> None:
    small = AdapterSpec(SPEC.base_digest, (ModuleSpec("query", 12, 10, rank=3, alpha=3.0),))
    beside = (Adapter.unpack(small, np.arange(small.size, dtype=np.float32)), START)
    for make, read, task in (
        (flower.train_task_record, flower.train_task_from, replace(TASK, beside=beside)),
        (flower.evaluate_task_record, flower.evaluate_task_from,
         flower.EvaluateTask(run="r", round=1, adapter=START, beside=beside, seed=3,
                             assignment={"holdout": 0.2})),
    ):  # fmt: skip
        record = make(task)  # type: ignore[operator]
        came = read(record)  # type: ignore[operator]
        assert [a.digest for a in came.beside] == [a.digest for a in beside]
        assert (came.seed, came.assignment) == (task.seed, task.assignment)
        assert flower.record_bytes(record) == START.nbytes + sum(a.nbytes for a in beside)
        record["task"]["beside-digest-0"] = START.digest
        with pytest.raises(RecordError, match="digest"):
            read(record)  # type: ignore[operator]


def test_sketches_travel_in_both_passes() -> None:
    rng = np.random.default_rng(0)
    wide = {m.name: rng.normal(size=(10, 5)).astype(np.float32) for m in SPEC.modules}
    assignment = Assignment(sketch=5)
    update = replace(sent("float32", assignment), sketches=wide)
    record = flower.update_record(update)
    came = flower.update_from(record, {START.digest: START}.get, assignment=assignment)
    assert all((came.sketches[k] == wide[k]).all() for k in wide)
    head = START.tensors["base_model.model.classifier.weight"].nbytes
    assert flower.record_bytes(record) == head + 2 * 4 * 10 * 5
    record["task"]["sketches"] = '{"query": [5, 10], "value": [10, 5]}'
    with pytest.raises(RecordError, match="'query' has 5 rows"):
        flower.update_from(record, {START.digest: START}.get)
    task = flower.SketchTask(run="r", round=2, basis=wide, data_folder="/d")
    asked = flower.sketch_task_from(flower.sketch_task_record(task))
    assert (asked.run, asked.round, asked.data_folder) == ("r", 2, "/d")
    reply = flower.SketchReply(client="c", round=2, sketches=dict(asked.basis))
    back = flower.sketch_reply_from(flower.sketch_reply_record(reply))
    assert (back.client, back.round) == ("c", 2)
    assert all((back.sketches[k] == wide[k]).all() for k in wide)


@pytest.mark.parametrize(
    "shapes",
    ['{"q": [10]}', '{"q": [10, 0]}', '{"q": [-10, -5]}', '{"q": [10, 6]}', '{"q": [true, 50]}',
     '{"q": "10x5"}', '{"q": [2097152, 50]}', "[]"],
)  # fmt: skip
def test_sketches_of_impossible_shapes_are_refused(shapes: str) -> None:
    task = flower.SketchTask(run="r", round=2, basis={"q": np.zeros((10, 5), np.float32)})
    record = flower.sketch_task_record(task)
    record["task"]["sketches"] = shapes
    with pytest.raises(RecordError, match="sketch"):
        flower.sketch_task_from(record)


def test_a_peer_of_another_version_is_told_so() -> None:
    record = flower.train_task_record(TASK)
    record["task"]["schema"] = 1
    with pytest.raises(RecordError, match=r"schema 1 is not 2: .* older version .* same one"):
        flower.train_task_from(record)
    assert flower.identity_from(
        flower.identity_record(flower.Identity("x", max_rank=8))
    ) == flower.Identity("x", 8)


Spoil = Callable[[RecordDict], Any]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("task"),
        lambda r: r.pop("adapter"),
        lambda r: r["task"].update(schema=3),
        lambda r: r["task"].update(schema=True),
        lambda r: r["task"].update(codec="int9"),
        lambda r: r["task"].update(codec="x" * 300),
        lambda r: r["task"].update(assignment='{"trains": "C"}'),
        lambda r: r["task"].update(assignment='{"steps": 3}'),
        lambda r: r["task"].update({"parcel-codec": "int8"}),
        lambda r: r["task"].update({"parcel-keys": "0,1"}),
        lambda r: r["task"].update({"parcel-keys": "core:1;all"}),
        lambda r: r["task"].update(held="sha256:" + "0" * 64),
        lambda r: r["task"].update(beside=1),
        lambda r: r["task"].update(beside=1000),
        lambda r: r["task"].update(round=0),
        lambda r: r["task"].update(round="1"),
        lambda r: r["task"].update(seed=-1),
        lambda r: r["task"].update(run="../x"),
        lambda r: r["task"].update(plan="[]"),
        lambda r: r["task"].update(plan="{"),
        lambda r: r["task"].update(plan="[" * 100_000),
        lambda r: r["task"].update(spec="{}"),
        lambda r: r["task"].update(digest="sha256:" + "0" * 64),
        lambda r: r["adapter"].update(more=Array(np.zeros(3))),
        lambda r: r["adapter"].update(adapter=Array(START.pack())),
        lambda r: r["adapter"].update(
            adapter=Array("float32", (3,), flower.SERIALISATION, b"\0" * 12)
        ),
    ],
)
def test_a_record_that_is_not_what_it_says_is_refused(spoil: Spoil) -> None:
    record = flower.train_task_record(TASK)
    spoil(record)
    with pytest.raises(RecordError):
        flower.train_task_from(record)


def test_an_update_with_other_numbers_is_refused_but_infinities_pass_to_the_next_floor() -> None:
    record = flower.update_record(honest(TASK, "client-00001"))
    record["metrics"] = MetricRecord({"weight": math.nan})
    assert math.isnan(flower.update_from(record).weight)
    record["metrics"] = MetricRecord({"height": 1.0})
    with pytest.raises(RecordError, match="weight"):
        flower.update_from(record)
    record = flower.evaluate_result_record(
        flower.EvaluateResult(client="c", round=1, examples=7, accuracy=1.5, loss=0.7)
    )
    with pytest.raises(RecordError, match=r"accuracy=1\.5"):
        flower.evaluate_result_from(record)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CODEC_NAMES), st.data())
def test_a_damaged_update_is_refused_as_a_record_and_nothing_else(codec: str, data: Any) -> None:
    update = sent(codec, ONLY_B)
    record = flower.update_record(update)
    raw = bytearray(record["adapter"]["adapter"].data)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    record["adapter"]["adapter"] = Array("uint8", (len(raw),), flower.SERIALISATION, bytes(raw))
    with pytest.raises(RecordError):
        flower.update_from(record, {START.digest: START}.get)


values = st.none() | st.integers(-5, 5) | st.floats() | st.text(max_size=5) | st.booleans()


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "schema",
                "run",
                "round",
                "spec",
                "plan",
                "seed",
                "codec",
                "assignment",
                "held",
                "beside",
                "parcel-codec",
                "parcel-keys",
                "digest",
            ]
        ),
        values,
    )
)
def test_any_fields_are_refused_in_our_words_or_make_a_task(fields: dict[str, Any]) -> None:
    record = flower.train_task_record(TASK)
    clean = {k: v for k, v in fields.items() if v is not None}
    record["task"] = ConfigRecord({**record["task"], **clean})
    record["adapter"] = ArrayRecord(dict(record["adapter"]))
    try:
        task = flower.train_task_from(record)
    except RecordError:
        return
    assert task.adapter.digest == START.digest
