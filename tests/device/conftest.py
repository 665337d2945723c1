from __future__ import annotations

from pathlib import Path

import pytest

from clients.base import BaseRef
from tests.device.tiny import LABELS, make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseRef:
    return make_base(tmp_path_factory.mktemp("base") / "tiny-bert")


@pytest.fixture
def runtime(base: BaseRef):  # type: ignore[no-untyped-def]
    from clients.peft_runtime import PeftRuntime

    return PeftRuntime(base, labels=LABELS)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "device"
    folder.mkdir()
    return folder
