"""What is known of a device, field by field, for filters; and the tags that operators give it.

>>> facts({"id": "d-1", "tags": {"site": "north"}, "last_seen": 0.0}, now=7200.0)["silent_hours"]
2.0
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from federation.errors import FederationError

TAGS_MAX, VALUE_MAX = 32, 200
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\Z", re.ASCII)
_VALUE = re.compile(r'[^"\\\x00-\x1f]*\Z')


class TagError(FederationError):
    """A tag that cannot be; says what can."""


def facts(device: Mapping[str, Any], now: float) -> dict[str, Any]:
    """The fields of :data:`federation.filters.FIELDS` and the tags, as far as they are known.

    Args:
        device: its row, for people.
        now: Unix seconds.
    """
    seen = device.get("last_seen")
    health, inventory = device.get("health") or {}, device.get("inventory") or {}
    return {
        **inventory,
        "disk_free_bytes": health.get("disk_free_bytes"),
        "battery_percent": health.get("battery_percent"),
        **{f"tag.{name}": value for name, value in (device.get("tags") or {}).items()},
        "id": device["id"],
        "running": device.get("running", ""),
        "revoked": device.get("revoked") is not None,
        "connected": bool(device.get("connected", False)),
        "silent_hours": None if seen is None else max(0.0, now - seen) / 3600,
    }


def changed_tags(tags: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """The tags after a change; None takes one away.

    >>> changed_tags({"a": "1", "b": "2"}, {"a": None, "c": "3"})
    {'b': '2', 'c': '3'}

    Raises:
        TagError: a name or a value out of bounds, or too many tags.
    """
    for name, value in changes.items():
        if not _NAME.match(name):
            raise TagError(
                f"tag {name[:80]!r}: a name has 1 to 64 letters, digits, dots, hyphens, underscores"
            )
        if value is not None and (len(value) > VALUE_MAX or not _VALUE.match(value)):
            raise TagError(
                f"tag {name}: a value has at most {VALUE_MAX} characters, and no quotes,"
                " backslashes or control characters"
            )
    given = {name: value for name, value in changes.items() if value is not None}
    kept = {name: value for name, value in tags.items() if name not in changes}
    if len(kept) + len(given) > TAGS_MAX:
        raise TagError(f"a device has at most {TAGS_MAX} tags")
    return {**kept, **given}
