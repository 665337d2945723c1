from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from privacy.randomness import KeyFileError, Stream, derive, device_key, seeded_key

KEY = seeded_key(3)


def test_normal_numbers_are_normal() -> None:
    values = Stream(KEY).normal(200_000)
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert values.std() == pytest.approx(1.0, abs=0.01)
    tail = np.abs(values) > 4
    assert 2 <= tail.sum() <= 40  # 12.7 expected


def test_uniform_numbers_are_uniform_and_below_one() -> None:
    values = Stream(KEY).uniform(200_000)
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert 0.0 <= values.min() < values.max() < 1.0


def test_labels_separate_streams_and_cannot_run_together() -> None:
    keys = {derive(KEY, "a", "b"), derive(KEY, "ab"), derive(KEY, "a", "b", ""), derive(KEY, "b")}
    assert len(keys) == 4
    assert derive(KEY, "round", 1) == derive(KEY, "round", 1)
    a, b = Stream(derive(KEY, "noise")), Stream(derive(KEY, "sampling"))
    assert abs(np.corrcoef(a.normal(10_000), b.normal(10_000))[0, 1]) < 0.05


def test_a_permutation_has_every_number_once() -> None:
    assert sorted(Stream(KEY).permutation(1000).tolist()) == list(range(1000))


def test_a_devices_secret_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "home" / "ledger.sqlite.key"
    key = device_key(path)
    assert device_key(path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    path.write_bytes(b"short")
    with pytest.raises(KeyFileError, match="5"):
        device_key(path)


def test_processes_that_come_at_once_get_the_same_secret(tmp_path: Path) -> None:
    path, children = tmp_path / "key", []
    for number in range(6):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                (tmp_path / f"saw-{number}").write_bytes(device_key(path))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    assert len({(tmp_path / f"saw-{n}").read_bytes() for n in range(6)}) == 1
