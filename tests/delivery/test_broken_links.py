"""Twenty device processes, four waves, a server killed three times, a third of the links cut."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from simulations.link_drill import drill


@pytest.mark.slow
def test_every_device_ends_on_the_version_and_next_to_nothing_is_fetched_twice(
    tmp_path: Path,
) -> None:
    found = drill(tmp_path, clock=time.monotonic)
    assert found.on_version == found.devices == 20
    assert found.kills == 3
    assert found.cuts == 7
    assert 0 <= found.refetched < 0.05
    assert found.taken_twice == 0
