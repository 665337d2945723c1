"""The messages of a secure sum on the wire: what is sent arrives, and nothing else is believed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import flower
from protos.flower import RecordError
from protos.flower_arrays import raw

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,12}", fullmatch=True)
BLOBS = st.dictionaries(NAMES, st.binary(max_size=200), max_size=6)
FEW = settings(max_examples=30, deadline=None, database=None)


def task(**changes: object) -> flower.SecureTask:
    fields = {"run": "r", "round": 2, "part": 1, "step": "masked", "blobs": {"ann": b"xyz"}}
    return flower.SecureTask(**{**fields, **changes})  # type: ignore[arg-type]


@FEW
@given(names=st.lists(NAMES, max_size=6), blobs=BLOBS, step=st.sampled_from(flower.STEPS))
def test_a_step_arrives_as_it_was_sent(
    names: list[str], blobs: dict[str, bytes], step: str
) -> None:
    asked = task(names=tuple(names), blobs=blobs, step=step, dropouts=0.25, corrupt=0.125, seed=9)
    record = flower.secure_task_record(asked)
    assert flower.secure_task_from(record) == asked
    assert flower.record_bytes(record) == sum(len(blob) for blob in blobs.values())
    reply = flower.SecureReply(client="ann", round=2, part=0, step=step, blobs=blobs)
    assert flower.secure_reply_from(flower.secure_reply_record(reply)) == reply


def test_ready_arrives_and_carries_no_array() -> None:
    ready = flower.Ready(
        client="ann", round=3, start="sha256:1", privacy_event={"steps": 4}, metrics={"steps": 4.0}
    )
    record = flower.ready_record(ready)
    assert flower.ready_from(record) == ready
    assert flower.record_bytes(record) == 0
    record.array_records["adapter"]["adapter"] = raw(b"an update in the clear")
    with pytest.raises(RecordError, match="arrays"):
        flower.ready_from(record)


def _without(key: str) -> Callable[[RecordDict], None]:
    return lambda record: record.config_records["task"].__delitem__(key)


def _with(key: str, value: object) -> Callable[[RecordDict], None]:
    def change(record: RecordDict) -> None:
        record["task"] = ConfigRecord({**record.config_records["task"], key: value})

    return change


@pytest.mark.parametrize(
    "spoil",
    [
        _without("step"),
        _without("lengths"),
        _with("step", "unmask"),
        _with("part", 8),
        _with("round", 0),
        _with("lengths", '{"ann": 4}'),
        _with("lengths", '{"ann": -3, "bob": 6}'),
        _with("lengths", '{"ann": true}'),
        _with("lengths", "[3]"),
        _with("names", '["../../etc"]'),
        _with("names", '{"a": 1}'),
        _with("names", "["),
        _with("schema", 1),
        lambda record: record.array_records["adapter"].__delitem__("secrets"),
        lambda record: record.array_records["adapter"].__setitem__("more", raw(b"")),
    ],
)
def test_what_does_not_fit_together_is_refused(spoil: Callable[[RecordDict], None]) -> None:
    record = flower.secure_task_record(task())
    spoil(record)
    with pytest.raises(RecordError):
        flower.secure_task_from(record)
