from __future__ import annotations

from pathlib import Path

import pytest

from tests.trust.fleet_of_one import Device, Publisher


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "publisher")


@pytest.fixture
def device(tmp_path: Path, publisher: Publisher) -> Device:
    return Device(tmp_path / "device", publisher)
