"""What a client answers, as Flower's records and back; see :mod:`protos.flower`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.codecs import Float32
from aggregation.errors import AggregationError
from aggregation.parcel import Parcel, check_expected, needs_start, pack, unpack
from aggregation.spec import AdapterSpec
from aggregation.update import Update
from protos import flower_arrays as arrays
from protos.fields import MissingStart, RecordError, integer, mapping, name, number, text
from protos.flower_arrays import ADAPTER, SKETCHES, Find
from protos.flower_tasks import MAX_ROUND, SCHEMA, TASK, dumped, fields_of, header, record_of
from protos.tasks import ClientFault, EvaluateResult, Identity, SketchReply

METRICS = "metrics"
MAX_RANK = 1 << 20
FIRST_FAULT_CODE = 100


def update_record(update: Update) -> RecordDict:
    """A client's update as Flower carries it: its parcel, or all of its adapter if it has none."""
    fields = header(None, update.round, None, None)
    fields["client"] = update.client
    fields["start"] = update.start
    fields["privacy-event"] = dumped(update.privacy_event)
    spec, parcel = update.adapter.spec, update.parcel
    if parcel is None:
        parcel = pack(Float32(), update.adapter, None, tuple(spec.layout))[0]
    fields.update(arrays.parcel_fields(parcel, spec, update.adapter.digest))
    data = {ADAPTER: arrays.raw(parcel.data)}
    if update.sketches:
        fields.update(arrays.matrix_fields(update.sketches))
        data[SKETCHES] = arrays.matrix_array(update.sketches)
    record = record_of(fields, data)
    numbers = {"weight": float(update.weight)}
    numbers.update({f"client.{key}": float(value) for key, value in update.metrics.items()})
    record[METRICS] = MetricRecord(numbers)
    return record


def update_from(
    record: RecordDict,
    start: Find = arrays.nothing,
    *,
    assignment: Assignment | None = None,
    codec: str = "",
) -> Update:
    """The inverse of :func:`update_record`.

    Args:
        record: what came.
        start: an adapter that was handed out, by its digest; None if it was not.
        assignment: what the client was asked to send; None for whatever comes.
        codec: in which codec; empty for any.

    Returns:
        The update with a whole adapter: what did not travel is as in its start.

    Raises:
        MissingStart: if ``start`` does not know what the update is relative to.
        RecordError: if anything is missing, of a wrong type, or does not fit together.
    """
    fields = fields_of(record)
    event = mapping(fields, "privacy-event")
    if any(not isinstance(value, int | float | str) for value in event.values()):
        raise RecordError("field 'privacy-event' must hold numbers and words only")
    numbers = _numbers(record)
    found = arrays.arrays_of(record, (ADAPTER, SKETCHES))
    parcel, spec = arrays.parcel_from(found, fields)
    sketches = arrays.matrices_from(found, fields)
    digest = text(fields, "start", 100)
    try:
        if assignment is not None:
            check_expected(parcel, spec, assignment, codec)
        adapter = _adapter(parcel, spec, digest, start)
    except AggregationError as error:
        raise RecordError(f"the update does not fit its specification: {error}") from None
    arrays.check_digest(adapter.digest, text(fields, "digest"))
    widths = {module.name: module.d_out for module in spec.modules}
    for module, matrix in sketches.items():
        if widths.get(module) != len(matrix):
            raise RecordError(f"sketch {module[:80]!r} has {len(matrix)} rows, not the module's")
    return Update(
        client=name(fields, "client"),
        round=integer(fields, "round", 1, MAX_ROUND),
        start=digest,
        adapter=adapter,
        weight=number(numbers, "weight"),
        privacy_event=event,
        metrics={
            key.removeprefix("client."): number(numbers, key)
            for key in sorted(numbers)
            if key.startswith("client.")
        },
        parcel=parcel,
        sketches=sketches,
    )


def event_from(record: RecordDict) -> Mapping[str, Any]:
    """What a reply says that its client has spent, whatever else is wrong with it; may be nothing.

    Args:
        record: an update, or that one is ready to be summed.
    """
    try:
        return mapping(fields_of(record), "privacy-event")
    except RecordError:
        return {}


def sketch_reply_record(reply: SketchReply) -> RecordDict:
    """A client's projection as Flower carries it."""
    fields = header(None, reply.round, None, None)
    fields["client"] = reply.client
    fields.update(arrays.matrix_fields(reply.sketches))
    return record_of(fields, {SKETCHES: arrays.matrix_array(reply.sketches)})


def sketch_reply_from(record: RecordDict) -> SketchReply:
    """The inverse of :func:`sketch_reply_record`.

    Raises:
        RecordError: if anything is missing, of a wrong type, or does not fit together.
    """
    fields = fields_of(record)
    return SketchReply(
        client=name(fields, "client"),
        round=integer(fields, "round", 1, MAX_ROUND),
        sketches=arrays.matrices_from(arrays.arrays_of(record, (SKETCHES,)), fields),
    )


def evaluate_result_record(result: EvaluateResult) -> RecordDict:
    """A client's measurement as Flower carries it."""
    fields = header(None, result.round, None, None)
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
    fields, numbers = fields_of(record), _numbers(record)
    accuracy, loss = number(numbers, "accuracy"), number(numbers, "loss")
    if not 0.0 <= accuracy <= 1.0 or not math.isfinite(loss):
        raise RecordError(f"accuracy={accuracy} must lie in 0..1 and loss={loss} must be finite")
    return EvaluateResult(
        client=name(fields, "client"),
        round=integer(fields, "round", 0, MAX_ROUND),
        examples=integer(numbers, "examples", 0, 1 << 40),
        accuracy=accuracy,
        loss=loss,
    )


def identity_record(identity: Identity) -> RecordDict:
    """A client's name as Flower carries it."""
    fields = {"schema": SCHEMA, "client": identity.client, "max-rank": identity.max_rank}
    return RecordDict({TASK: ConfigRecord(fields)})


def identity_from(record: RecordDict) -> Identity:
    """The inverse of :func:`identity_record`.

    Raises:
        RecordError: if there is no name, or not one of letters, digits, dots and dashes.
    """
    fields = fields_of(record)
    return Identity(name(fields, "client"), integer(fields, "max-rank", 0, MAX_RANK))


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


def _adapter(parcel: Parcel, spec: AdapterSpec, digest: str, start: Find) -> Adapter:
    if not needs_start(parcel, spec):
        return unpack(parcel, spec, None)
    found = start(digest)
    if found is None:
        raise MissingStart(f"the update builds on the adapter {digest[:80]!r}, which is not known")
    return unpack(parcel, spec, found)


def _numbers(record: RecordDict) -> Mapping[str, Any]:
    numbers: Mapping[str, Any] | None = record.metric_records.get(METRICS)
    if numbers is None or len(numbers) > 1024:
        raise RecordError(f"the message has no record {METRICS!r} of at most 1024 numbers")
    return numbers
