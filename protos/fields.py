"""Reading single fields of a record that a peer wrote: type and bounds are checked at once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from protos.errors import WireError

MAX_TEXT = 1 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


class RecordError(WireError):
    """A Flower record that is not what its message type promises; nothing of it is used."""


class MissingStart(RecordError):  # noqa: N818 - says what is missing
    """A record that builds on an adapter which the receiver does not have."""


def text(fields: Mapping[str, Any], key: str, limit: int = MAX_TEXT) -> str:
    """A text field of bounded length.

    Raises:
        RecordError: it is missing, no text, or longer than ``limit`` characters.
    """
    value = fields.get(key)
    if not isinstance(value, str) or len(value) > limit:
        raise RecordError(f"field {key!r} must be a text of at most {limit} characters")
    return value


def name(fields: Mapping[str, Any], key: str) -> str:
    """A field that names a run or a client: safe as a file name and in a log.

    Raises:
        RecordError: it is none.
    """
    value = text(fields, key)
    if not _NAME.match(value):
        raise RecordError(
            f"field {key!r}: {value[:40]!r} is not 1 to 128 letters, digits, dots, dashes"
        )
    return value


def integer(fields: Mapping[str, Any], key: str, low: int, high: int) -> int:
    """A whole number within bounds.

    Raises:
        RecordError: it is missing, or not one in ``low..high``.
    """
    value = fields.get(key)
    if type(value) is not int or not low <= value <= high:
        raise RecordError(f"field {key!r}: {value!r} is not a whole number in {low}..{high}")
    return value


def number(fields: Mapping[str, Any], key: str) -> float:
    """A number, finite or not.

    Raises:
        RecordError: it is none.
    """
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError(f"field {key!r}: {value!r} is not a number")
    return float(value)


def mapping(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A field that holds a JSON object.

    Raises:
        RecordError: it is none.
    """
    try:
        value = json.loads(text(fields, key))
    except (ValueError, RecursionError):
        raise RecordError(f"field {key!r} is not JSON") from None
    if not isinstance(value, dict):
        raise RecordError(f"field {key!r} must be a JSON object")
    return value
