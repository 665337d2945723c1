"""Labelled texts, read from the files that people have.

    >>> Examples(("good", "bad"), (1, 0), ("negative", "positive")).labels
    (1, 0)

Accepted: ``.jsonl``, ``.csv``, ``.tsv``, and a folder saved by the ``datasets`` library if that is
installed. Columns are named by the caller. Errors name the file, the row and the column, and a
label that is wrong; they never quote a text, because this code runs where the texts are private.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clients.errors import ClientError

MAX_LINE = 1 << 20  # bytes; a longer line is not a sentence


class DataError(ClientError):
    """A file that is not usable training data."""


@dataclass(frozen=True)
class Examples:
    """Labelled texts.

    Attributes:
        texts: the texts.
        labels: for each text, its index in ``label_names``.
        label_names: names of the classes, in the order of the classifier's outputs.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    label_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise DataError(f"{len(self.texts)} texts but {len(self.labels)} labels")
        if any(not 0 <= label < len(self.label_names) for label in self.labels):
            raise DataError(f"a label is outside 0..{len(self.label_names) - 1}")

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, rows: Sequence[int]) -> Examples:
        """Some of the examples, in this order."""
        texts, labels = tuple(self.texts[i] for i in rows), tuple(self.labels[i] for i in rows)
        return Examples(texts, labels, self.label_names)

    @cached_property
    def texts_digest(self) -> str:
        """Hex SHA-256 of the texts in order: the key under which computed features are cached."""
        hasher = hashlib.sha256()
        for text in self.texts:
            raw = text.encode("utf-8", "surrogatepass")
            hasher.update(len(raw).to_bytes(8, "little") + raw)
        return hasher.hexdigest()

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of texts, labels and class names. Private: it never leaves the device."""
        doc = json.dumps([self.texts_digest, self.labels, self.label_names])
        return hashlib.sha256(doc.encode()).hexdigest()


def held_out(examples: Examples, client: str, share: float) -> tuple[Examples, Examples]:
    """Divide a client's examples into those that train and those that only measure.

    On which side a text falls depends on the text and the client alone, never on other rows: it
    stays there when rows come and go, equal texts stay together, and adding an example changes the
    training set by that example at most, which is what differential privacy counts.

    Args:
        examples: all of the client's examples.
        client: the client's stable name.
        share: share to hold out, 0 to 1; the actual share is binomial.

    Returns:
        (training, held out), each in the given order; either may be empty.
    """
    if not share:
        return examples, Examples((), (), examples.label_names)
    sides: tuple[list[int], list[int]] = ([], [])
    name = hashlib.sha256(b"airpeft holdout\0" + client.encode("utf-8", "surrogatepass"))
    for row, text in enumerate(examples.texts):
        hasher = name.copy()
        hasher.update(b"\0" + text.encode("utf-8", "surrogatepass"))
        number = int.from_bytes(hasher.digest()[:8], "big")
        sides[number < share * 2**64].append(row)
    return examples.rows(sides[0]), examples.rows(sides[1])


@dataclass(frozen=True)
class DataSource:
    """Where a client's examples are; arguments as for :func:`read_examples`."""

    path: Path
    text: str = "text"
    label: str = "label"

    def read(self, label_names: Sequence[str] | None = None) -> Examples:
        """The examples; see :func:`read_examples`."""
        return read_examples(self.path, text=self.text, label=self.label, label_names=label_names)


def read_examples(
    path: Path,
    *,
    text: str = "text",
    label: str = "label",
    label_names: Sequence[str] | None = None,
) -> Examples:
    """Read labelled texts.

    Args:
        path: a ``.jsonl``, ``.csv`` or ``.tsv`` file with a header, or a ``datasets`` folder.
        text: name of the column with the text.
        label: name of the column with the class: its name, or its index.
        label_names: names of the classes in order; None to take them from the file, sorted.

    Raises:
        DataError: file missing, unreadable or empty; a column missing (the message lists those
            that are there); a label unknown; more classes than ``label_names``.
    """
    path = Path(path)
    rows = [
        (where, _cell(path, where, row, text), _label(path, where, row, label))
        for where, row in _rows(path)
    ]
    if not rows:
        raise DataError(f"{path}: no examples; the file is empty or has only a header")
    names = tuple(label_names) if label_names else _names(path, label, rows)
    index = {name: i for i, name in enumerate(names)}
    labels = tuple(_index(path, where, label, value, index) for where, _, value in rows)
    return Examples(tuple(words for _, words, _ in rows), labels, names)


def _names(path: Path, label: str, rows: Iterable[tuple[str, str, str | int]]) -> tuple[str, ...]:
    found = {value for _, _, value in rows}
    if all(isinstance(value, int) for value in found):
        return tuple(str(i) for i in range(max(int(v) for v in found) + 1))
    if any(isinstance(value, int) for value in found):
        raise DataError(
            f"{path}: column {label!r} mixes names and numbers; write every class the same way"
        )
    return tuple(sorted(str(value) for value in found))


def _index(path: Path, where: str, label: str, value: str | int, index: Mapping[str, int]) -> int:
    if isinstance(value, str) and value in index:
        return index[value]
    number = value if isinstance(value, int) else int(value) if value.isdecimal() else -1
    if 0 <= number < len(index):
        return number
    shown = ", ".join(list(index)[:10]) + (", ..." if len(index) > 10 else "")
    if number >= len(index):
        raise DataError(
            f"{path}: {where}: column {label!r} has class {number}, but there are only "
            f"{len(index)} classes ({shown}): the data has more classes than labels"
        )
    raise DataError(
        f"{path}: {where}: column {label!r} has the unknown label {value!r:.70}; "
        f"allowed: {shown}, or an index from 0"
    )


def _cell(path: Path, where: str, row: Mapping[str, Any], column: str) -> str:
    value = _value(path, where, row, column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{path}: {where}: column {column!r} is empty or not a text")
    return value


def _label(path: Path, where: str, row: Mapping[str, Any], column: str) -> str | int:
    value = _value(path, where, row, column)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise DataError(f"{path}: {where}: column {column!r} must be a class name or its index")


def _value(path: Path, where: str, row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        there = ", ".join(sorted(str(key) for key in row if key is not None)) or "none"
        raise DataError(
            f"{path}: {where}: there is no column {column!r}; the columns are: {there}. "
            "Name the right ones, for example with text=... and label=..."
        )
    return row[column]


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.is_dir():
        yield from _datasets_rows(path)
        return
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Mapping[str, Any]]]]] = {
        ".jsonl": _jsonl_rows,
        ".csv": lambda p: _table_rows(p, ","),
        ".tsv": lambda p: _table_rows(p, "\t"),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: cannot read files that end in {path.suffix!r}; "
            f"allowed: {', '.join(readers)}, or a folder saved by the datasets library"
        )
    try:
        yield from reader(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: the file is not UTF-8 text; convert it first") from None
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"line {number}"
            if len(line) > MAX_LINE:
                raise DataError(f"{path}: {where} is longer than {MAX_LINE} bytes")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                raise
            except (ValueError, RecursionError):
                raise DataError(f"{path}: {where} is not JSON") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}: {where} is not a JSON object with named columns")
            yield where, row


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # A tab-separated file has no quoting: a quotation mark in a text is just a character.
    with path.open(encoding="utf-8-sig", newline="") as file:
        if delimiter == "\t":
            reader = csv.DictReader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        else:
            reader = csv.DictReader(file, delimiter=delimiter)
        for row in reader:
            yield f"line {reader.line_num}", row


def _datasets_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import datasets  # type: ignore[import-not-found]  # optional
    except ImportError:
        raise DataError(
            f"{path} is a folder: to read one, install the datasets library "
            "(pip install datasets), or give a .jsonl, .csv or .tsv file"
        ) from None
    try:
        table = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a folder saved by the datasets library: {error}") from None
    if isinstance(table, datasets.DatasetDict):
        raise DataError(
            f"{path}: holds the splits {', '.join(table)}; give the folder of one of them"
        )
    for number, row in enumerate(table):
        yield f"row {number}", row
