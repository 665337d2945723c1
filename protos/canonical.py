"""The bytes that signatures under metadata are made over: OLPC canonical JSON, quickly.

The reference encoder is Python, character by character. The standard library's writes the same
bytes for everything but strings with control characters, which it escapes and canonical JSON does
not; whatever brings a backslash therefore goes to the reference. A test compares the two.

The reference refuses floats: :func:`canonical_exact`, for making signatures, does, too;
:func:`canonical`, for counting them, does not.

    >>> canonical({"b": [1, True, None], "a": "x"})
    b'{"a":"x","b":[1,true,null]}'
    >>> canonical({"a": "x" + chr(9)}) == b'{"a":"x' + bytes([9]) + b'"}'
    True
"""

from __future__ import annotations

import json
from typing import Any

from securesystemslib.exceptions import FormatError
from securesystemslib.formats import encode_canonical


def canonical(doc: Any) -> bytes:
    """Canonical JSON of a document of objects, lists, strings, integers, booleans and null.

    Raises:
        ValueError: it holds what JSON has not.
    """
    text = json.dumps(doc, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if "\\" in text:
        text = str(encode_canonical(doc))
    return text.encode("utf-8")


def canonical_exact(doc: Any) -> bytes:
    """The same, for what is going to be signed: a number with a fraction is refused.

    >>> canonical_exact({"a": 1})
    b'{"a":1}'

    Raises:
        ValueError: it holds what canonical JSON has not, a float among it.
    """
    try:
        data = canonical(doc)
    except FormatError as error:
        raise ValueError(f"canonical JSON: {error}") from None
    if b"\\" not in data:  # else the reference has written and judged it
        json.loads(data, parse_float=_refuse, parse_constant=_refuse, strict=False)
    return data


def _refuse(number: str) -> None:
    raise ValueError(f"canonical JSON has no {number[:40]}: a number must be an integer")
