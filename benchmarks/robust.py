"""Distances between all clients' updates from their factors, beside dense matrices.

Run: ``python benchmarks/robust.py``. Peaks are of NumPy's allocations (tracemalloc), above what was
there before, in a run of its own; both ways get the same float32 adapters and compute in float64.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from aggregation.adapter import Adapter
from aggregation.low_rank import LowRank
from aggregation.recipes import recipe
from aggregation.robust_gram import Change, Changes
from aggregation.spec import AdapterSpec, ModuleSpec
from aggregation.state import initial_state
from aggregation.update import Update

BASE = "sha256:" + "0" * 64


def clients(width: int, rank: int, count: int, only_b: bool = False) -> Changes:
    """Updates of one square module, from a start in the middle of a training."""
    spec = AdapterSpec(BASE, (ModuleSpec("query", width, width, rank, 16.0),))
    rng = np.random.default_rng(0)

    def draw(size: float) -> dict[str, np.ndarray]:
        return {k: size * rng.standard_normal(s) for k, s in spec.shapes().items()}

    start = Adapter(spec, draw(0.1))
    changes = []
    for _ in range(count):
        step = draw(0.01)
        trained = {
            k: v if only_b and "lora_A" in k else v + step[k] for k, v in start.tensors.items()
        }
        changes.append(Change(Adapter(spec, trained), start))
    return Changes(spec, changes)


def by_factors(changes: Changes) -> np.ndarray:
    """What the robust rules do."""
    return Changes(changes.spec, changes.each).squared


def by_dense(changes: Changes) -> np.ndarray:
    """Every product multiplied out, then every pair subtracted."""
    dense = [
        (LowRank.of(one.adapter, "query") - LowRank.of(one.start, "query")).dense()
        for one in changes.each
    ]
    squared = np.zeros((len(dense), len(dense)))
    for k, one in enumerate(dense):
        for other in range(k):
            squared[k, other] = squared[other, k] = np.linalg.norm(one - dense[other]) ** 2
    return squared


def by_dense_gram(changes: Changes) -> np.ndarray:
    """Every product multiplied out, then all inner products in one multiplication."""
    rows = np.stack(
        [
            (LowRank.of(one.adapter, "query") - LowRank.of(one.start, "query")).dense().ravel()
            for one in changes.each
        ]
    )
    gram = rows @ rows.T
    sizes = np.diagonal(gram)
    return np.asarray(sizes[:, None] + sizes - 2 * gram)


def best(action: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def peak(action: Callable[[], object]) -> float:
    """Peak megabytes above the start."""
    tracemalloc.start()
    action()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found / 1e6


def compare(title: str, changes: Changes) -> None:
    reference = by_dense(changes)
    print(f"{title}: all squared distances")
    rows = {
        "dense, pair by pair (the baseline)": by_dense,
        "dense, one multiplication": by_dense_gram,
        "from factors": by_factors,
    }
    baseline = 0.0
    for name, way in rows.items():
        took = best(lambda way=way: way(changes))  # type: ignore[misc]
        baseline = baseline or took
        memory = peak(lambda way=way: way(changes))  # type: ignore[misc]
        error = np.abs(way(changes) - reference).max() / reference.max()
        print(
            f"  {name:<36} {1000 * took:8.1f} ms  {baseline / took:6.1f} x faster  "
            f"{memory:7.1f} MB  error {error:.0e}"
        )


def rounds() -> None:
    """A whole round of each rule: 50 clients, the demo's adapter."""
    modules = tuple(ModuleSpec(f"layer.{n}.query", 384, 384, 8, 16.0) for n in range(4))
    spec = AdapterSpec(BASE, modules)
    rng = np.random.default_rng(0)
    start = Adapter(spec, {k: rng.normal(0, 0.1, s) for k, s in spec.shapes().items()})
    sent = []
    for k in range(50):
        step = {key: rng.normal(0, 0.01, s) for key, s in spec.shapes().items()}
        frozen = {key: v + (0 if "lora_A" in key else step[key]) for key, v in start}
        both = {key: v + step[key] for key, v in start}
        sent.append((f"c{k}", Adapter(spec, frozen), Adapter(spec, both)))
    print("a whole round of 50 clients, 4 modules of 384 x 384, rank 8")
    baseline = 0.0
    for name in (
        "svd-warm-start",
        "norm-clip",
        "multi-krum",
        "rfa",
        "fltrust",
        "ffa-lora",
        "median",
        "trimmed-mean",
        "bulyan",
    ):
        chosen = recipe(name)

        def run(chosen=chosen) -> object:  # type: ignore[no-untyped-def]
            state = initial_state(start)
            reduction = chosen.begin(state, trusted="c0" if chosen.reduce.trusts else "")
            frozen = chosen.train.kind == "only-b"
            for client, only_b, both in sent:
                trained = only_b if frozen else both
                reduction.add(Update(client, 1, start.digest, trained, 1.0))
            return reduction.finish()

        took = best(run)
        baseline = baseline or took
        print(f"  {name:<36} {1000 * took:8.1f} ms  {took / baseline:6.2f} x  {peak(run):7.1f} MB")


def main() -> None:
    compare("1024 x 1024, 20 clients, rank 16", clients(1024, 16, 20))
    compare("the same with A frozen", clients(1024, 16, 20, only_b=True))
    rounds()


if __name__ == "__main__":
    main()
