from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.delivery.rig import Device, ServerProcess


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess(
        tmp_path_factory.mktemp("server") / "home", ("--heartbeat-seconds", "0.5")
    )
    process.start()
    yield process
    assert process.stop() == 0, process.log()


@pytest.fixture
def device(server: ServerProcess) -> Device:
    return Device(server)
