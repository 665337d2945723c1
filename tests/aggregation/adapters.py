"""Specifications, adapters and updates for tests, as plain functions and hypothesis strategies."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.core_basis import basis
from aggregation.recipe import Recipe
from aggregation.report import AggregationReport
from aggregation.spec import AdapterSpec, ModuleSpec, Orientation, TensorSpec
from aggregation.state import GlobalState
from aggregation.update import Update

BASE = "sha256:" + "0" * 64
FEW = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
SEEDS = st.integers(0, 10_000)
WEIGHTS = st.lists(st.floats(0.1, 50), min_size=1, max_size=5)


@st.composite
def specs(draw: st.DrawFn, max_rank: int = 4) -> AdapterSpec:
    """One to three modules of any orientation, unequal ranks and alphas, rsLoRA or not, a head."""
    modules = []
    for index in range(draw(st.integers(1, 3))):
        d_in, d_out = draw(st.integers(4, 12)), draw(st.integers(4, 12))
        modules.append(
            ModuleSpec(
                f"layer.{index}.query",
                d_in,
                d_out,
                draw(st.integers(1, min(max_rank, d_in, d_out))),
                draw(st.sampled_from([1.0, 4.0, 8.5, 16.0, 32.0])),
                draw(st.sampled_from(list(Orientation))),
            )
        )
    others = (TensorSpec("head.weight", (3, 5)), TensorSpec("head.bias", (3,)))
    return AdapterSpec(
        BASE, tuple(modules), others if draw(st.booleans()) else (), draw(st.booleans())
    )


def plain_spec(
    ranks: tuple[int, ...] = (4, 4), width: int = 24, alpha: float = 16.0
) -> AdapterSpec:
    modules = tuple(
        ModuleSpec(f"layer.{i}.query", width, width + 4 * i, rank, alpha)
        for i, rank in enumerate(ranks)
    )
    return AdapterSpec(BASE, modules, (TensorSpec("head.weight", (3, width)),))


def random_adapter(spec: AdapterSpec, seed: int, size: float = 0.5) -> Adapter:
    rng = np.random.default_rng(seed)
    return Adapter(
        spec,
        {k: (size * rng.standard_normal(s)).astype(np.float32) for k, s in spec.shapes().items()},
    )


def moved(start: Adapter, seed: int, size: float = 0.1) -> Adapter:
    """What a client might send back."""
    step = random_adapter(start.spec, seed, size)
    return Adapter(start.spec, {k: v + step.tensors[k] for k, v in start})


def honest(
    chosen: Recipe, start: Adapter, seed: int, size: float = 0.1, number: int = 1
) -> Adapter:
    """What a client sends back that does what the recipe asks: what is frozen is as it was."""
    task = chosen.train.assignment(number)
    tensors = dict(moved(start, seed, size).tensors)
    for module in start.spec.modules:
        key_a, key_b = module.keys
        if task.sends == "core":
            left, _ = basis(start.spec, task.seed)[module.name]
            tensors[key_b] = (left @ (left.T @ tensors[key_b])).astype(np.float32)
        frozen = {"B": [key_a], "core": [key_a], "A": [key_b]}.get(task.sends, [])
        tensors |= {key: start.tensors[key] for key in frozen}
    if task.keeps == "B":
        tensors |= {tensor.key: start.tensors[tensor.key] for tensor in start.spec.others}
    return Adapter(start.spec, tensors)


def update(client: str, start: Adapter, trained: Adapter, weight: float = 1.0) -> Update:
    return Update(client, 1, start.digest, trained, weight)


def run(
    chosen: Recipe, state: GlobalState, updates: list[Update]
) -> tuple[GlobalState, AggregationReport]:
    """One aggregation: the state after it, and its report."""
    reduction = chosen.begin(state)
    for one in updates:
        reduction.add(one)
    return reduction.finish()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Distance over the size of the second; absolute if that is zero."""
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


def products(adapter: Adapter) -> dict[str, np.ndarray]:
    """s B A of every module, by the definition in the paper and nothing of the package."""
    out = {}
    for module in adapter.spec.modules:
        root = math.sqrt(module.rank) if adapter.spec.use_rslora else module.rank
        key_a, key_b = module.keys
        left = adapter.tensors[key_b].astype(np.float64)
        out[module.name] = module.alpha / root * left @ adapter.tensors[key_a].astype(np.float64)
    return out
