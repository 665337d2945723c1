"""The messages of a secure sum as Flower's records and back; see :mod:`protos.flower`.

Whatever the step, bytes by name travel as one array, whose names and lengths are a field. What the
bytes are is not looked into here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import MetricRecord, RecordDict

from protos import flower_arrays as arrays
from protos.fields import RecordError, integer, mapping, name, number, text
from protos.flower_tasks import MAX_ROUND, MAX_SEED, dumped, fields_of, header, record_of
from protos.secure import STEPS, Ready, SecureReply, SecureTask

SECRETS = "secrets"
METRICS = "metrics"
MAX_NAMES = 20_001
MAX_NUMBERS = 1024
MAX_LENGTH = 1 << 30


def secure_task_record(task: SecureTask) -> RecordDict:
    """One step of a secure sum as Flower carries it."""
    fields = header(task.run, task.round, task.data_folder, task.base)
    fields |= {"part": task.part, "step": task.step, "seed": task.seed}
    fields |= {"dropouts": float(task.dropouts), "corrupt": float(task.corrupt)}
    fields["names"] = json.dumps(list(task.names))
    return _with_blobs(fields, task.blobs)


def secure_task_from(record: RecordDict) -> SecureTask:
    """The inverse of :func:`secure_task_record`.

    Raises:
        RecordError: if anything is missing, of a wrong type, or does not fit together.
    """
    fields = fields_of(record)
    return SecureTask(
        run=name(fields, "run"),
        names=_names(fields, "names"),
        dropouts=number(fields, "dropouts"),
        corrupt=number(fields, "corrupt"),
        seed=integer(fields, "seed", 0, MAX_SEED),
        data_folder=text(fields, "data-folder"),
        base=text(fields, "base"),
        **_step(record, fields),
    )


def secure_reply_record(reply: SecureReply) -> RecordDict:
    """A member's answer as Flower carries it."""
    fields = header(None, reply.round, None, None)
    fields |= {"client": reply.client, "part": reply.part, "step": reply.step}
    return _with_blobs(fields, reply.blobs)


def secure_reply_from(record: RecordDict) -> SecureReply:
    """The inverse of :func:`secure_reply_record`.

    Raises:
        RecordError: if anything is missing, of a wrong type, or does not fit together.
    """
    fields = fields_of(record)
    return SecureReply(client=name(fields, "client"), **_step(record, fields))


def ready_record(ready: Ready) -> RecordDict:
    """A client that is ready, as Flower carries it: no array at all."""
    fields = header(None, ready.round, None, None)
    fields |= {"client": ready.client, "start": ready.start}
    fields["privacy-event"] = dumped(ready.privacy_event)
    record = record_of(fields, {})
    record[METRICS] = MetricRecord({key: float(value) for key, value in ready.metrics.items()})
    return record


def ready_from(record: RecordDict) -> Ready:
    """The inverse of :func:`ready_record`.

    Raises:
        RecordError: if anything is missing or of a wrong type, or there is an array: nothing but
            masked vectors may be sent where a secure sum was asked for.
    """
    fields, numbers = fields_of(record), record.metric_records.get(METRICS)
    arrays.arrays_of(record, ())
    if numbers is None or len(numbers) > MAX_NUMBERS:
        raise RecordError(f"the message has no record {METRICS!r} of at most {MAX_NUMBERS} numbers")
    event = mapping(fields, "privacy-event")
    if any(not isinstance(value, int | float | str) for value in event.values()):
        raise RecordError("field 'privacy-event' must hold numbers and words only")
    return Ready(
        client=name(fields, "client"),
        round=integer(fields, "round", 1, MAX_ROUND),
        start=text(fields, "start", 100),
        privacy_event=event,
        metrics={key: number(numbers, key) for key in sorted(numbers)},
    )


def _step(record: RecordDict, fields: Mapping[str, Any]) -> dict[str, Any]:
    step = text(fields, "step", 10)
    if step not in STEPS:
        raise RecordError(f"field 'step': {step!r} is not one of {', '.join(STEPS)}")
    return {
        "round": integer(fields, "round", 1, MAX_ROUND),
        "part": integer(fields, "part", 0, 7),
        "step": step,
        "blobs": _blobs(record, fields),
    }


def _with_blobs(fields: dict[str, Any], blobs: Mapping[str, bytes]) -> RecordDict:
    fields["lengths"] = json.dumps({key: len(blobs[key]) for key in sorted(blobs)})
    return record_of(fields, {SECRETS: arrays.raw(b"".join(blobs[key] for key in sorted(blobs)))})


def _blobs(record: RecordDict, fields: Mapping[str, Any]) -> dict[str, bytes]:
    lengths = mapping(fields, "lengths")
    data = arrays.data_of(arrays.arrays_of(record, (SECRETS,)), SECRETS)
    good = all(type(n) is int and 0 <= n <= MAX_LENGTH for n in lengths.values())
    if len(lengths) > MAX_NAMES or not good or len(data) != sum(lengths.values()):
        raise RecordError("field 'lengths' does not fit the bytes that came")
    found, first = {}, 0
    for key in sorted(lengths):
        found[key] = data[first : first + lengths[key]]
        first += lengths[key]
    return found


def _names(fields: Mapping[str, Any], key: str) -> tuple[str, ...]:
    try:
        found = json.loads(text(fields, key, MAX_NAMES * 140))
    except ValueError:
        raise RecordError(f"field {key!r} is not JSON") from None
    if not isinstance(found, list) or len(found) > MAX_NAMES:
        raise RecordError(f"field {key!r} is not a list of at most {MAX_NAMES} names")
    return tuple(name({key: one}, key) for one in found)
