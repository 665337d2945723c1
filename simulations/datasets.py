"""The rows that a simulation trains on: the data set that is shipped, or the user's own file.

    >>> data = load("sentiment")
    >>> len(data.examples), data.examples.label_names
    (19410, ('negative', 'positive'))

A data set becomes one ``client-00003.jsonl`` for each client and one ``heldout.jsonl``, columns
``text`` and ``label``: simulated clients read the very format that real ones do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aggregation import durable
from clients.data import DataError, Examples, read_examples
from protos.tasks import client_name
from simulations.errors import SimulationError
from simulations.resources import find

if TYPE_CHECKING:
    from simulations.partition import Split

SHIPPED: Mapping[str, tuple[str, tuple[str, ...]]] = {
    # name: (file beside this module, class names in the order of the classifier's outputs)
    "sentiment": ("data/sentiment.tsv", ("negative", "positive")),
}
HELDOUT = "heldout.jsonl"
SUMMARY = "partition.json"


class DatasetError(SimulationError):
    """Data that is not there or not usable; names the file and the column."""


@dataclass(frozen=True)
class Dataset:
    """Labelled rows, and where they came from.

    Attributes:
        examples: texts and labels.
        source: the name of a shipped data set, or the file.
        path: the file.
    """

    examples: Examples
    source: str
    path: Path

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class of each row, (n,)."""
        return np.asarray(self.examples.labels, dtype=np.int64)


def load(
    name: str = "",
    *,
    path: Path | None = None,
    text: str = "text",
    label: str = "label",
    label_names: Sequence[str] | None = None,
) -> Dataset:
    """Load a shipped data set by name, or a file.

    Args:
        name: a key of ``SHIPPED``; ignored if there is a path.
        path: a ``.jsonl``, ``.csv`` or ``.tsv`` file, or a ``datasets`` folder.
        text: name of the column with the text.
        label: name of the column with the class.
        label_names: names of the classes in order; None to take them from the file.

    Raises:
        DatasetError: unknown name, missing file or column, unknown label.
    """
    if path is None:
        if name not in SHIPPED:
            raise DatasetError(
                f"data set {name!r} is not one of {', '.join(SHIPPED)}; for your own file set "
                "data.path, data.text and data.label"
            )
        file, known = SHIPPED[name]
        path, label_names = find(file), label_names or known
    try:
        examples = read_examples(path, text=text, label=label, label_names=label_names)
    except DataError as error:
        raise DatasetError(str(error)) from error
    if len(examples.label_names) < 2:
        raise DatasetError(
            f"{path}: column {label!r} holds only the class {examples.label_names[0]!r}; "
            "at least two are needed"
        )
    return Dataset(examples, name or path.name, path)


def column(dataset: Dataset, name: str, *, text: str = "text") -> npt.NDArray[np.int64]:
    """The group of each row, by the values of another column of the file.

    Raises:
        DatasetError: if there is no such column; the message lists those that are there.
    """
    try:
        groups = read_examples(dataset.path, text=text, label=name)
    except DataError as error:
        raise DatasetError(str(error)) from error
    return np.asarray(groups.labels, dtype=np.int64)


def materialise(folder: Path, dataset: Dataset, split: Split) -> None:
    """Write every client's rows and the held-out rows; the folder appears at once or not at all.

    Args:
        folder: replaced if it is there.
        dataset: the rows.
        split: which go where.

    Raises:
        StorageError: if the disk is full or the folder not writable.
    """
    files = {
        f"{client_name(number)}.jsonl": _lines(dataset.examples, rows)
        for number, rows in enumerate(split.clients)
    }
    files[HELDOUT] = _lines(dataset.examples, split.heldout)
    files[SUMMARY] = json.dumps(summary(dataset, split), indent=1).encode()
    durable.write_folder(folder, files)


def summary(dataset: Dataset, split: Split) -> dict[str, Any]:
    """Rows of each class by client, for the report: no text, no row."""
    names = dataset.examples.label_names

    def histogram(rows: npt.NDArray[np.int64]) -> list[int]:
        counts = Counter(dataset.labels[rows].tolist())
        return [counts.get(index, 0) for index in range(len(names))]

    return {
        "source": dataset.source,
        "labels": list(names),
        "clients": {client_name(i): histogram(rows) for i, rows in enumerate(split.clients)},
        "heldout": histogram(split.heldout),
    }


def read(path: Path, label_names: Sequence[str]) -> Examples:
    """Read one of the files that :func:`materialise` wrote.

    Raises:
        DatasetError: if it is missing or not what was written.
    """
    try:
        return read_examples(path, label_names=label_names)
    except DataError as error:
        raise DatasetError(str(error)) from error


def _lines(examples: Examples, rows: npt.NDArray[np.int64]) -> bytes:
    names = examples.label_names
    return b"".join(
        json.dumps(
            {"text": examples.texts[row], "label": names[examples.labels[row]]}, ensure_ascii=False
        ).encode()
        + b"\n"
        for row in rows.tolist()
    )
