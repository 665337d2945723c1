"""Which tensors a client sends, how they are taken and put back, and their list in a message.

>>> from aggregation.spec import AdapterSpec, ModuleSpec
>>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))
>>> keys = sent_keys(spec, Assignment(trains="B", sends="B"))
>>> key_text(keys, spec), keys_from("1", spec) == keys
('1', True)
>>> sent_keys(spec, Assignment(trains="core", sends="core", seed=7))
('core:7:query',)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from aggregation.adapter import Adapter, FloatArray
from aggregation.assignment import Assignment
from aggregation.codec import CodecError
from aggregation.core_basis import core_of, with_core
from aggregation.spec import AdapterSpec

CORE = "core:"
_CORE = re.compile(r"core:(0|[1-9][0-9]{0,18}):")
_CORE_TEXT = re.compile(r"core:(0|[1-9][0-9]{0,18})\Z")
_LIST = re.compile(r"[0-9]{1,5}(,[0-9]{1,5})*\Z")


def sent_keys(spec: AdapterSpec, assignment: Assignment) -> tuple[str, ...]:
    """The tensors that a client with this assignment sends, in canonical order.

    Tensors outside the modules go too, unless the client keeps them. In place of a sketch's factors
    only those go; a core, ``core:<seed>:<module>``, stands for the factor B of its module.
    """
    factors = [module.keys for module in spec.modules]
    inside = {key for pair in factors for key in pair}
    others = () if assignment.keeps == "B" else tuple(k for k in spec.layout if k not in inside)
    if assignment.sketch:
        return others
    if assignment.sends == "core":
        return (*(f"{CORE}{assignment.seed}:{m.name}" for m in spec.modules), *others)
    chosen = {"both": (0, 1), "A": (0,), "B": (1,)}[assignment.sends]
    wanted = {pair[index] for pair in factors for index in chosen} | set(others)
    return tuple(key for key in spec.layout if key in wanted)


def core_seed(keys: Sequence[str]) -> int | None:
    """The public seed of the cores among the keys; None if there are none.

    Raises:
        CodecError: if the first key begins like a core's and is none.
    """
    if not keys or not keys[0].startswith(CORE):
        return None
    match = _CORE.match(keys[0])
    if match is None:
        raise CodecError(f"keys: {keys[0][:80]!r} is not core:<seed>:<module>")
    return int(match[1])


def sizes(keys: Sequence[str], spec: AdapterSpec) -> list[int]:
    """Number of values of each key.

    Raises:
        CodecError: if a key is unknown, repeated, or out of its order.
    """
    seed = core_seed(keys)
    if seed is not None:
        count = len(spec.modules)
        if list(keys[:count]) != [f"{CORE}{seed}:{module.name}" for module in spec.modules]:
            raise CodecError("keys: cores travel of all modules, in order, or of none")
        return [m.rank * m.rank for m in spec.modules] + sizes(keys[count:], spec)
    counts, least = [], 0
    for key in keys:
        if key not in spec.layout:
            raise CodecError(f"keys: {key[:120]!r} is no tensor of this adapter")
        first, behind, _ = spec.layout[key]
        if first < least:
            raise CodecError(f"keys: {key!r} is repeated or out of order")
        counts.append(behind - first)
        least = behind
    return counts


def key_text(keys: Sequence[str], spec: AdapterSpec) -> str:
    """The keys in a message: their numbers in canonical order, or ``all``."""
    seed = core_seed(keys)
    plain = keys[len(spec.modules) :] if seed is not None else keys
    names = list(spec.layout)
    numbers = {name: number for number, name in enumerate(names)}
    listed = "all" if list(plain) == names else ",".join(str(numbers[key]) for key in plain)
    return listed if seed is None else f"{CORE}{seed};{listed}"


def keys_from(text: str, spec: AdapterSpec) -> tuple[str, ...]:
    """The inverse of :func:`key_text`.

    Raises:
        CodecError: if the text is no such list.
    """
    head, semicolon, listed = text.rpartition(";")
    match = _CORE_TEXT.match(head) if semicolon else None
    if semicolon and match is None:
        raise CodecError(f"keys: {head[:40]!r} is not core:<seed>")
    names = list(spec.layout)
    if listed == "all":
        plain = tuple(names)
    elif not listed:
        plain = ()
    elif _LIST.match(listed) and all(int(n) < len(names) for n in listed.split(",")):
        plain = tuple(names[int(number)] for number in listed.split(","))
    else:
        raise CodecError(f"keys: {listed[:40]!r} is not a list of tensors below {len(names)}")
    cores = tuple(f"{head}:{module.name}" for module in spec.modules) if match else ()
    keys = (*cores, *plain)
    sizes(keys, spec)
    return keys


def gather(adapter: Adapter, keys: Sequence[str]) -> FloatArray:
    """The values of these keys as one float32 vector, in their order; not to be written to."""
    seed = core_seed(keys)
    if seed is None and tuple(keys) == tuple(adapter.spec.layout):
        return adapter.pack()
    parts = []
    if seed is not None:
        cores = core_of(adapter, seed)
        parts = [cores[module.name].ravel() for module in adapter.spec.modules]
    parts += [adapter.tensors[key].ravel() for key in keys if not key.startswith(CORE)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def place(
    spec: AdapterSpec, start: Adapter | None, keys: Sequence[str], vector: FloatArray
) -> Adapter:
    """The adapter that has these values for these keys, and those of the start elsewhere.

    Args:
        spec: of the adapter.
        start: of the same specification; None if the keys make the adapter whole.
        keys: what travelled.
        vector: their values, as :func:`gather` gives them.

    Raises:
        AdapterError: if something is missing.
    """
    seed = core_seed(keys)
    if seed is None and tuple(keys) == tuple(spec.layout):
        return Adapter.unpack(spec, vector)
    tensors = dict(start.tensors) if start is not None else {}
    parts = dict(zip(keys, np.split(vector, np.cumsum(sizes(keys, spec)))[:-1], strict=True))
    plain = {
        key: part.reshape(spec.layout[key][2])
        for key, part in parts.items()
        if not key.startswith(CORE)
    }
    if seed is not None:
        cores = {
            m.name: parts[f"{CORE}{seed}:{m.name}"].reshape(m.rank, m.rank) for m in spec.modules
        }
        whole = with_core(spec, cores, seed, {**tensors, **plain}).tensors
        in_basis = [key for module in spec.modules for key in module.keys]
        for key in in_basis if start is None else in_basis[1::2]:  # B, and A unless the start's
            tensors[key] = whole[key]
    return Adapter(spec, {**tensors, **plain})
