"""Recipes and their pieces in words, for people: from the docstrings that the code has anyway.

>>> from aggregation.reducing import FactorMean
>>> meaning(FactorMean())
'the mean of B and the mean of A, each on its own (FedIT, Zhang et al. 2023).'
>>> [line for line in table(["a", "b"], [["1", "long " * 3]], width=12)]
['a  b', '1  long long', '   long']
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

WIDTH = 100


def meaning(piece: Any) -> str:
    """What a choice of a piece does: the first paragraph of its docstring, without its name."""
    first = (inspect.getdoc(type(piece)) or "").partition("\n\n")[0]
    text = _plain(first)
    return re.sub(r"^[A-Z][a-z]+: ", "", text)


def settings(piece: Any) -> list[tuple[str, str, str]]:
    """The settings of a choice: name, value, and what its docstring says of it."""
    said = _attributes(inspect.getdoc(type(piece)) or "")
    return [(f.name, _written(getattr(piece, f.name)), said.get(f.name, "")) for f in fields(piece)]


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int = WIDTH) -> list[str]:
    """Rows as lines of at most a width: the last column is wrapped, the others are not.

    Args:
        columns: their titles.
        rows: a cell for each.
        width: characters of a line; at least some are left to the last column.
    """
    texts = [list(columns), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(columns) - 1)]
    left = max(8, width - sum(widths) - 2 * len(widths))
    lines = []
    for row in texts:
        last = textwrap.wrap(row[-1], left) or [""]
        start = "".join(cell.ljust(size + 2) for cell, size in zip(row, widths, strict=False))
        lines.append((start + last[0]).rstrip())
        lines += [" " * len(start) + rest for rest in last[1:]]
    return lines


def _plain(text: str) -> str:
    text = re.sub(r":\w+:`[~.]?([^`<]+?)(?: <[^>]*>)?`", r"\1", text)
    return " ".join(text.replace("``", "").split())


def _attributes(doc: str) -> dict[str, str]:
    """The entries of a docstring's section ``Attributes``."""
    match = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", doc, re.MULTILINE)
    found: dict[str, str] = {}
    name = ""
    for line in (match[1] if match else "").splitlines():
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name:
            found[name] += " " + line.strip()
    return {key: _plain(value) for key, value in found.items()}


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
