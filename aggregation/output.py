"""What every command prints with: two formats, an envelope for programs, a table for people.

It stands on the ground floor because commands stand on every floor. Nothing is imported with it but
Typer, so that ``--help`` stays quick.

>>> envelope("fleet", [1])
{'schema': 'airpeft.v1.fleet', 'data': [1]}
>>> print(table(["key", "uses"], [["root-1", 2]]))
key     uses
root-1  2
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer


class Format(StrEnum):
    """How a result is shown."""

    TABLE = "table"
    JSON = "json"


AsFormat = Annotated[Format, typer.Option("--format", help="Table for people, JSON for programs.")]


def envelope(kind: str, data: Any) -> dict[str, Any]:
    """Data for programs, with the version of its form.

    Args:
        kind: what it is, such as ``rollout``.
        data: what JSON can hold.
    """
    return {"schema": f"airpeft.v1.{kind}", "data": data}


def show_json(kind: str, data: Any) -> None:
    """Print an :func:`envelope`; arguments as there."""
    typer.echo(json.dumps(envelope(kind, data), indent=2))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain table: cells to the left, two blanks between; whole, however narrow the terminal.

    Args:
        columns: their titles.
        rows: a cell for each.
    """
    texts = [list(columns), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in texts
    )
