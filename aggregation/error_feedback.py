"""Error feedback: what a lossy codec takes away from one update is added to the next.

Seide et al. 2014 ("1-bit stochastic gradient descent"), section 3; Karimireddy et al. 2019
(1901.09847), algorithm 2. With x_t the update of round t, C the codec and e_0 = 0::

    sent_t = C(x_t + e_t),    e_{t+1} = x_t + e_t - sent_t

so that ``sum sent + e = sum x`` at any time: nothing is lost, it only comes later. What counts as
sent is what arrives, rounded to float32 after it was added to the start, so that the sum holds for
the adapters themselves.

The memory is a flat float32 vector that the client keeps: of the whole adapter in canonical order,
so that what waits for B survives a round that sends A; or, for cores, of the vector that travels.
It belongs to the coordinates in which it was made. Where the server turns the factors into another
gauge between rounds it means nothing, and a recipe that does so refuses it
(:mod:`aggregation.soundness`); a client that is rarely drawn brings back what is long out of date;
and an update that the server refuses is lost with all that had waited for it.

    >>> import numpy as np
    >>> from aggregation.codecs import TopK
    >>> codec, memory, arrived = TopK(density=0.25), np.zeros(4, np.float32), np.zeros(4)
    >>> for _ in range(20):
    ...     target = np.float32([4, 3, 2, 1]) + memory
    ...     sent = codec.decode(codec.encode(target), 4)
    ...     memory, arrived = target - sent, arrived + sent
    >>> (arrived + memory).tolist()
    [80.0, 60.0, 40.0, 20.0]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aggregation.adapter import FloatArray
from aggregation.codec import CodecError
from aggregation.parcel_keys import core_seed, sizes
from aggregation.spec import AdapterSpec


def recall(memory: FloatArray | None, keys: Sequence[str], spec: AdapterSpec) -> FloatArray:
    """What waits for these keys, as one vector; zeros at first.

    Raises:
        CodecError: if the memory is of another adapter, or holds what is not finite.
    """
    count = sum(sizes(keys, spec))
    if memory is None:
        return np.zeros(count, np.float32)
    _check(memory, keys, spec)
    if core_seed(keys) is not None:
        return memory
    return np.concatenate([memory[place] for place in _places(keys, spec)] or [memory[:0]])


def remember(
    memory: FloatArray | None, keys: Sequence[str], spec: AdapterSpec, rest: FloatArray
) -> FloatArray:
    """The memory with another content for these keys; what waits for others stays.

    Args:
        memory: before; None at first.
        keys: what travelled.
        spec: of the adapter.
        rest: what did not arrive of it.

    Raises:
        CodecError: if the memory is of another adapter.
    """
    if core_seed(keys) is not None:
        return rest
    kept = np.zeros(spec.size, np.float32) if memory is None else memory.copy()
    _check(kept, keys, spec)
    first = 0
    for place in _places(keys, spec):
        count = place.stop - place.start
        kept[place] = rest[first : first + count]
        first += count
    return kept


def _check(memory: FloatArray, keys: Sequence[str], spec: AdapterSpec) -> None:
    expected = spec.size if core_seed(keys) is None else sum(sizes(keys, spec))
    if memory.shape != (expected,) or memory.dtype != np.float32:
        raise CodecError(
            f"the error memory is {memory.dtype} of shape {memory.shape}, expected float32 of "
            f"shape ({expected},): it belongs to another adapter; start without"
        )
    if not np.isfinite(memory).all():
        raise CodecError("the error memory holds NaN or infinite values; start without")


def _places(keys: Sequence[str], spec: AdapterSpec) -> list[slice]:
    return [slice(*spec.layout[key][:2]) for key in keys]
