"""What each codec costs and loses on the update of a real client, beside zlib and a plain copy.

Run: ``python benchmarks/update_codecs.py``. The update is that of MiniLM with the last two layers'
query and value adapted at rank 16 (no classification head: it is a tiny part of the bytes), after
one epoch of AdamW on 600 sentences. Relative error is that of the change: ``||arrived - trained||
/ ||trained - start||``; then that of the sum of four rounds' changes, without error feedback and
with. Throughput is of float32 values, in MB/s, the fastest of five on a vector of 8 million values
repeated from the same update; everything runs in this process.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import itertools

import numpy as np
import zstandard

from aggregation.adapter import Adapter
from aggregation.codec import Codec
from aggregation.codecs import read_codec
from aggregation.init import initial_adapter
from aggregation.parcel import pack
from clients.base import find_base
from clients.model import adapter_spec
from clients.trainer import ResidentTrainer
from clients.training import ClientJob, TrainingPlan
from simulations import datasets

CODECS = (
    "float32",
    "bfloat16",
    "float16",
    "int8",
    "int4",
    "top-k(density=0.1)",
    "top-k(density=0.01)",
    "segments(count=4)",
    "ring(clip=0.2)",
    "ring(clip=0.2, clients=100, bits=16)",
)
VALUES = 8_000_000


def trained(rounds: int) -> list[Adapter]:
    """A start, and what a client makes of it, round after round."""
    base = find_base("minilm")
    data = datasets.load("sentiment").examples.rows(range(600))
    spec = adapter_spec(base, data.label_names, rank=16, alpha=32.0, layers=(4, 5))
    at = [initial_adapter(spec, seed=1)]
    trainer = ResidentTrainer(base, threads=2)
    plan = TrainingPlan(learning_rate=1e-3, epochs=1.0, batch_size=32)
    for number in range(1, rounds + 1):
        job = ClientJob(
            client="one", run="bench", round=number, adapter=at[-1], data=data, plan=plan
        )
        (update,) = trainer.train([job])
        at.append(update.adapter)
    return at


def with_feedback(codec: Codec) -> Codec:
    text = str(codec)
    inside = text[:-1] + ", " if "(" in text else text + "("
    return read_codec(inside + "error_feedback=true)")


def lost(codec: Codec, at: list[Adapter], keys: tuple[str, ...]) -> float:
    """Relative error of the sum of all rounds' changes."""
    memory, came, wanted = None, 0.0, 0.0
    for number, (start, after) in enumerate(itertools.pairwise(at)):
        _, arrived, memory = pack(codec, after, start, keys, memory, turn=number)
        came = came + flat(arrived, keys).astype(np.float64) - flat(start, keys)
        wanted = wanted + flat(after, keys).astype(np.float64) - flat(start, keys)
    return float(np.linalg.norm(came - wanted) / np.linalg.norm(wanted))


def flat(adapter: Adapter, keys: tuple[str, ...]) -> np.ndarray:
    return np.concatenate([adapter.tensors[key].ravel() for key in keys])


def fastest(action: Callable[[], object], nbytes: int, repeats: int = 5) -> float:
    """MB/s."""
    best = min(timed(action) for _ in range(repeats))
    return nbytes / best / 1e6


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    at = trained(4)
    spec = at[0].spec
    keys = tuple(sorted(k for m in spec.modules for k in m.keys))
    step = flat(at[1], keys) - flat(at[0], keys)
    long = np.resize(step, VALUES)
    print(f"{len(step)} values, standard deviation of the change {step.std():.1e}, largest "
          f"{np.abs(step).max():.1e}")  # fmt: skip
    head = ("codec", "B/value", "zlib-6", "zstd-3", "error", "4 rounds", "+ feedback", "encode",
            "decode")  # fmt: skip
    print("{:<38}{:>8}{:>8}{:>8}{:>9}{:>10}{:>11}{:>9}{:>9}".format(*head))
    for text in CODECS:
        codec = read_codec(text)
        data = codec.encode(step)
        whole = codec.encode(long)
        row = [
            len(data) / step.size,
            len(zlib.compress(data, 6)) / step.size,
            len(zstandard.ZstdCompressor(level=3).compress(data)) / step.size,
            lost(codec, at[:2], keys),
            lost(codec, at, keys),
            0.0 if codec.lossless else lost(with_feedback(codec), at, keys),
            fastest(lambda c=codec: c.encode(long), long.nbytes),
            # decoding float32 is looking at the same bytes; a copy is the least that it can cost
            fastest(lambda c=codec, w=whole: c.decode(w, VALUES).copy(), long.nbytes),
        ]
        print(
            f"{text:<38}{row[0]:>8.3f}{row[1]:>8.3f}{row[2]:>8.3f}{row[3]:>9.1e}{row[4]:>10.1e}"
            f"{row[5]:>11.1e}{row[6]:>9.0f}{row[7]:>9.0f}"
        )
    copy = fastest(lambda: long.copy(), long.nbytes)
    small = long[: VALUES // 8].tobytes()
    squeezed = zlib.compress(small, 6)
    print(f"{'a plain copy':<38}{'':>54}{copy:>9.0f}{copy:>9.0f}")
    print(f"{'zlib-6 of the float32 bytes':<38}{'':>54}"
          f"{fastest(lambda: zlib.compress(small, 6), len(small), 1):>9.0f}"
          f"{fastest(lambda: zlib.decompress(squeezed), len(small), 1):>9.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
