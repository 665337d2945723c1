"""Does the algebra matter for learning? The recipes on the real task, under skew, with mixed ranks.

Run: ``python benchmarks/recipes.py`` (about twenty minutes on two idle cores; ``--quick`` in
two minutes for a look at the table; ``--json FILE`` keeps every single run, and the same command
goes on where it was interrupted).

Ten clients with very different classes and sizes (Dirichlet 0.3) train MiniLM's upper layer on
3,200 sentences. Recipes that take mixed ranks have clients of rank 4, 8 and 16; the others have
rank 8 everywhere, and the table says which. Each recipe gets the learning rate of the factors, out
of four, that did best on a partition of its own (another seed), which is not in the table. The
table shows the mean over three seeds: each is another partition, another held-out set and another
initialisation; "spread" is the largest minus the smallest of the three.

On 800 held-out sentences one standard error is about 1.6 points. What lies within the spread is
no difference.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from _trials import Document, Result, Trials

from aggregation.recipes import RECIPES

CHOSEN = (
    "svd-warm-start",
    "fedit",
    "ffa-lora",
    "rolora",
    "fedsvd",
    "fed-sb",
    "flora",
    "fedex-lora",
    "raflora",
    "hetlora",
)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SEEDS = (1, 2, 3)
TUNING_SEED = 100
SCENARIO: dict[str, Any] = {
    "name": "recipes",
    "data": {"dataset": "sentiment", "rows": 4000, "heldout": 0.2},
    "partition": {"scheme": "dirichlet", "alpha": 0.3, "clients": 10, "min_examples": 40},
    "train": {
        "alpha": 16.0,
        "layers": 1,
        "optimizer": "adamw",
        "head_learning_rate": 0.01,
        "batch_size": 32,
        "steps": 6,
        "max_length": 24,
    },
    "federation": {"rounds": 8},
}


def run(made: Document) -> Result:
    """One simulation, in this process; what the base computes below the adapters is kept.

    Returns:
        ``accuracy`` and ``loss`` (nats) on the held-out sentences after the last round, ``before``
        the accuracy before the first; ``up`` and ``down``, the bytes that a client sent and got in
        a round, on average; ``error``, the relative aggregation error of a round, on average.
    """
    from simulations.run import simulate
    from simulations.scenario import parse

    with tempfile.TemporaryDirectory() as folder:
        lines = simulate(parse(made), Path(folder) / "run").metrics
    trained = [line for line in lines if line["used"]]
    clients = sum(line["used"] for line in trained)
    return {
        "accuracy": lines[-1]["accuracy"],
        "loss": lines[-1]["loss"],
        "before": lines[0]["accuracy"],
        "up": sum(line["bytes_up"] for line in trained) / clients,
        "down": sum(line["bytes_down"] for line in trained) / clients,
        "error": fmean(line["aggregation_error"] for line in trained),
    }


def document(recipe: str, rate: float, seed: int, quick: bool) -> Document:
    """One run as a scenario."""
    made: Document = json.loads(json.dumps(SCENARIO))
    made["seed"] = seed
    made["federation"]["recipe"] = recipe
    made["train"]["learning_rate"] = rate
    key, value = ("ranks", [4, 8, 16]) if mixed(recipe) else ("rank", 8)
    made["train"][key] = value
    if quick:
        made["data"]["rows"] = 1200
        made["federation"]["rounds"] = made["train"]["steps"] = 2
    return made


def mixed(recipe: str) -> bool:
    """Whether the recipe takes clients of different ranks."""
    return bool(RECIPES[recipe].describe()["mixed_ranks"])


def table(found: Mapping[str, list[Result]], best: Mapping[str, float]) -> Iterator[str]:
    """The lines of the table, in Markdown."""
    yield "| recipe | ranks | rate | accuracy | spread | loss | error | up kB | down kB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for recipe, own in found.items():
        each = [100 * t["accuracy"] for t in own]
        yield (
            f"| `{recipe}` | {'4, 8, 16' if mixed(recipe) else '8'} | {best[recipe]:g} "
            f"| {fmean(each):.1f} | {max(each) - min(each):.1f} "
            f"| {fmean(t['loss'] for t in own):.3f} | {fmean(t['error'] for t in own):.3f} "
            f"| {fmean(t['up'] for t in own) / 1000:.1f} "
            f"| {fmean(t['down'] for t in own) / 1000:.1f} |"
        )


def main() -> int:
    """Tune, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny runs: shows the table only")
    parser.add_argument("--json", type=Path, help="keep every run in this file, and go on from it")
    parser.add_argument("--recipes", default=",".join(CHOSEN), help="names, with commas")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    asked = parser.parse_args()
    names = asked.recipes.split(",")
    rates, seeds = (RATES[:2], SEEDS[:2]) if asked.quick else (RATES, SEEDS)
    with Trials(run, asked.json, asked.processes) as trials:
        grid = [(name, rate) for name in names for rate in rates]
        tried = trials.all(document(*one, TUNING_SEED, asked.quick) for one in grid)
        score = {one: (end["accuracy"], -end["loss"]) for one, end in zip(grid, tried, strict=True)}
        best = {name: max(rates, key=lambda rate: score[name, rate]) for name in names}
        ends = trials.all(
            document(name, best[name], seed, asked.quick) for name in names for seed in seeds
        )
    found = {name: ends[i * len(seeds) : (i + 1) * len(seeds)] for i, name in enumerate(names)}
    before = 100 * fmean(end["before"] for end in ends)
    print(f"accuracy before training {before:.1f}; {len(seeds)} seeds; rates tried {rates}\n")
    print("\n".join(table(found, best)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
