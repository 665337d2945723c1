"""What the commands of the server's side share: options, output, errors.

Tables are for people, a versioned envelope is for programs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aggregation.errors import AggregationError
from aggregation.output import AsFormat, Format, show_json
from federation.errors import FederationError
from federation.plain_text import plain
from protos.errors import WireError

if TYPE_CHECKING:
    from federation.client import OperatorClient

__all__ = [
    "BAD_INPUT",
    "HERE",
    "AsFormat",
    "Format",
    "Home",
    "TokenFile",
    "Url",
    "Why",
    "Yes",
    "ago",
    "at",
    "call_operator",
    "confirm",
    "lasting",
    "plain_errors",
    "print_table",
    "show",
    "size_of",
]

BAD_INPUT = 2


Home = Annotated[
    Path, typer.Option(help="Home folder of the server.", envvar="AIRPEFT_SERVER_HOME")
]
Url = Annotated[
    str | None,
    typer.Option(help="The server's interface, if not by --home.", envvar="AIRPEFT_SERVER_URL"),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="Operator's token, with --url.", envvar="AIRPEFT_OPERATOR_TOKEN_FILE"),
]
Why = Annotated[str, typer.Option(help="Your words for the audit log.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it without being asked.")]
HERE = Path("fleet-server")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Our errors as one line on stderr and exit code 2, without a traceback."""
    try:
        yield
    except (FederationError, WireError, AggregationError) as error:
        typer.echo(f"error: {plain(error, lines=True)}", err=True)
        raise typer.Exit(BAD_INPUT) from None


@contextmanager
def call_operator(home: Path, url: str | None, token_file: Path | None) -> Iterator[OperatorClient]:
    """A connection to the server: by its address and a token, or by its home folder.

    Raises:
        FederationError: an address without a token, or a server that isn't there.
    """
    from federation.client import OperatorClient

    if url is None:
        client = OperatorClient.of_home(home)
    elif token_file is None:
        raise FederationError("--url needs --token-file as well")
    else:
        try:
            client = OperatorClient(url, token_file.read_text().strip())
        except (OSError, UnicodeDecodeError) as error:
            raise FederationError(f"cannot read {token_file}: {error}") from error
    with client:
        yield client


def show(kind: str, data: Any, format: Format, table: Callable[[], object]) -> None:  # noqa: A002
    """Print ``{"schema": "airpeft.v1.<kind>", "data": ...}``, or the table."""
    if format is Format.JSON:
        show_json(kind, data)
    else:
        table()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    """A table on stdout; where there is no row, a line that says what to do."""
    if not rows:
        typer.echo(empty)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    colour = "NO_COLOR" not in os.environ and terminal
    Console(no_color=not colour, width=None if terminal else 200, highlight=False).print(table)


def ago(moment: float | None, now: float) -> str:
    """How long ago, for people.

    >>> ago(0.0, 90.0), ago(None, 0.0), ago(0.0, 7200.0)
    ('90 s ago', 'never', '2 h ago')
    """
    if moment is None:
        return "never"
    seconds = max(0.0, now - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def lasting(seconds: float) -> str:
    """A duration, for people.

    >>> lasting(0.0), lasting(90.0), lasting(3600.0), lasting(100_000.0)
    ('no time', '90 s', '60 min', '27.8 h')
    """
    if seconds <= 0:
        return "no time"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{round(seconds / size, 1):g} {unit}"
    return f"{seconds:.0f} s"


def size_of(count: int) -> str:
    """Bytes, for people.

    >>> size_of(512), size_of(2_500_000)
    ('512 B', '2.5 MB')
    """
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def confirm(question: str) -> None:
    """Ask a person; the command ends with exit code 1 unless they agree."""
    if not typer.confirm(question):
        raise typer.Exit(1)


def at(moment: float) -> str:
    """A time in UTC.

    >>> at(0.0)
    '1970-01-01 00:00:00Z'
    """
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
