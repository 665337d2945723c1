"""Time and memory of combining updates, beside Flower's own averaging and beside a dense SVD.

Run: ``python benchmarks/reduction.py``; a minute or two. Times are CPU seconds on one thread, the
least of interleaved repeats in this one process, so ratios mean something on a busy machine too.
Peaks are of NumPy's allocations (tracemalloc), above what was there before.

Ours is what a server does with updates as they come: unpack the vector, all checks (finite, bounds,
shape, weight, start, duplicates, frozen factors), sum, refactor. Flower's is
``aggregate_arrayrecords``, which has no such checks, over a list of all records: with the arrays by
name, as PEFT names them and Flower's examples send them, and packed into one vector, which is our
own format and far better for it.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

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
from aggregation.state import GlobalState, initial_state
from aggregation.update import Update

BASE = "sha256:" + "0" * 64
Vectors = Callable[[], Iterator[bytes]]


def small() -> AdapterSpec:
    """The default adapter of the demo: query and value of two layers, width 384, and a head."""
    modules = tuple(
        ModuleSpec(f"encoder.layer.{layer}.attention.self.{name}", 384, 384, 8, 16.0)
        for layer in (4, 5)
        for name in ("query", "value")
    )
    head = (TensorSpec("classifier.weight", (2, 384)), TensorSpec("classifier.bias", (2,)))
    return AdapterSpec(BASE, modules, head)


def large(width: int, modules: int) -> AdapterSpec:
    return AdapterSpec(
        BASE, tuple(ModuleSpec(f"layer.{k}.query", width, width, 16, 16.0) for k in range(modules))
    )


def trained(start: Adapter, count: int) -> Iterator[bytes]:
    """What clients send that have moved each its own way: packed float32 vectors."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        noise = rng.standard_normal(start.spec.size, dtype=np.float32)
        yield (start.pack() + np.float32(0.01) * noise).tobytes()


def flower(spec: AdapterSpec, vectors: Iterator[bytes], *, named: bool) -> float:
    """Flower's averaging of all of them; CPU seconds."""
    records = []
    for k, data in enumerate(vectors):
        vector = np.frombuffer(data, np.float32)
        arrays = {"adapter": vector}
        if named:
            layout = spec.layout.items()
            arrays = {key: vector[a:b].reshape(shape) for key, (a, b, shape) in layout}
        content = ArrayRecord({key: Array(value) for key, value in arrays.items()})
        metrics = MetricRecord({"num-examples": 1.0 + k % 7})
        records.append(RecordDict({"arrays": content, "metrics": metrics}))
    return seconds(lambda: aggregate_arrayrecords(records, "num-examples"))


def ours(name: str, state: GlobalState, vectors: Iterator[bytes], *, measure: bool = True) -> float:
    """The same by a recipe, one update at a time; CPU seconds without those for making updates."""
    reduction, took = recipe(name).begin(state, measure=measure), 0.0
    spec, start = state.adapter.spec, state.adapter.digest
    for k, data in enumerate(vectors):
        began = time.process_time()
        adapter = Adapter.unpack(spec, np.frombuffer(data, np.float32))
        reduction.add(Update(f"c{k}", 1, start, adapter, 1.0 + k % 7))
        took += time.process_time() - began
    return took + seconds(reduction.finish)


def seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def peak(action: Callable[[], object]) -> float:
    """Peak megabytes above the start."""
    tracemalloc.start()
    action()
    megabytes = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return megabytes


def contestants(state: GlobalState) -> dict[str, Callable[[Iterator[bytes]], float]]:
    spec = state.adapter.spec
    return {
        "Flower, arrays by name": lambda v: flower(spec, v, named=True),
        "Flower, packed into one vector": lambda v: flower(spec, v, named=False),
        "fedit, not measured": lambda v: ours("fedit", state, v, measure=False),
        "fedit, with its error": lambda v: ours("fedit", state, v),
        "svd-warm-start": lambda v: ours("svd-warm-start", state, v),
        "raflora": lambda v: ours("raflora", state, v),
    }


def averages(title: str, state: GlobalState, counts: tuple[int, ...], repeats: int) -> float:
    """A table of all contestants; CPU seconds of svd-warm-start."""
    start, runs = state.adapter, contestants(state)
    print(f"{title} ({start.spec.size:,} values in {len(start.tensors)} arrays)")
    took = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            took[name] = min(took[name], run(trained(start, counts[-1])))
    by_name, packed, *_ = took.values()
    columns = "".join(f"{n:>9}" for n in counts)
    print(f"  {'':<32}{'CPU s':>7}{'by name':>9}{'packed':>8}   peak MB, clients:{columns}")
    for name, run in runs.items():
        peaks = "".join(f"{peak(lambda n=n: run(trained(start, n))):9.1f}" for n in counts)  # type: ignore[misc]  # noqa: B023
        ratios = f"{took[name] / by_name:8.2f}x{took[name] / packed:7.2f}x"
        print(f"  {name:<32}{took[name]:7.3f}{ratios}   {'':>17}{peaks}")
    return took["svd-warm-start"]


def stacks(width: int) -> dict[str, LowRank]:
    """The mean of 10 clients of rank 16: far from each other, and near a common start."""
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((width, 16)), rng.standard_normal((16, width))
    far = near = LowRank.zero(width, width)
    for _ in range(10):
        move = LowRank(rng.standard_normal((width, 16)), rng.standard_normal((16, width)))
        far += 0.1 * move
        near += 0.1 * LowRank(left + 0.01 * move.B, right + 0.01 * move.A)
    return {"unrelated factors": far, "factors near one start": near}


def svd_against_dense() -> None:
    print("Exact SVD of the mean of 10 updates, r = 16, against the dense product and its SVD")
    print(f"  {'':<36}{'dense s':>9}{'ours s':>9}{'faster':>9}   {'peak MB':>8}{'dense':>8}")
    for width in (512, 1024):
        for kind, stack in stacks(width).items():

            def dense(stack: LowRank = stack) -> object:
                return np.linalg.svd(stack.B @ stack.A, full_matrices=False)

            def used(stack: LowRank = stack) -> object:
                return stack.svd(16 + 64)

            print(f"  {width} x {width}, {kind}:")
            slow = min(seconds(dense) for _ in range(3))
            for what, thin in (("all singular vectors", stack.svd), ("16 + 64 of them", used)):
                fast = min(seconds(thin) for _ in range(9))
                print(
                    f"    {what:<34}{slow:9.3f}{fast:9.4f}{slow / fast:8.0f}x   "
                    f"{peak(thin):8.1f}{peak(dense):8.1f}"
                )


def one_large_module() -> None:
    print("One 8192 x 8192 module, r = 16, 20 clients, svd-warm-start")
    state = initial_state(initial_adapter(large(8192, 1), 0))

    def run() -> float:
        return ours("svd-warm-start", state, trained(state.adapter, 20))

    took, megabytes, one = run(), peak(run), 8 * 8192**2 / 1e6
    print(
        f"  {took:.2f} CPU s, peak {megabytes:.0f} MB: {megabytes / one:.2f} of one dense matrix "
        f"({one:.0f} MB)"
    )


def many_large_modules() -> None:
    state = initial_state(initial_adapter(large(4096, 64), 0))
    ours_took = averages("10 updates of 64 modules of 4096 x 4096, r = 16", state, (10,), 1)
    one, stack = large(4096, 1), LowRank.zero(4096, 4096)
    for data in trained(initial_adapter(one, 0), 10):
        adapter = Adapter.unpack(one, np.frombuffer(data, np.float32))
        stack += 0.1 * LowRank.of(adapter, one.modules[0].name)
    naive = 64 * seconds(lambda: np.linalg.svd(stack.B @ stack.A, full_matrices=False))
    print(
        f"  dense product and SVD            {naive:7.0f} s, extrapolated from one module of 64: "
        f"{naive / ours_took:.0f} times svd-warm-start"
    )


def main() -> None:
    state = initial_state(initial_adapter(small(), 0))
    averages("1,000 updates of the default adapter", state, (20, 500, 1000), 3)
    svd_against_dense()
    one_large_module()
    many_large_modules()


if __name__ == "__main__":
    main()
