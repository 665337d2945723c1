"""Checks on the values inside signed metadata, and the names of its targets.

Each check returns the value that it was given, so that it can stand where the value is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from protos.errors import WireError

T = TypeVar("T")

SCHEMA = 1
MICRO = 1_000_000
DELTA_UNIT = 10**12
CURRENT_ROUND = "rounds/current"
ADAPTERS_ROLE = "adapters"
ROUNDS_ROLE = "rounds"
SIGNED_UNIX = "x-airpeft-signed-unix"
"""Field of each signed metadata file: when it was made, in seconds since 1970, UTC."""
REVOKED_KEYS = "x-airpeft-revoked-keys"
"""Field of root: identifiers of keys whose signatures count no more, whatever still names them."""

MAX_INTEGER = 2**53 - 1
MAX_TEXT = 2_000
MAX_ASSIGNMENTS = 64

CHANNEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?\Z", re.ASCII)
TARGET = re.compile(r"adapters/([^/]{1,32})/([1-9][0-9]{0,15})\.airpeft\Z", re.ASCII)
HEX = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z", re.ASCII)
WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}\Z", re.ASCII)


class StatementError(WireError):
    """A signed statement that is not what its schema says; the text names the field."""


def target_name(channel: str, counter: int) -> str:
    """The target of a release.

    >>> target_name("stable", 3)
    'adapters/stable/3.airpeft'

    Raises:
        StatementError: not a channel name, or not a positive counter.
    """
    return f"adapters/{check_channel(channel)}/{check_integer('counter', counter, 1)}.airpeft"


def split_target(target: str) -> tuple[str, int]:
    """Channel and counter of a release's target.

    Raises:
        StatementError: anything else than ``adapters/<channel>/<counter>.airpeft``.
    """
    match = TARGET.match(target)
    if match is None or not CHANNEL.match(match[1]):
        raise StatementError(
            f"target {target[:80]!r} is not of the form adapters/<channel>/<counter>.airpeft"
        )
    return match[1], int(match[2])


def payload_path(target: str, sha256: str) -> str:
    """Where the repository keeps a target's bytes: ``targets/<folder>/<sha256>.<name>``.

    >>> payload_path("adapters/stable/3.airpeft", "ab" * 32)[:36]
    'targets/adapters/stable/abababababab'
    """
    folder, _, name = target.rpartition("/")
    return f"targets/{folder}/{sha256}.{name}"


def check_channel(channel: str) -> str:
    """The channel, if it is one.

    Raises:
        StatementError: not 1 to 32 lower-case letters, digits or inner hyphens.
    """
    if not isinstance(channel, str) or not CHANNEL.match(channel):
        raise StatementError(
            f"channel {channel!r} must be 1 to 32 lower-case letters, digits or inner hyphens"
        )
    return channel


def check_document(
    what: str, doc: Any, fields: tuple[frozenset[str], frozenset[str]]
) -> dict[str, Any]:
    """A ``custom`` field of our schema with all required fields (``fields``: required, optional).

    Raises:
        StatementError: another schema, a missing field, or a critical one that is not known.
    """
    required, optional_ones = fields
    found = check_object(f"the {what}'s custom field", doc)
    if type(found.get("schema")) is not int or found["schema"] != SCHEMA:
        raise StatementError(f"{what}: schema {str(found.get('schema'))[:20]} is not {SCHEMA}")
    missing = sorted(required - found.keys())
    if missing:
        raise StatementError(f"{what}: missing {', '.join(missing)}")
    critical = found.get("critical", [])
    named = isinstance(critical, list) and all(isinstance(name, str) for name in critical)
    if not named or len(critical) > 64:
        raise StatementError(f"{what}: critical must be a short list of field names")
    unknown = [c[:40] for c in critical if c not in required and c not in optional_ones]
    if unknown:
        raise StatementError(
            f"{what}: this version does not know {', '.join(unknown)}, which must be understood; "
            "update the agent"
        )
    return found


def check_object(what: str, doc: Any) -> dict[str, Any]:
    """A JSON object, or StatementError."""
    if not isinstance(doc, Mapping) or not all(isinstance(key, str) for key in doc):
        raise StatementError(f"{what} is not a JSON object")
    return dict(doc)


def optional(read: Callable[[Any], T], doc: Any) -> T | None:
    """What ``read`` makes of it, or None for null."""
    return None if doc is None else read(doc)


def check_integer(what: str, value: Any, low: int = 0, high: int = MAX_INTEGER) -> int:
    """An integer within its bounds (no bool, no float), or StatementError."""
    if type(value) is not int or not low <= value <= high:
        raise StatementError(f"{what}={str(value)[:40]} is not an integer in {low}..{high}")
    return value


def check_text(what: str, value: Any, longest: int) -> str:
    """A string of at most ``longest`` characters, or StatementError."""
    if not isinstance(value, str) or len(value) > longest or "\0" in value:
        raise StatementError(f"{what} is not a string of at most {longest} characters")
    return value
