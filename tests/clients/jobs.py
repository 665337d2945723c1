"""Jobs for a trainer on the tiny base, and what comes of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from aggregation.adapter import Adapter
from aggregation.init import initial_adapter
from aggregation.update import Update
from clients.base import BaseRef
from clients.data import DataSource, Examples
from clients.model import adapter_spec
from clients.trainer import Trainer
from clients.training import ClientJob, TrainingPlan
from tests.device.tiny import LABELS

PLAN = TrainingPlan(sample_rate=0.25, steps=4, learning_rate=0.02, head_learning_rate=0.1)
RANK = 4


def started(base: BaseRef, *, rank: int = RANK, layers: tuple[int, ...] = (1,)) -> Adapter:
    """An adapter of which no tensor is zero, as after some rounds."""
    start = initial_adapter(adapter_spec(base, LABELS, rank=rank, alpha=8.0, layers=layers), seed=1)
    rng = np.random.default_rng(7)
    return Adapter(start.spec, {k: v + rng.normal(0, 0.1, v.shape) for k, v in start})


def job(base: BaseRef, data: Examples | DataSource, **change: Any) -> ClientJob:
    values = {
        "client": "ann",
        "run": "r",
        "round": 1,
        "adapter": started(base),
        "data": data,
        "plan": PLAN,
    }
    return ClientJob(**{**values, **change})


def update(trainer: Trainer, one: ClientJob) -> Update:
    (result,) = trainer.train([one])
    assert isinstance(result, Update), result
    return result


def keys(adapter: Adapter) -> dict[str, set[str]]:
    """Names of the tensors by what they are: ``A``, ``B``, ``head``."""
    return {
        "A": {m.keys[0] for m in adapter.spec.modules},
        "B": {m.keys[1] for m in adapter.spec.modules},
        "head": {t.key for t in adapter.spec.others},
    }


def moved(before: Adapter, after: Adapter) -> set[str]:
    """Names of the tensors that are not the same bit for bit."""
    return {k for k, v in after if v.tobytes() != before.tensors[k].tobytes()}
