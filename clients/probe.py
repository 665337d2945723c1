"""Trying an adapter before it serves: does it answer, and is it worse on this device's own data?

The device's held-out examples never leave it; what leaves is an accuracy. The probe runs in small
batches through the same runtime that serves, so that requests interleave with it.

    before = measure(runtime, runtime.pin(), held_out)
    after = measure(runtime, candidate, held_out)
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.data import read_examples
from clients.errors import ClientError
from clients.runtime import AdapterVersion, Prediction, Request, Runtime

BATCH = 8
TIMED = 5  # single requests whose median is the latency
SELF_TEST = ("The first sentence of a self-test.", "And a second one, rather different!")


class SelfTestError(ClientError):
    """An adapter that loads but does not answer with finite scores for its classes."""


@dataclass(frozen=True)
class HeldOut:
    """The device's own labelled texts.

    Attributes:
        texts: the texts.
        labels: their classes, by name or by decimal index.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise ValueError(f"{len(self.texts)} texts but {len(self.labels)} labels")

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes that occur, sorted."""
        return tuple(sorted(set(self.labels)))

    @classmethod
    def read(cls, path: Path, *, text: str = "text", label: str = "label", limit: int) -> HeldOut:
        """Read a ``.jsonl``, ``.csv`` or ``.tsv`` file; the first ``limit`` examples are used.

        Raises:
            DataError: file missing, empty, or without the columns.
        """
        found = read_examples(path, text=text, label=label)
        names = tuple(found.label_names[index] for index in found.labels)
        return cls(found.texts[:limit], names[:limit])

    def truth(self, classes: tuple[str, ...]) -> tuple[str, ...] | None:
        """Each text's class in an adapter's own words; None if they are other classes altogether.

        >>> HeldOut(("a", "b"), ("1", "0")).truth(("negative", "positive"))
        ('positive', 'negative')
        >>> HeldOut(("a",), ("cat",)).truth(("negative", "positive")) is None
        True
        """
        if set(self.labels) <= set(classes):
            return self.labels
        if all(label.isdecimal() and int(label) < len(classes) for label in self.labels):
            return tuple(classes[int(label)] for label in self.labels)
        return None


@dataclass(frozen=True)
class Measurement:
    """What one version scores on held-out examples.

    Attributes:
        examples: how many were used.
        accuracy: share answered with the right class, 0 to 1.
        latency_ms: median of a few single requests.
        right: for each example, whether it was answered rightly; empty if nothing was asked.
    """

    examples: int
    accuracy: float
    latency_ms: float
    right: tuple[bool, ...] = ()


def self_test(runtime: Runtime, version: AdapterVersion) -> None:
    """Ask a version two fixed questions.

    Raises:
        SelfTestError: no finite score for each of its classes.
    """
    predictions = runtime.run([Request(text, version) for text in SELF_TEST])
    if len(predictions) != len(SELF_TEST):
        raise SelfTestError(f"{version.name}: {len(predictions)} answers to {len(SELF_TEST)} texts")
    for prediction in predictions:
        _check(prediction, version)


def measure(
    runtime: Runtime,
    version: AdapterVersion,
    held_out: HeldOut,
    *,
    batch: int = BATCH,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement | None:
    """Accuracy and latency of a version; None if it knows other classes than the examples do.

    Args:
        runtime: the engine that serves.
        version: loaded, live or not.
        held_out: the device's own examples.
        batch: texts in one call, small for the sake of served requests.
        clock: seconds.

    Raises:
        SelfTestError: a score is not finite.
    """
    truth = held_out.truth(version.labels)
    if truth is None or not held_out.texts:
        return None
    right: list[bool] = []
    for start in range(0, len(truth), batch):
        texts = held_out.texts[start : start + batch]
        answers = runtime.run([Request(text, version) for text in texts])
        for prediction, expected in zip(answers, truth[start:], strict=False):
            _check(prediction, version)
            right.append(prediction.label == expected)
    latency = measure_latency(runtime, version, held_out, clock=clock)
    return Measurement(len(truth), sum(right) / len(truth), latency, tuple(right))


def measure_latency(
    runtime: Runtime,
    version: AdapterVersion,
    held_out: HeldOut,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median time of a few single requests, in milliseconds."""
    return latency_of(runtime, version, held_out.texts, clock=clock)


def latency_of(
    runtime: Runtime,
    version: AdapterVersion,
    texts: Sequence[str],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median time of single requests with the first few of these texts, in milliseconds."""
    times = []
    for text in texts[:TIMED]:
        start = clock()
        runtime.run([Request(text, version)])
        times.append(1000.0 * (clock() - start))
    return statistics.median(times) if times else 0.0


def _check(prediction: Prediction, version: AdapterVersion) -> None:
    scores = [prediction.scores.get(label, math.nan) for label in version.labels]
    if prediction.version is not version or not all(map(math.isfinite, scores)):
        raise SelfTestError(f"{version.name}: a score is missing or not finite")
