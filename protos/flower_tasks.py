"""What a server asks, as Flower's records and back; see :mod:`protos.flower`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.codecs import read_codec
from aggregation.errors import AggregationError
from aggregation.parcel import pack_down
from protos import flower_arrays as arrays
from protos.fields import RecordError, integer, mapping, name, text
from protos.flower_arrays import ADAPTER, BESIDE, SKETCHES, Find
from protos.tasks import EvaluateTask, SketchTask, TrainTask

TASK = "task"
SCHEMA = 2
MAX_ROUND = 1_000_000
MAX_SEED = (1 << 63) - 1


def train_task_record(task: TrainTask, held: Adapter | None = None) -> RecordDict:
    """A train task as Flower carries it.

    Args:
        task: what to do.
        held: an adapter that the server believes the client still has: tensors that equal its own
            do not travel. If the client has it no longer, it answers
            ``ClientFault.MISSING_TENSORS``; ask again without.
    """
    fields = header(task.run, task.round, task.data_folder, task.base)
    fields["seed"] = task.seed
    fields["plan"] = dumped(task.plan)
    fields["privacy"] = "" if task.privacy is None else dumped(task.privacy)
    fields["assignment"] = dumped(task.assignment)
    fields["codec"] = task.codec
    if task.secure:
        fields["secure"] = dumped(task.secure)
    return _with_adapters(fields, task, held)


def train_task_from(record: RecordDict, find: Find = arrays.nothing) -> TrainTask:
    """The inverse of :func:`train_task_record`.

    Args:
        record: what came.
        find: an adapter that the client still has, by its digest; None if it has not.

    Raises:
        MissingStart: if the task builds on an adapter that ``find`` does not find.
        RecordError: if anything is missing, of a wrong type, or does not fit together.
    """
    fields = fields_of(record)
    privacy, codec = text(fields, "privacy"), text(fields, "codec", 200)
    try:
        read_codec(codec)
    except AggregationError as error:
        raise RecordError(f"field 'codec': {error}") from None
    adapter, beside = _adapters(record, fields, find)
    return TrainTask(
        run=name(fields, "run"),
        round=integer(fields, "round", 1, MAX_ROUND),
        adapter=adapter,
        plan=mapping(fields, "plan"),
        privacy=mapping(fields, "privacy") if privacy else None,
        seed=integer(fields, "seed", 0, MAX_SEED),
        data_folder=text(fields, "data-folder"),
        base=text(fields, "base"),
        assignment=_assignment(fields),
        codec=codec,
        beside=beside,
        held=text(fields, "held", 100),
        secure=mapping(fields, "secure") if "secure" in fields else {},
    )


def evaluate_task_record(task: EvaluateTask, held: Adapter | None = None) -> RecordDict:
    """An evaluate task as Flower carries it; ``held`` as in :func:`train_task_record`."""
    fields = header(task.run, task.round, task.data_folder, task.base)
    fields["seed"] = task.seed
    fields["plan"] = dumped(task.plan)
    fields["assignment"] = dumped(task.assignment)
    return _with_adapters(fields, task, held)


def evaluate_task_from(record: RecordDict, find: Find = arrays.nothing) -> EvaluateTask:
    """The inverse of :func:`evaluate_task_record`.

    Raises:
        MissingStart: if the task builds on an adapter that ``find`` does not find.
        RecordError: if anything is missing, of a wrong type, or does not fit together.
    """
    fields = fields_of(record)
    adapter, beside = _adapters(record, fields, find)
    return EvaluateTask(
        run=name(fields, "run"),
        round=integer(fields, "round", 0, MAX_ROUND),
        adapter=adapter,
        plan=mapping(fields, "plan"),
        data_folder=text(fields, "data-folder"),
        base=text(fields, "base"),
        seed=integer(fields, "seed", 0, MAX_SEED),
        assignment=_assignment(fields),
        beside=beside,
        held=text(fields, "held", 100),
    )


def sketch_task_record(task: SketchTask) -> RecordDict:
    """A sketch task as Flower carries it."""
    fields = header(task.run, task.round, task.data_folder, task.base if task.secure else None)
    if task.secure:
        fields["secure"] = True
    fields.update(arrays.matrix_fields(task.basis))
    return record_of(fields, {SKETCHES: arrays.matrix_array(task.basis)})


def sketch_task_from(record: RecordDict) -> SketchTask:
    """The inverse of :func:`sketch_task_record`.

    Raises:
        RecordError: if anything is missing, of a wrong type, or does not fit together.
    """
    fields = fields_of(record)
    basis = arrays.matrices_from(arrays.arrays_of(record, (SKETCHES,)), fields)
    if not basis:
        raise RecordError("a sketch task has no basis to project on")
    return SketchTask(
        run=name(fields, "run"),
        round=integer(fields, "round", 1, MAX_ROUND),
        basis=basis,
        data_folder=text(fields, "data-folder"),
        base=text(fields, "base") if "base" in fields else "",
        secure=fields.get("secure", False) is True,
    )


def header(
    run: str | None, number: int, data_folder: str | None, base: str | None
) -> dict[str, Any]:
    """The fields that every record has, those that are not None."""
    fields: dict[str, Any] = {"schema": SCHEMA, "round": number}
    for key, value in (("run", run), ("data-folder", data_folder), ("base", base)):
        if value is not None:
            fields[key] = value
    return fields


def record_of(fields: Mapping[str, Any], data: Mapping[str, Array]) -> RecordDict:
    """A record of fields and arrays."""
    return RecordDict({ADAPTER: ArrayRecord(dict(data)), TASK: ConfigRecord(dict(fields))})


def fields_of(record: RecordDict) -> Mapping[str, Any]:
    """The fields of a record of this version.

    Raises:
        RecordError: if there are none, or another version of AirPEFT wrote them.
    """
    fields: Mapping[str, Any] | None = record.config_records.get(TASK)
    if fields is None:
        raise RecordError(f"the message has no record {TASK!r}")
    found = fields.get("schema")
    if type(found) is not int or found != SCHEMA:
        older = type(found) is int and found < SCHEMA
        raise RecordError(
            f"record schema {str(found)[:20]} is not {SCHEMA}: the sender runs "
            f"{'an older' if older else 'another'} version of airpeft; run the same one on the "
            "server and on its clients"
        )
    return fields


def dumped(values: Mapping[str, Any]) -> str:
    """A mapping as canonical JSON."""
    return json.dumps(dict(values), sort_keys=True)


def _with_adapters(
    fields: dict[str, Any], task: TrainTask | EvaluateTask, held: Adapter | None
) -> RecordDict:
    assignment = Assignment.from_mapping(task.assignment)
    parcel, built_on = pack_down(task.adapter, held, assignment)
    fields.update(arrays.parcel_fields(parcel, task.adapter.spec, task.adapter.digest))
    fields["held"] = built_on
    fields.update(arrays.beside_fields(task.beside))
    data = {ADAPTER: arrays.raw(parcel.data)}
    if task.beside:
        data[BESIDE] = arrays.beside_array(task.beside)
    return record_of(fields, data)


def _adapters(
    record: RecordDict, fields: Mapping[str, Any], find: Find
) -> tuple[Adapter, tuple[Adapter, ...]]:
    found = arrays.arrays_of(record, (ADAPTER, BESIDE))
    return arrays.adapter_from(found, fields, find), arrays.beside_from(found, fields)


def _assignment(fields: Mapping[str, Any]) -> dict[str, Any]:
    values = mapping(fields, "assignment")
    try:
        return Assignment.from_mapping(values).to_mapping()
    except AggregationError as error:
        raise RecordError(f"field 'assignment': {error}") from None
