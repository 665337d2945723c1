"""How the device is: memory, disk, load, battery, heat; and whether there is room for an install.

    >>> from pathlib import Path
    >>> health = measure(Path("."))
    >>> health.process_memory_bytes > 0 and health.disk_free_bytes > 0
    True

Measured when asked, kept nowhere; the judgement of a whole fleet's health is the server's.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import psutil

from clients.errors import ClientError
from protos.messages import Health, Inventory

RESERVE_BYTES = 16 * 1024 * 1024  # of disk, never taken by an install


class NoSpace(ClientError):  # noqa: N818  (named by the reason that it is reported with)
    """The device has not enough free disk for an install; free some, the agent tries again."""


def measure(home: Path) -> Health:
    """The state of this device and process now.

    Args:
        home: a folder on the disk whose free space counts.
    """
    battery = _battery()
    return Health(
        memory_available_bytes=int(psutil.virtual_memory().available),
        process_memory_bytes=int(psutil.Process().memory_info().rss),
        disk_free_bytes=shutil.disk_usage(home).free,
        load_1min=os.getloadavg()[0],
        battery_percent=battery,
        temperature_celsius=_temperature(),
    )


def unfit(health: Health, *, min_battery_percent: int = 0) -> str:
    """Why a device that is so should not load a release now; empty if nothing speaks against it.

    >>> low = Health(memory_available_bytes=1, process_memory_bytes=1, disk_free_bytes=1,
    ...              load_1min=0.0, battery_percent=12)
    >>> unfit(low, min_battery_percent=20)
    'the battery has 12 %, 20 % are asked for'
    """
    battery = health.battery_percent
    if battery is not None and battery < min_battery_percent:
        return f"the battery has {battery} %, {min_battery_percent} % are asked for"
    return ""


def inventory(*, agent_version: str, base_digest: str, runtime: str) -> Inventory:
    """What this device is, as it says at enrolment."""
    return Inventory(
        agent_version=agent_version,
        base_digest=base_digest,
        runtime=runtime,
        memory_bytes=int(psutil.virtual_memory().total),
        cpu_count=os.cpu_count() or 1,
        platform=f"{platform.system()} {platform.machine()}".strip(),
    )


def require_space(home: Path, needed_bytes: int, *, reserve_bytes: int = RESERVE_BYTES) -> None:
    """Refuse an install before its first byte is fetched, rather than fill the disk half way.

    Args:
        home: where the install would go.
        needed_bytes: partial download and staged copy together.
        reserve_bytes: what must stay free afterwards.

    Raises:
        NoSpace: there is less.
    """
    free = shutil.disk_usage(home).free
    if free < needed_bytes + reserve_bytes:
        raise NoSpace(
            f"{home}: {free} bytes free, the install needs {needed_bytes} and leaves "
            f"{reserve_bytes}: free some space; the device tries again by itself"
        )


def _battery() -> int | None:
    try:
        found = psutil.sensors_battery()
    except (AttributeError, OSError):  # not on this platform, or no permission
        return None
    return None if found is None else max(0, min(100, round(found.percent)))


def _temperature() -> float | None:
    try:
        sensors = psutil.sensors_temperatures()
    except (AttributeError, OSError):
        return None
    found = [one.current for group in sensors.values() for one in group if -50 < one.current < 200]
    return round(max(found), 1) if found else None
