"""The nouns of one training round, and their conversion to and from Flower's records.

An adapter travels as ONE packed array of little-endian float32 values beside its canonical
specification: every array is a request of its own in Flower's transport, so one costs a quarter of
what a hundred do. The array carries raw bytes under a serialisation type of ours, so no header
that a peer wrote is ever parsed. Everything is checked while it is converted: lengths, types and
names, and that the adapter's digest is the one announced. Whether the numbers are finite is for
the receiver's floor to judge.

Message types, and the function of the ClientApp that answers them:

======================  =======================  ============================================
message type            asks with                is answered with
======================  =======================  ============================================
``train``               :class:`TrainTask`       :class:`aggregation.update.Update`
``evaluate``            :class:`EvaluateTask`    :class:`EvaluateResult`
``query.identity``      nothing                  :class:`Identity`
======================  =======================  ============================================

Any of them may be answered by a :class:`ClientFault` instead, made with :func:`fault_reply`: a
word of a closed list, never the text of an exception, which could quote a client's data.

    >>> from aggregation.spec import AdapterSpec, ModuleSpec
    >>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))
    >>> task = TrainTask(run="r1", round=1, adapter=Adapter.zeros(spec), plan={"epochs": 1.0})
    >>> train_task_from(train_task_record(task)).plan
    {'epochs': 1.0}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.spec import AdapterSpec
from aggregation.update import Update
from protos.fields import RecordError, integer, mapping, name, number, text
from protos.tasks import (
    ClientFault,
    EvaluateResult,
    EvaluateTask,
    Identity,
    TrainTask,
    client_data,
    client_ledger,
    client_name,
)

__all__ = [
    "EVALUATE",
    "IDENTITY",
    "TRAIN",
    "ClientFault",
    "EvaluateResult",
    "EvaluateTask",
    "Identity",
    "RecordError",
    "TrainTask",
    "client_data",
    "client_ledger",
    "client_name",
    "evaluate_result_from",
    "evaluate_result_record",
    "evaluate_task_from",
    "evaluate_task_record",
    "fault_of",
    "fault_reply",
    "identity_from",
    "identity_record",
    "train_task_from",
    "train_task_record",
    "update_from",
    "update_record",
]

TRAIN = "train"
EVALUATE = "evaluate"
IDENTITY = "query.identity"

SERIALISATION = "airpeft.f32le"
ADAPTER = "adapter"
TASK = "task"
METRICS = "metrics"
SCHEMA = 1
MAX_SEED = (1 << 63) - 1
FIRST_FAULT_CODE = 100

_SPEC_FIELDS = ("spec", "digest")


def train_task_record(task: TrainTask) -> RecordDict:
    """A train task as Flower carries it."""
    fields = _header(task.run, task.round, task.data_folder, task.base)
    fields["seed"] = task.seed
    fields["plan"] = json.dumps(dict(task.plan), sort_keys=True)
    fields["privacy"] = (
        "" if task.privacy is None else json.dumps(dict(task.privacy), sort_keys=True)
    )
    return _with_adapter(task.adapter, fields)


def train_task_from(record: RecordDict) -> TrainTask:
    """The inverse of :func:`train_task_record`.

    Raises:
        RecordError: if anything is missing, of a wrong type, or does not fit together.
    """
    fields = _fields(record)
    privacy = text(fields, "privacy")
    return TrainTask(
        run=name(fields, "run"),
        round=integer(fields, "round", 1, 1_000_000),
        adapter=_adapter(record, fields),
        plan=mapping(fields, "plan"),
        privacy=mapping(fields, "privacy") if privacy else None,
        seed=integer(fields, "seed", 0, MAX_SEED),
        data_folder=text(fields, "data-folder"),
        base=text(fields, "base"),
    )


def evaluate_task_record(task: EvaluateTask) -> RecordDict:
    """An evaluate task as Flower carries it."""
    fields = _header(task.run, task.round, task.data_folder, task.base)
    fields["plan"] = json.dumps(dict(task.plan), sort_keys=True)
    return _with_adapter(task.adapter, fields)


def evaluate_task_from(record: RecordDict) -> EvaluateTask:
    """The inverse of :func:`evaluate_task_record`.

    Raises:
        RecordError: if anything is missing, of a wrong type, or does not fit together.
    """
    fields = _fields(record)
    return EvaluateTask(
        run=name(fields, "run"),
        round=integer(fields, "round", 0, 1_000_000),
        adapter=_adapter(record, fields),
        plan=mapping(fields, "plan"),
        data_folder=text(fields, "data-folder"),
        base=text(fields, "base"),
    )


def update_record(update: Update) -> RecordDict:
    """A client's update as Flower carries it."""
    fields = _header(None, update.round, None, None)
    fields["client"] = update.client
    fields["start"] = update.start
    fields["privacy-event"] = json.dumps(dict(update.privacy_event), sort_keys=True)
    record = _with_adapter(update.adapter, fields)
    numbers = {"weight": float(update.weight)}
    numbers.update({f"client.{key}": float(value) for key, value in update.metrics.items()})
    record[METRICS] = MetricRecord(numbers)
    return record


def update_from(record: RecordDict) -> Update:
    """The inverse of :func:`update_record`.

    Raises:
        RecordError: if anything is missing, of a wrong type, or does not fit together.
    """
    fields = _fields(record)
    event = mapping(fields, "privacy-event")
    if any(not isinstance(value, int | float | str) for value in event.values()):
        raise RecordError("field 'privacy-event' must hold numbers and words only")
    numbers = _numbers(record)
    return Update(
        client=name(fields, "client"),
        round=integer(fields, "round", 1, 1_000_000),
        start=text(fields, "start"),
        adapter=_adapter(record, fields),
        weight=number(numbers, "weight"),
        privacy_event=event,
        metrics={
            key.removeprefix("client."): number(numbers, key)
            for key in sorted(numbers)
            if key.startswith("client.")
        },
    )


def evaluate_result_record(result: EvaluateResult) -> RecordDict:
    """A client's measurement as Flower carries it."""
    fields = _header(None, result.round, None, None)
    fields["client"] = result.client
    numbers = {
        "examples": result.examples,
        "accuracy": float(result.accuracy),
        "loss": float(result.loss),
    }
    return RecordDict({TASK: ConfigRecord(fields), METRICS: MetricRecord(numbers)})


def evaluate_result_from(record: RecordDict) -> EvaluateResult:
    """The inverse of :func:`evaluate_result_record`.

    Raises:
        RecordError: if anything is missing or of a wrong type, or accuracy lies outside 0..1.
    """
    fields, numbers = _fields(record), _numbers(record)
    accuracy, loss = number(numbers, "accuracy"), number(numbers, "loss")
    if not 0.0 <= accuracy <= 1.0 or not math.isfinite(loss):
        raise RecordError(f"accuracy={accuracy} must lie in 0..1 and loss={loss} must be finite")
    return EvaluateResult(
        client=name(fields, "client"),
        round=integer(fields, "round", 0, 1_000_000),
        examples=integer(numbers, "examples", 0, 1 << 40),
        accuracy=accuracy,
        loss=loss,
    )


def identity_record(identity: Identity) -> RecordDict:
    """A client's name as Flower carries it."""
    return RecordDict({TASK: ConfigRecord({"schema": SCHEMA, "client": identity.client})})


def identity_from(record: RecordDict) -> Identity:
    """The inverse of :func:`identity_record`.

    Raises:
        RecordError: if there is no name, or not one of letters, digits, dots and dashes.
    """
    return Identity(name(_fields(record), "client"))


def fault_reply(fault: ClientFault, request: Message) -> Message:
    """The reply that says only which fault it was.

    Args:
        fault: the reason, from the closed list.
        request: the message that is answered.
    """
    code = FIRST_FAULT_CODE + list(ClientFault).index(fault)
    return Message(Error(code, fault.value), reply_to=request)


def fault_of(reply: Message) -> str:
    """Why a reply carries no content: a :class:`ClientFault`, or ``flower-<code>`` for its own.

    A reason that is not on the list is not repeated: it was written by somebody else's exception.
    """
    code = int(reply.error.code)
    faults = list(ClientFault)
    if FIRST_FAULT_CODE <= code < FIRST_FAULT_CODE + len(faults):
        return faults[code - FIRST_FAULT_CODE].value
    return f"flower-{code}"


def _header(
    run: str | None, number: int, data_folder: str | None, base: str | None
) -> dict[str, Any]:
    fields: dict[str, Any] = {"schema": SCHEMA, "round": number}
    for key, value in (("run", run), ("data-folder", data_folder), ("base", base)):
        if value is not None:
            fields[key] = value
    return fields


def _with_adapter(adapter: Adapter, fields: dict[str, Any]) -> RecordDict:
    vector = adapter.pack().astype("<f4", copy=False)
    array = Array("float32", (int(vector.size),), SERIALISATION, vector.tobytes())
    fields["spec"] = adapter.spec.to_json()
    fields["digest"] = adapter.digest
    return RecordDict({ADAPTER: ArrayRecord({ADAPTER: array}), TASK: ConfigRecord(fields)})


def _adapter(record: RecordDict, fields: Mapping[str, Any]) -> Adapter:
    arrays = record.array_records.get(ADAPTER)
    if arrays is None or list(arrays) != [ADAPTER]:
        raise RecordError(f"expected one array named {ADAPTER!r} in the record {ADAPTER!r}")
    array = arrays[ADAPTER]
    if array.stype != SERIALISATION or array.dtype != "float32":
        raise RecordError(
            f"the adapter is {array.dtype} as {array.stype!r}; "
            f"allowed: float32 as {SERIALISATION!r}"
        )
    spec_text, digest = (text(fields, key) for key in _SPEC_FIELDS)
    try:
        spec = AdapterSpec.from_json(spec_text)
        if len(array.data) != 4 * spec.size:
            raise RecordError(
                f"the adapter has {len(array.data)} bytes; its specification needs {4 * spec.size}"
            )
        adapter = Adapter.unpack(spec, np.frombuffer(array.data, "<f4"))
    except AggregationError as error:
        raise RecordError(f"the adapter does not fit its specification: {error}") from None
    if adapter.digest != digest:
        raise RecordError(
            f"the adapter's digest is {adapter.digest}, announced was {digest[:80]!r}"
        )
    return adapter


def _fields(record: RecordDict) -> Mapping[str, Any]:
    fields: Mapping[str, Any] | None = record.config_records.get(TASK)
    if fields is None:
        raise RecordError(f"the message has no record {TASK!r}")
    if fields.get("schema") != SCHEMA:
        raise RecordError(f"record schema {fields.get('schema')!r} is not {SCHEMA}")
    return fields


def _numbers(record: RecordDict) -> Mapping[str, Any]:
    numbers: Mapping[str, Any] | None = record.metric_records.get(METRICS)
    if numbers is None or len(numbers) > 1024:
        raise RecordError(f"the message has no record {METRICS!r} of at most 1024 numbers")
    return numbers
