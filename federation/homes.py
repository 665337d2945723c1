"""What lies where in a server's home, with one gateway or several.

The home holds what all gateways of a fleet share: the authority, the online key, the repository.
``<home>/gateways/NAME`` holds what is one gateway's: its lock, its TLS key, its ports, its
addresses. A server alone has these in the home itself.
"""

from __future__ import annotations

import re
from pathlib import Path

from federation.errors import FederationError

GATEWAYS = "gateways"
ENDPOINTS = "endpoints.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}\Z", re.ASCII)


class HomeError(FederationError):
    """A gateway's name that is none."""


def folder_of(home: Path, gateway: str | None) -> Path:
    """Where a gateway's own files lie.

    Raises:
        HomeError: the name is malformed.
    """
    if gateway is None:
        return home
    if not _NAME.match(gateway):
        raise HomeError(
            f"--gateway {gateway[:60]!r}: a name has 1 to 32 lower-case letters, digits, hyphens"
        )
    return home / GATEWAYS / gateway


def endpoint_files(home: Path) -> list[Path]:
    """The ``endpoints.json`` of every server that runs in a home, or has been killed there."""
    found = [home / ENDPOINTS, *sorted((home / GATEWAYS).glob(f"*/{ENDPOINTS}"))]
    return [path for path in found if path.is_file()]
