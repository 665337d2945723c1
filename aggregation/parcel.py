"""What of an adapter travels in one direction, as one run of bytes.

A client sends the tensors that its assignment names, in the recipe's codec; whatever does not
travel is, on the other side, what the start has there. What arrives is formed by the same NumPy
operations on both sides, so the client knows bit for bit what the server will see: that adapter,
not the trained one, is what its update announces, and what error feedback compares with.

    >>> from aggregation.assignment import Assignment
    >>> from aggregation.spec import AdapterSpec, ModuleSpec
    >>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))
    >>> start = Adapter.zeros(spec)
    >>> trained = Adapter(spec, {key: value + 1 for key, value in start})
    >>> keys = sent_keys(spec, Assignment(trains="B", sends="B"))
    >>> parcel, arrived, _ = pack(Float32(), trained, start, keys)
    >>> parcel.nbytes, float(arrived.factors("query")[1].max())  # 4 x 2 values; A did not travel
    (32, 0.0)
    >>> unpack(parcel, spec, start).digest == arrived.digest
    True
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from aggregation.adapter import Adapter, FloatArray
from aggregation.assignment import Assignment
from aggregation.codec import Codec, CodecError
from aggregation.codecs import Float32, read_codec
from aggregation.error_feedback import recall, remember
from aggregation.parcel_keys import core_seed, gather, place, sent_keys, sizes
from aggregation.sparse_codecs import ZerosOmitted, omitted_bytes
from aggregation.spec import AdapterSpec
from aggregation.update import Update

__all__ = [
    "MAX_VALUES",
    "Parcel",
    "check_expected",
    "needs_start",
    "pack",
    "pack_down",
    "send",
    "sent_keys",
    "turn_of",
    "unpack",
]
MAX_VALUES = 1 << 28  # 1 GiB as float32: few bytes of a sparse codec can stand for many values


@dataclass(frozen=True, eq=False)
class Parcel:
    """Values on their way.

    Attributes:
        codec: how they are written, such as ``int8(block=64)``.
        keys: the tensors they belong to, in canonical order; ``core:<seed>:<module>`` for the
            r x r core of a module in the basis of that public seed.
        data: the bytes.
    """

    codec: str
    keys: tuple[str, ...]
    data: bytes

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, without framing."""
        return len(self.data)


def pack(
    codec: Codec,
    adapter: Adapter,
    start: Adapter | None,
    keys: Sequence[str],
    memory: FloatArray | None = None,
    *,
    turn: int = 0,
) -> tuple[Parcel, Adapter, FloatArray | None]:
    """What a client sends of its adapter.

    Args:
        codec: how.
        adapter: after training.
        start: before it; of the same specification. None only for all tensors in ``float32``.
        keys: the tensors that travel, from :func:`sent_keys`.
        memory: what error feedback kept from the last round; None at first.
        turn: which part travels, for a codec that sends a part; see :func:`turn_of`.

    Returns:
        The parcel, the adapter that will arrive, and the memory to keep (None if the codec keeps
        none).

    Raises:
        CodecError: if a value is out of the codec's reach, or something does not fit.
    """
    keys = tuple(keys)
    spec = adapter.spec
    _check_start(spec, start)
    values = gather(adapter, keys)
    before = None if start is None else gather(start, keys)
    if codec.lossless:
        return _lossless(keys, values, before), place(spec, start, keys, values), None
    if before is None:
        raise CodecError(f"codec {codec.kind} needs the start of the training, which is missing")
    with np.errstate(over="ignore", invalid="ignore"):  # the codec refuses what is not finite
        target = values - before
        if codec.stateful:
            target += recall(memory, keys, spec)
    parcel = Parcel(str(codec), keys, codec.encode(target, turn))
    came = _added(before, codec.decode(parcel.data, len(target)))
    arrived = place(spec, start, keys, came)
    if not codec.stateful:
        return parcel, arrived, None
    return parcel, arrived, remember(memory, keys, spec, target - (came - before))


def unpack(parcel: Parcel, spec: AdapterSpec, start: Adapter | None) -> Adapter:
    """The adapter that arrives.

    Args:
        parcel: what came.
        spec: of the adapter.
        start: what training started from, of the same specification; None where
            :func:`needs_start` says that it is not needed.

    Raises:
        CodecError: if the parcel does not fit the specification or the start.
    """
    codec = read_codec(parcel.codec)
    count = sum(sizes(parcel.keys, spec))
    if spec.size > MAX_VALUES:
        raise CodecError(f"the adapter has {spec.size} values; at most {MAX_VALUES} are allowed")
    _check_start(spec, start)
    if start is None and needs_start(parcel, spec):
        raise CodecError("what arrives builds on the start of the training, which is missing")
    vector = codec.decode(parcel.data, count)
    if not codec.absolute:
        assert start is not None  # noqa: S101 - narrows the type
        before = gather(start, parcel.keys)
        vector = _xor(vector, before) if codec.lossless else _added(before, vector)
    return place(spec, start, parcel.keys, vector)


def needs_start(parcel: Parcel, spec: AdapterSpec) -> bool:
    """Whether the parcel alone does not make an adapter.

    Raises:
        CodecError: if the parcel's codec is unknown.
    """
    everything = tuple(spec.layout)
    seed = core_seed(parcel.keys)
    if seed is not None:  # A is that of the basis
        everything = sent_keys(spec, Assignment(trains="core", sends="core", seed=seed))
    return not read_codec(parcel.codec).absolute or parcel.keys != everything


def pack_down(adapter: Adapter, held: Adapter | None, assignment: Assignment) -> tuple[Parcel, str]:
    """What a server sends of an adapter, lossless: the fewest bytes from which it is itself again.

    Args:
        adapter: what is handed out.
        held: what the client is believed to have; None for nothing.
        assignment: of the client; if it sends a core, and the adapter lies in the basis of its
            seed (:func:`aggregation.core_basis.settle`), cores travel instead of the factors.

    Returns:
        The parcel, and the digest of what it builds on: that of ``held``, or empty for an adapter
        of zeros.
    """
    spec = adapter.spec
    everything = tuple(spec.layout)
    values = gather(adapter, everything)
    best, built_on = _lossless(everything, values, np.zeros_like(values)), ""
    if held is not None and held.spec == spec:
        keys = tuple(key for key, value in adapter if _differs(value, held.tensors[key]))
        parcel = _lossless(keys, gather(adapter, keys), gather(held, keys))
        if parcel.nbytes < best.nbytes:
            best, built_on = parcel, held.digest
    if assignment.sends == "core":
        keys = sent_keys(spec, assignment)
        parcel = Parcel(Float32.kind, keys, Float32().encode(gather(adapter, keys)))
        if parcel.nbytes < best.nbytes and not _differs(unpack(parcel, spec, None).pack(), values):
            best, built_on = parcel, ""
    return best, built_on


def check_expected(parcel: Parcel, spec: AdapterSpec, assignment: Assignment, codec: str) -> None:
    """Refuse a parcel that is not what the client was asked to send.

    Args:
        parcel: what came.
        spec: of the adapter.
        assignment: of the client.
        codec: the recipe's; empty for any.

    Raises:
        CodecError: if other tensors came, or in another codec.
    """
    asked = sent_keys(spec, assignment)
    if parcel.keys != asked:
        raise CodecError(
            f"{len(parcel.keys)} tensors came, not the {len(asked)} that were asked for "
            f"(sends={assignment.sends})"
        )
    if not codec:
        return
    wanted = str(read_codec(codec))
    same = wanted == Float32.kind and parcel.codec == ZerosOmitted.kind
    if not same and str(read_codec(parcel.codec)) != wanted:
        raise CodecError(f"the codec is {parcel.codec!r}, asked for was {wanted!r}")


def send(
    update: Update,
    start: Adapter,
    assignment: Assignment,
    codec: Codec,
    memory: FloatArray | None = None,
) -> tuple[Update, FloatArray | None]:
    """The last thing that a client does with its update: the one function of its side.

    Args:
        update: with the trained adapter.
        start: what training started from.
        assignment: says which tensors travel.
        codec: says how.
        memory: what error feedback kept from the last round; None at first.

    Returns:
        The update with its parcel, and with the adapter as it will arrive; the memory to keep.

    Raises:
        CodecError: as :func:`pack`.
    """
    keys = sent_keys(update.adapter.spec, assignment)
    turn = turn_of(update.client, update.round)
    parcel, arrived, kept = pack(codec, update.adapter, start, keys, memory, turn=turn)
    return replace(update, adapter=arrived, parcel=parcel), kept


def turn_of(client: str, number: int) -> int:
    """Which part a client sends: the next one in every round.

    Clients whose names end in a number take turns by it, so that the parts of a round are spread
    evenly; others are spread by a checksum of their name.
    """
    digits = re.search(r"[0-9]{1,9}\Z", client)
    return (int(digits[0]) if digits else zlib.crc32(client.encode())) + number


def _lossless(keys: tuple[str, ...], values: FloatArray, before: FloatArray | None) -> Parcel:
    """As float32, or what differs from the start, whichever is smaller."""
    if before is not None:
        changed = _xor(values, before)
        count = int(np.count_nonzero(changed.view(np.uint32)))
        if omitted_bytes(count, len(values)) < 4 * len(values):
            return Parcel(ZerosOmitted.kind, keys, ZerosOmitted().encode(changed))
    return Parcel(Float32.kind, keys, Float32().encode(values))


def _check_start(spec: AdapterSpec, start: Adapter | None) -> None:
    if start is not None and start.spec != spec:
        raise CodecError("the start of the training has another specification than the adapter")


def _differs(one: FloatArray, other: FloatArray) -> bool:
    return not np.array_equal(one.view(np.uint32), other.view(np.uint32))


def _added(before: FloatArray, step: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):  # an infinity is for the receiver's floor to refuse
        return before + step


def _xor(one: FloatArray, other: FloatArray) -> FloatArray:
    return (one.view(np.uint32) ^ other.view(np.uint32)).view(np.float32)
