"""The bytes that signatures under metadata are made over: OLPC canonical JSON, quickly.

The reference encoder is Python, character by character. The standard library's writes the same
bytes for everything but strings with control characters, which it escapes and canonical JSON does
not; whatever brings a backslash therefore goes to the reference. A test compares the two.

For counting signatures, not for making them: the reference refuses floats, and this does not.

    >>> canonical({"b": [1, True, None], "a": "x"})
    b'{"a":"x","b":[1,true,null]}'
    >>> canonical({"a": "x" + chr(9)}) == b'{"a":"x' + bytes([9]) + b'"}'
    True
"""

from __future__ import annotations

import json
from typing import Any

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
