from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clients.base import BaseRef
from clients.data import Examples
from tests.device.tiny import LABELS, WORDS, make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseRef:
    return make_base(tmp_path_factory.mktemp("base") / "tiny-bert")


@pytest.fixture(scope="session")
def examples() -> Examples:
    """Sixty sentences of different lengths; those with more good words than bad are positive."""
    rng = np.random.default_rng(0)
    texts, labels = [], []
    for _ in range(60):
        words = rng.choice(WORDS[:11], size=rng.integers(2, 12)).tolist()
        label = int(rng.integers(0, 2))
        texts.append(" ".join([*words, *(["good", "fun"] if label else ["bad", "dull"])]))
        labels.append(label)
    return Examples(tuple(texts), tuple(labels), LABELS)


@pytest.fixture
def data_file(tmp_path: Path, examples: Examples) -> Path:
    path = tmp_path / "partitions" / "client-00003.jsonl"
    path.parent.mkdir()
    rows = zip(examples.texts, examples.labels, strict=True)
    lines = [json.dumps({"text": text, "label": LABELS[label]}) for text, label in rows]
    path.write_text("\n".join(lines) + "\n")
    return path
