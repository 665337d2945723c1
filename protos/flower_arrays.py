"""Adapters and other arrays of numbers in Flower's records, and back.

All that a message carries in numbers is raw little-endian bytes under a serialisation type of ours,
so no header that a peer wrote is ever parsed; how many there must be follows from fields that were
checked before. An adapter is ONE array, whatever its tensors: every array is a request of its own
in Flower's transport, so one costs a quarter of what a hundred do.
"""

from __future__ import annotations

import hmac
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, RecordDict

from aggregation.adapter import Adapter, FloatArray
from aggregation.assignment import MAX_WIDTH
from aggregation.errors import AggregationError
from aggregation.parcel import MAX_VALUES, Parcel, needs_start, unpack
from aggregation.parcel_keys import key_text, keys_from
from aggregation.spec import MAX_DIMENSION, MAX_MODULES, AdapterSpec
from protos.fields import MissingStart, RecordError, integer, mapping, text

SERIALISATION = "airpeft.bytes"
ADAPTER = "adapter"
BESIDE = "beside"
SKETCHES = "sketches"
MAX_BESIDE = 64

Find = Callable[[str], Adapter | None]


def nothing(_: str) -> Adapter | None:
    """Finds no adapter: whoever holds none."""
    return None


def record_bytes(record: RecordDict) -> int:
    """Bytes of all arrays of a record as they are sent, without names and framing."""
    return sum(len(a.data) for arrays in record.array_records.values() for a in arrays.values())


def parcel_fields(parcel: Parcel, spec: AdapterSpec, digest: str) -> dict[str, Any]:
    """The fields that say what the bytes of a parcel are.

    Args:
        parcel: what travels.
        spec: of the adapter that arrives.
        digest: what the receiver must arrive at.
    """
    return {
        "spec": spec.to_json(),
        "digest": digest,
        "parcel-codec": parcel.codec,
        "parcel-keys": key_text(parcel.keys, spec),
    }


def parcel_from(
    arrays: Mapping[str, Array], fields: Mapping[str, Any]
) -> tuple[Parcel, AdapterSpec]:
    """The parcel and the specification of a record; the bytes are not looked into.

    Raises:
        RecordError: if a field or the array is missing or malformed.
    """
    data = data_of(arrays, ADAPTER)
    try:
        spec = AdapterSpec.from_json(text(fields, "spec"))
        keys = keys_from(text(fields, "parcel-keys"), spec)
    except AggregationError as error:
        raise RecordError(f"the adapter's specification is malformed: {error}") from None
    if spec.size > MAX_VALUES:
        raise RecordError(f"the adapter has {spec.size} values; at most {MAX_VALUES} are allowed")
    return Parcel(text(fields, "parcel-codec", 200), keys, data), spec


def adapter_from(arrays: Mapping[str, Array], fields: Mapping[str, Any], find: Find) -> Adapter:
    """The adapter that a server handed out, completed from one that the client still has.

    Raises:
        MissingStart: if the client has not the adapter that this one is completed from.
        RecordError: if anything does not fit together.
    """
    parcel, spec = parcel_from(arrays, fields)
    held = text(fields, "held", 100)
    start = find(held) if held else None
    if held and (start is None or start.spec != spec):
        raise MissingStart(f"the task builds on the adapter {held[:80]!r}, which is not here")
    try:
        if start is None and needs_start(parcel, spec):
            start = Adapter.zeros(spec)
        adapter = unpack(parcel, spec, start)
    except AggregationError as error:
        raise RecordError(f"the adapter does not fit its specification: {error}") from None
    check_digest(adapter.digest, text(fields, "digest"))
    return adapter


def check_digest(digest: str, announced: str) -> None:
    """Refuse what is not what was announced.

    Raises:
        RecordError: if the two differ.
    """
    if not hmac.compare_digest(digest.encode(), announced.encode()):
        raise RecordError(f"the adapter's digest is {digest}, announced was {announced[:80]!r}")


def beside_fields(beside: Sequence[Adapter]) -> dict[str, Any]:
    """The fields that describe the adapters beside; none if there are none.

    Raises:
        RecordError: there are more than ``MAX_BESIDE``.
    """
    if len(beside) > MAX_BESIDE:
        raise RecordError(f"{len(beside)} adapters beside; at most {MAX_BESIDE} travel")
    fields: dict[str, Any] = {"beside": len(beside)} if beside else {}
    for index, adapter in enumerate(beside):
        fields[f"beside-spec-{index}"] = adapter.spec.to_json()
        fields[f"beside-digest-{index}"] = adapter.digest
    return fields


def beside_array(beside: Sequence[Adapter]) -> Array:
    """All adapters beside as one array of float32 values."""
    return raw(b"".join(a.pack().astype("<f4", copy=False).tobytes() for a in beside))


def beside_from(arrays: Mapping[str, Array], fields: Mapping[str, Any]) -> tuple[Adapter, ...]:
    """The adapters beside.

    Raises:
        RecordError: if anything does not fit together.
    """
    if "beside" not in fields:
        return ()
    count = integer(fields, "beside", 1, MAX_BESIDE)
    data, first, found = data_of(arrays, BESIDE), 0, []
    try:
        specs = [AdapterSpec.from_json(text(fields, f"beside-spec-{i}")) for i in range(count)]
        if len(data) != 4 * sum(spec.size for spec in specs):
            raise RecordError(
                f"the adapters beside have {len(data)} bytes, which is not their size"
            )
        for index, spec in enumerate(specs):
            vector = np.frombuffer(data, "<f4", spec.size, first)
            adapter = Adapter.unpack(spec, vector)
            check_digest(adapter.digest, text(fields, f"beside-digest-{index}"))
            found.append(adapter)
            first += 4 * spec.size
    except AggregationError as error:
        raise RecordError(f"an adapter beside does not fit its specification: {error}") from None
    return tuple(found)


def matrix_fields(matrices: Mapping[str, FloatArray]) -> dict[str, Any]:
    """The field that describes matrices by name; none if there are none."""
    if not matrices:
        return {}
    shapes = {key: list(matrices[key].shape) for key in sorted(matrices)}
    return {SKETCHES: json.dumps(shapes, sort_keys=True)}


def matrix_array(matrices: Mapping[str, FloatArray]) -> Array:
    """Matrices as one array of float32 values, in order of their names."""
    return raw(
        b"".join(np.asarray(matrices[k], "<f4", order="C").tobytes() for k in sorted(matrices))
    )


def matrices_from(arrays: Mapping[str, Array], fields: Mapping[str, Any]) -> dict[str, FloatArray]:
    """The matrices by name; empty if there are none.

    Raises:
        RecordError: if a shape is malformed, or the bytes are not as many as the shapes need.
    """
    if SKETCHES not in fields:
        return {}
    shapes = mapping(fields, SKETCHES)
    if len(shapes) > MAX_MODULES:
        raise RecordError(f"{len(shapes)} sketches; at most {MAX_MODULES} are allowed")
    for key, shape in shapes.items():
        good = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)
        if not good or not (0 < shape[0] <= MAX_DIMENSION and 0 < shape[1] <= MAX_WIDTH):
            raise RecordError(f"sketch {key[:80]!r}: {str(shape)[:40]} is not rows and width")
    data, first, found = data_of(arrays, SKETCHES), 0, {}
    if len(data) != 4 * sum(math.prod(shape) for shape in shapes.values()):
        raise RecordError(
            f"the sketches have {len(data)} bytes, which is not what their shapes need"
        )
    for key in sorted(shapes):
        count = math.prod(shapes[key])
        values = np.frombuffer(data, "<f4", count, first).astype(np.float32, copy=False)
        found[key] = values.reshape(shapes[key])
        first += 4 * count
    return found


def raw(data: bytes) -> Array:
    """Bytes as an array of Flower."""
    return Array("uint8", (len(data),), SERIALISATION, data)


def arrays_of(record: RecordDict, allowed: Sequence[str]) -> Mapping[str, Array]:
    """The arrays of a record, all of which must be known.

    Raises:
        RecordError: if there is no record of arrays, or an array that nobody asked for.
    """
    arrays: Mapping[str, Array] | None = record.array_records.get(ADAPTER)
    if arrays is None or not set(arrays) <= set(allowed):
        raise RecordError(f"expected arrays of {', '.join(allowed)} in the record {ADAPTER!r}")
    return arrays


def data_of(arrays: Mapping[str, Array], key: str) -> bytes:
    """The bytes of one array.

    Raises:
        RecordError: if it is missing, or written by another rule than ours.
    """
    if key not in arrays:
        raise RecordError(f"the message has no array {key!r}")
    array = arrays[key]
    if array.stype != SERIALISATION or array.dtype != "uint8":
        raise RecordError(
            f"array {key!r} is {array.dtype} as {array.stype!r}; "
            f"allowed: uint8 as {SERIALISATION!r}"
        )
    return bytes(array.data)
