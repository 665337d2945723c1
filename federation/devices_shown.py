"""Devices as a table for people."""

from __future__ import annotations

import time
from typing import Any

from federation.shown import ago, print_table


def print_devices(devices: list[dict[str, Any]], empty: str = "") -> None:
    """A table of devices, or what to say if there is none."""
    now = time.time()
    rows = [
        (
            d["id"],
            "revoked" if d["revoked"] else "active",
            d["running"] or "(base)",
            "connected" if d["connected"] else ago(d["last_seen"], now),
            _behind(d.get("metadata_hours")),
            d["inventory"].get("runtime", ""),
            " ".join(f"{key}={value}" for key, value in sorted(d["tags"].items())),
        )
        for d in devices
    ]
    columns = ("DEVICE", "STATE", "RUNNING", "SEEN", "METADATA", "RUNTIME", "TAGS")
    advice = "no device yet; make an enrolment file with: airpeft fleet token --out enrol.json"
    print_table(columns, rows, empty or advice)


def _behind(hours: float | None) -> str:
    if hours is None:
        return "unknown"
    return f"{hours:.1f} h behind" if hours else "newest"
