from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulations.world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a tiny scenario with its own base and data."""
    return make_world(tmp_path_factory.mktemp("world"))
