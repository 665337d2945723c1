from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulations.world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a tiny scenario with its own base and data."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder for the sockets of a run that is killed; a short path, which a socket must have."""
    # Ray's own processes may still write there for a moment.
    with tempfile.TemporaryDirectory(prefix="airpeft-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
