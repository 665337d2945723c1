"""Plain values as TOML: the standard library only reads it.

>>> table("train", {"rank": 4, "targets": ["query"], "steps": None})[1:]
['rank = 4', 'targets = ["query"]']
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def table(name: str, values: Mapping[str, Any]) -> list[str]:
    """Lines of a section; those of its own sections come after its values."""
    lines = [f"\n[{name}]"] if name else []
    inner: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            inner += table(f"{name}.{key}" if name else key, value) if value else []
        elif value is not None:
            lines.append(f"{key} = {value_text(value)}")
    return lines + inner


def value_text(value: Any) -> str:
    """One value."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(value_text(v) for v in value) + "]"
    if isinstance(value, str | bool | int):
        return json.dumps(value)
    return repr(value)
