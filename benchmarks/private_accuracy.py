"""What privacy costs in accuracy on the real task, and which lever buys how much of it back.

Run: ``python benchmarks/private_accuracy.py`` (about three quarters of an hour on two cores;
``--quick`` in three for a look at the tables; ``--json FILE`` keeps every single run, and the same
command goes on where it was interrupted; ``--figure FILE`` draws; ``--rows`` and ``--seeds`` for
longer settings).

The task is that of ``scenarios/demo.toml``: the shipped sentences, twenty clients with very
different classes and sizes (Dirichlet 0.5), MiniLM's upper layer, and epsilon for each example of
each client over the whole run (delta 1e-5, ``pld``). Clipping norm and learning rates are chosen
for each recipe, once for all budgets and once without privacy, **on a quarter of the sentences that
no client of the table has**, split among fewer clients of the same size. The table is of the other
three quarters: means over three seeds (partition, held-out tenth, initialisation, noise), "spread"
is the largest minus the smallest.

The levers are taken away one at a time from the setting of the table, at epsilon 8, on the quarter
for choosing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from _trials import Document, Result, Trials

RECIPES = ("fedit", "ffa-lora", "fedsvd")
BUDGETS: tuple[float | None, ...] = (None, 8.0, 3.0, 1.0)
SEEDS = (1, 2, 3)
TUNING_SEED = 100
LEVER_RECIPE = "ffa-lora"
MORE_STEPS = 15  # a round, instead of 5
# Clip, rate of the factors, rate of the head.
PRIVATE = [(c, f, h) for c in (1.0, 3.0) for f, h in ((5e-4, 0.1), (2e-3, 0.1), (2e-3, 0.03))]
PLAIN = [(None, f, h) for f, h in ((5e-4, 0.01), (2e-3, 0.01), (2e-3, 0.003))]

Setting = tuple[float | None, float, float]
SCENARIO: Document = {
    "name": "private-accuracy",
    "data": {"text": "text", "label": "label", "labels": ["negative", "positive"]},
    "partition": {"scheme": "dirichlet", "alpha": 0.5, "min_examples": 50},
    "train": {
        "rank": 8,
        "alpha": 16.0,
        "layers": 1,
        "optimizer": "adamw",
        "sample_rate": 0.1,
        "steps": 5,
        "max_length": 32,
    },
    "privacy": {"delta": 1e-5, "accountant": "pld"},
    "federation": {"rounds": 5, "deadline_seconds": 3600.0},
}
# What each lever is without, as changes of the setting of the table.
LEVERS: Mapping[str, Mapping[str, Any]] = {
    "the setting of the table": {},
    "both factors are trained": {"federation.recipe": "fedit"},
    "two layers are adapted, not one": {"train.layers": 2},
    "the head learns at the rate of the factors": {"train.head_learning_rate": None},
    "batches of 32, not a tenth of the rows": {"train.sample_rate": None, "train.batch_size": 32},
    "ten rounds, not five": {"federation.rounds": 10},
    "two rounds, not five": {"federation.rounds": 2},
    "clients of half the size": {"partition.clients": 10},
    "the accountant is rdp": {"privacy.accountant": "rdp"},
    "clip 3": {"privacy.max_grad_norm": 3.0},
    "clip 0.3": {"privacy.max_grad_norm": 0.3},
    "server momentum 0.5": {"federation.pieces": {"optimise": "momentum(beta=0.5)"}},
    "batches of 32, two layers, both factors, one rate, ten rounds, rdp": {
        "federation.recipe": "fedit",
        "federation.rounds": 10,
        "train.layers": 2,
        "train.learning_rate": 1e-3,
        "train.head_learning_rate": None,
        "train.sample_rate": None,
        "train.batch_size": 32,
        "privacy.accountant": "rdp",
        "privacy.max_grad_norm": 1.0,
    },
}


def data(where: Path, rows: int) -> None:
    """A quarter of the shipped sentences for choosing, the rest for the table, as two files."""
    import numpy as np

    from simulations import datasets

    found = datasets.load("sentiment")
    order = np.random.default_rng(0).permutation(len(found.labels))
    order = order[: rows or None]
    cut = len(order) // 4
    names = found.examples.label_names
    for name, part in (("choosing", order[:cut]), ("table", order[cut:])):
        with (where / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow(["text", "label"])
            lines.writerows(
                (found.examples.texts[i], names[found.labels[i]]) for i in part.tolist()
            )


def document(
    recipe: str,
    budget: float | None,
    setting: Setting,
    seed: int,
    *,
    table: bool,
    changes: Mapping[str, Any] | None = None,
) -> Document:
    """One run as a scenario."""
    clip, factors, head = setting
    made: Document = json.loads(json.dumps(SCENARIO))
    made["seed"] = seed
    made["data"] |= {"path": "table" if table else "choosing", "heldout": 0.1 if table else 0.3}
    made["partition"]["clients"] = 20 if table else 5
    made["federation"]["recipe"] = recipe
    made["train"] |= {"learning_rate": factors, "head_learning_rate": head}
    if budget is None:
        del made["privacy"]
    else:
        made["privacy"] |= {"epsilon": budget, "max_grad_norm": clip}
    for key, value in (changes or {}).items():
        section, _, name = key.partition(".")
        made[section][name] = value
        if value is None:
            del made[section][name]
    return made


def run(where: Path, made: Document) -> Result:
    """One simulation, in this process; what the base computes below the adapters is kept."""
    from simulations.run import simulate
    from simulations.scenario import parse

    made = json.loads(json.dumps(made))
    made["data"]["path"] = str(where / f"{made['data']['path']}.csv")
    with tempfile.TemporaryDirectory() as folder:
        last = simulate(parse(made), Path(folder) / "run").metrics[-1]
    return {"accuracy": last["accuracy"], "loss": last["loss"]}


def choose(trials: Trials, recipes: tuple[str, ...]) -> dict[tuple[str, bool], Setting]:
    """The best setting of each recipe, with privacy (at epsilon 3) and without."""
    asked = [
        (r, b, s) for r in recipes for b, grid in ((3.0, PRIVATE), (None, PLAIN)) for s in grid
    ]
    found = trials.all(document(r, b, s, TUNING_SEED, table=False) for r, b, s in asked)
    best: dict[tuple[str, bool], tuple[float, float, Setting]] = {}
    for (r, b, s), end in zip(asked, found, strict=True):
        key, value = (r, b is not None), (end["accuracy"], -end["loss"], s)
        best[key] = max(best.get(key, value), value, key=lambda v: v[:2])
    return {key: value[2] for key, value in best.items()}


Cells = dict[tuple[str, float | None], list[float]]


def compare(
    trials: Trials,
    best: Mapping[tuple[str, bool], Setting],
    recipes: tuple[str, ...],
    seeds: tuple[int, ...],
) -> Cells:
    """Accuracy in per cent, by recipe and budget, a number for each seed."""
    asked = [(r, b, s) for r in recipes for b in BUDGETS for s in seeds]
    found = trials.all(document(r, b, best[r, b is not None], s, table=True) for r, b, s in asked)
    cells: Cells = {}
    for (r, b, _), end in zip(asked, found, strict=True):
        cells.setdefault((r, b), []).append(100 * end["accuracy"])
    return cells


def table(best: Mapping[tuple[str, bool], Setting], cells: Cells) -> Iterator[str]:
    """The lines of the table, in Markdown."""
    yield "| recipe | epsilon | clip | rate, of the head | accuracy | spread | lost |"
    yield "|---|---|---|---|---|---|---|"
    for (recipe, budget), found in cells.items():
        clip, factors, head = best[recipe, budget is not None]
        lost = fmean(cells[recipe, None]) - fmean(found)
        yield (
            f"| `{recipe}` | {'none' if budget is None else f'{budget:g}'} "
            f"| {'' if clip is None else f'{clip:g}'} | {factors:g}, {head:g} | {fmean(found):.1f} "
            f"| {max(found) - min(found):.1f} | {'' if budget is None else f'{lost:.1f}'} |"
        )


def longer(trials: Trials, recipe: str, setting: Setting, seeds: tuple[int, ...]) -> str:
    """What is there to be had without privacy by more steps, which privacy would make dear."""
    changes = {"train.steps": MORE_STEPS}
    found = trials.all(
        document(recipe, None, setting, s, table=True, changes=changes) for s in seeds
    )
    own = [100 * end["accuracy"] for end in found]
    return (
        f"`{recipe}` without privacy, {MORE_STEPS} steps a round: {fmean(own):.1f} "
        f"(spread {max(own) - min(own):.1f})"
    )


def levers(trials: Trials, setting: Setting, seeds: tuple[int, ...]) -> Iterator[str]:
    """The lines of the table of levers, in Markdown."""
    seeds = tuple(TUNING_SEED + seed for seed in seeds)
    found = trials.all(
        document(LEVER_RECIPE, 8.0, setting, s, table=False, changes=c)
        for c in LEVERS.values()
        for s in seeds
    )
    yield "| instead | accuracy | spread | against the table's |"
    yield "|---|---|---|---|"
    parts = [found[i : i + len(seeds)] for i in range(0, len(found), len(seeds))]
    whole = fmean(100 * end["accuracy"] for end in parts[0])
    for name, ends in zip(LEVERS, parts, strict=True):
        own = [100 * end["accuracy"] for end in ends]
        yield (
            f"| {name} | {fmean(own):.1f} | {max(own) - min(own):.1f} | {fmean(own) - whole:+.1f} |"
        )


def draw(cells: Cells, to: Path) -> None:
    """Accuracy over epsilon, each seed a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    places = {budget: place for place, budget in enumerate(reversed(BUDGETS))}
    for number, recipe in enumerate(dict.fromkeys(r for r, _ in cells)):
        mine = {b: found for (r, b), found in cells.items() if r == recipe}
        at = [places[b] + 0.08 * (number - 1) for b in mine]
        line = axes.plot(at, [fmean(found) for found in mine.values()], marker="_", label=recipe)
        for x, found in zip(at, mine.values(), strict=True):
            axes.plot([x] * len(found), found, ".", color=line[0].get_color(), alpha=0.6)
    axes.set_xticks(list(places.values()), ["none" if b is None else f"{b:g}" for b in places])
    axes.set(xlabel="epsilon, for one example of one client", ylabel="accuracy, per cent")
    axes.legend(frameon=False)
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)


def main() -> int:
    """Choose, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny runs: shows the tables only")
    parser.add_argument("--json", type=Path, help="keep every run in this file, and go on from it")
    parser.add_argument("--figure", type=Path, help="draw the table here (.svg, .png)")
    parser.add_argument("--rows", type=int, default=0, help="use so many sentences; 0 for all")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many runs of each cell")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    asked = parser.parse_args()
    rows = 4000 if asked.quick else asked.rows
    if rows:
        SCENARIO["name"] += f"-{rows}"  # results of other rows are other results
    recipes = (LEVER_RECIPE,) if asked.quick else RECIPES
    seeds = SEEDS[:1] if asked.quick else tuple(range(1, asked.seeds + 1))
    with tempfile.TemporaryDirectory() as name:
        data(Path(name), rows)
        with Trials(partial(run, Path(name)), asked.json, asked.processes) as trials:
            best = choose(trials, recipes)
            cells = compare(trials, best, recipes, seeds)
            print("\n".join(table(best, cells)), end="\n\n", flush=True)
            print(
                longer(trials, recipes[0], best[recipes[0], False], seeds), end="\n\n", flush=True
            )
            print("\n".join(levers(trials, best[LEVER_RECIPE, True], seeds)))
    if asked.figure:
        draw(cells, asked.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
