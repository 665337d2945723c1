"""Measuring the global adapter on the rows that no client has, class by class.

Each class is measured by itself and the whole is their weighted mean: one pass gives both, and a
class that a skewed federation forgets shows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from aggregation.adapter import Adapter
from clients.data import Examples
from clients.trainer import Trainer

CLASS_PREFIX = "accuracy:"


def by_class(
    trainer: Trainer, heldout: Examples, *, max_length: int
) -> Callable[[Adapter, tuple[Adapter, ...]], Mapping[str, float]]:
    """A function that measures an adapter, with those that belong beside it.

    Args:
        trainer: evaluates one set of examples.
        heldout: the rows.
        max_length: tokens of a text that are read.

    Returns:
        a function to ``accuracy``, ``loss`` (nats), ``examples``, and ``accuracy:<class>`` for
        every class that occurs.
    """
    labels = np.asarray(heldout.labels)
    parts = []
    for index, name in enumerate(heldout.label_names):
        rows = np.flatnonzero(labels == index).tolist()
        if rows:
            texts = tuple(heldout.texts[row] for row in rows)
            parts.append((name, Examples(texts, (index,) * len(rows), heldout.label_names)))

    def measure(adapter: Adapter, beside: tuple[Adapter, ...] = ()) -> Mapping[str, float]:
        right = loss = 0.0
        metrics: dict[str, float] = {}
        for name, examples in parts:
            one = trainer.evaluate(adapter, examples, max_length=max_length, beside=beside)
            metrics[CLASS_PREFIX + name] = one.accuracy
            right += one.accuracy * one.examples
            loss += one.loss * one.examples
        total = len(heldout)
        return {"accuracy": right / total, "loss": loss / total, "examples": total, **metrics}

    return measure
