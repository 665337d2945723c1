"""Time and memory of combining many updates, beside Flower's own averaging and a dense SVD.

Run: ``python benchmarks/reduction.py``. Peaks are of NumPy's allocations (tracemalloc), above what
was there before; updates are made one by one, as they come from a network.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from aggregation.adapter import Adapter
from aggregation.init import initial_adapter
from aggregation.low_rank import LowRank
from aggregation.recipes import recipe
from aggregation.spec import AdapterSpec, ModuleSpec, TensorSpec
from aggregation.state import initial_state
from aggregation.update import Update

BASE = "sha256:" + "0" * 64


def small() -> AdapterSpec:
    """The default adapter of the demo: query and value of two layers, width 384, and a head."""
    modules = tuple(
        ModuleSpec(f"encoder.layer.{layer}.attention.self.{name}", 384, 384, 8, 16.0)
        for layer in (4, 5)
        for name in ("query", "value")
    )
    head = (TensorSpec("classifier.weight", (2, 384)), TensorSpec("classifier.bias", (2,)))
    return AdapterSpec(BASE, modules, head)


def trained(spec: AdapterSpec, start: Adapter, count: int) -> Iterator[Adapter]:
    """Different trained adapters, one at a time, cheaply."""
    rng = np.random.default_rng(0)
    noise = (0.01 * rng.standard_normal(spec.size + count)).astype(np.float32)
    origin = start.pack()
    for k in range(count):
        yield Adapter.unpack(spec, origin + noise[k : k + spec.size])


def ours(name: str, measure: bool = True) -> Callable[[int], float]:
    """Aggregate a number of updates; seconds, without those for making the updates."""
    spec = small()
    state = initial_state(initial_adapter(spec, 0))

    def run(count: int) -> float:
        reduction, took = recipe(name).begin(state, measure=measure), 0.0
        for k, adapter in enumerate(trained(spec, state.adapter, count)):
            update = Update(f"c{k}", 1, state.adapter.digest, adapter, 1.0 + k % 7)
            took += seconds(lambda u=update: reduction.add(u))  # type: ignore[misc]
        return took + seconds(reduction.finish)

    return run


def flower(count: int) -> float:
    """The same by Flower: a list of records, each with the adapter as one packed array."""
    spec = small()
    records = []
    for k, adapter in enumerate(trained(spec, initial_adapter(spec, 0), count)):
        arrays = ArrayRecord({"adapter": Array(adapter.pack())})
        metrics = MetricRecord({"num-examples": 1.0 + k % 7})
        records.append(RecordDict({"arrays": arrays, "metrics": metrics}))
    return seconds(lambda: aggregate_arrayrecords(records, "num-examples"))


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def peak(action: Callable[[], object]) -> float:
    """Peak megabytes above the start."""
    tracemalloc.start()
    action()
    megabytes = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return megabytes


def many_updates() -> None:
    count, counts = 1000, (20, 500, 1000)
    print(f"{count} updates of the default adapter ({small().size:,} values each)")
    runs: dict[str, Callable[[int], float]] = {
        "Flower's aggregate_arrayrecords": flower,
        "fedit, not measured": ours("fedit", measure=False),
        "fedit, with its error": ours("fedit"),
        "svd-warm-start": ours("svd-warm-start"),
    }
    baseline = 0.0
    columns = "".join(f"{n:>8}" for n in counts)
    print(f"  {'':<34} {'seconds':>8} {'ratio':>7}   peak MB for clients:{columns}")
    for name, run in runs.items():
        took = min(run(count) for _ in range(2))
        baseline = baseline or took
        peaks = "".join(f"{peak(lambda n=n: run(n)):8.1f}" for n in counts)  # type: ignore[misc]  # noqa: B023
        print(f"  {name:<34} {took:8.3f} {took / baseline:6.2f}x   {'':>20}{peaks}")


def svd_against_dense() -> None:
    print("Exact SVD of a mean of 10 updates, r = 16")
    for width in (512, 1024):
        rng = np.random.default_rng(0)
        stacked = LowRank.zero(width, width)
        for _ in range(10):
            stacked += LowRank(rng.standard_normal((width, 16)), rng.standard_normal((16, width)))
        thin = min(seconds(stacked.svd) for _ in range(3))
        matrix = stacked.dense()
        dense = seconds(lambda m=matrix: np.linalg.svd(m, full_matrices=False))  # type: ignore[misc]
        print(
            f"  {width} x {width}: dense {dense:6.2f} s, stacked factors {thin:6.3f} s, "
            f"{dense / thin:5.0f} times faster"
        )


def large_modules() -> None:
    print("Memory of one 8192 x 8192 module, r = 16, 20 clients, svd-warm-start")
    spec = AdapterSpec(BASE, (ModuleSpec("layer.query", 8192, 8192, 16, 16.0),))
    state = initial_state(initial_adapter(spec, 0))

    def run() -> None:
        reduction = recipe("svd-warm-start").begin(state)
        for k, adapter in enumerate(trained(spec, state.adapter, 20)):
            reduction.add(Update(f"c{k}", 1, state.adapter.digest, adapter, 1.0))
        reduction.finish()

    megabytes, one = peak(run), 8 * 8192**2 / 1e6
    print(f"  peak {megabytes:.0f} MB, {megabytes / one:.2f} of one dense matrix ({one:.0f} MB)")


def main() -> None:
    many_updates()
    svd_against_dense()
    large_modules()


if __name__ == "__main__":
    main()
