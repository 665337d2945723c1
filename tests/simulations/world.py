"""A simulation of a second: a tiny random base, a hundred invented sentences, three clients."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

from simulations.scenario import Scenario, load
from tests.device.tiny import WORDS, make_base

LABELS = ("bad", "<good>")  # a name that a careless report would not escape


def make_world(folder: Path) -> Path:
    """Write base, data and scenario; gives the scenario's path."""
    base = folder / "tiny-base"
    base.mkdir()
    make_base(base)
    draw = random.Random(5)  # noqa: S311 - no secret
    with (folder / "rows.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("text", "label", "shop"))
        for number in range(120):
            words = draw.choices(WORDS, k=draw.randint(3, 9))
            words.append("good" if number % 2 else "bad")
            text = f"{' '.join(words)} {number}"
            table.writerow((text, LABELS[number % 2], f"shop {number % 5}"))
    scenario = folder / "tiny.toml"
    scenario.write_text(
        f"""
seed = 3
[base]
name = "{base}"
[data]
path = "rows.csv"
labels = ["bad", "<good>"]
heldout = 0.25
[partition]
scheme = "dirichlet"
clients = 3
min_examples = 12
[train]
rank = 2
layers = 1
batch_size = 8
learning_rate = 0.01
max_length = 16
[privacy]
noise_multiplier = 0.8
delta = 1e-3
[federation]
rounds = 3
"""
    )
    return scenario


def world_scenario(path: Path, *overrides: str, **arguments: Any) -> Scenario:
    """The scenario of :func:`make_world`."""
    return load(path, overrides=overrides, **arguments)
