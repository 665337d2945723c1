"""protos.flower: what is converted comes back, and whatever is not what it says is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import flower
from protos.flower import RecordError
from tests.simulations.toy import START, honest

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


Spoil = Callable[[RecordDict], Any]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("task"),
        lambda r: r.pop("adapter"),
        lambda r: r["task"].update(schema=2),
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


values = st.none() | st.integers(-5, 5) | st.floats() | st.text(max_size=5) | st.booleans()


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["schema", "run", "round", "spec", "plan", "seed"]), values))
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
