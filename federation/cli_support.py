"""What the commands about keys and releases share: output, errors, passphrases.

Exit codes: 0 done; 1 refused or failed; 2 bad input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from aggregation.output import AsFormat as FormatOption
from aggregation.output import Format, show_json, table
from federation.plain_text import plain

__all__ = [
    "DryRun",
    "Format",
    "FormatOption",
    "PassphraseFile",
    "confirm",
    "errors",
    "fail",
    "optional_passphrase",
    "passphrase",
    "show_fields",
    "show_json",
    "show_table",
]

PASSPHRASE_VARIABLE = "AIRPEFT_KEY_PASSPHRASE"  # noqa: S105  # the variable's name


DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would change, and end.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help=f"File with the passphrase; else ${PASSPHRASE_VARIABLE}, else a prompt.",
    ),
]


def show_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A plain table; whole, however narrow the terminal."""
    if not rows:
        typer.echo("nothing yet")
        return
    texts = [[plain(cell) for cell in row] for row in rows]
    typer.echo(table(columns, texts))


def show_fields(fields: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        typer.echo(f"{name.ljust(width)}  {plain(value)}")


@contextmanager
def errors() -> Iterator[None]:
    """Turn the errors of this product into one line and an exit code."""
    from aggregation.errors import AggregationError
    from federation.client import OperatorError
    from federation.errors import FederationError
    from federation.published import PublishError
    from protos.errors import WireError

    try:
        yield
    except (PublishError, OperatorError) as error:
        fail(str(error), 1)
    except (FederationError, AggregationError, WireError) as error:
        fail(str(error), 2)
    except OSError as error:
        fail(f"{error.filename or ''}: {error.strerror}", 2)


def fail(message: str, code: int) -> None:
    """Say why on standard error, and end.

    Raises:
        typer.Exit: always.
    """
    typer.echo(f"error: {plain(message, lines=True)}", err=True)
    raise typer.Exit(code)


def confirm(question: str, yes: bool) -> None:
    """Ask before something changes that many depend on.

    Raises:
        typer.Exit: the answer is no, or there is nobody to ask.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        fail("this changes what devices trust: say --yes, or run it where you can be asked", 2)
    if not typer.confirm(question):
        raise typer.Exit(1)


def optional_passphrase(file: Path | None, key: Path) -> str | None:
    """The passphrase for a key file, None if it is not encrypted (or not there).

    Raises:
        typer.Exit: it needs one, and nobody is there to ask.
    """
    from federation.keys import is_encrypted

    if not key.is_file() or not is_encrypted(key):
        return None
    return passphrase(file, what=str(key))


def passphrase(file: Path | None, *, what: str, confirm: bool = False) -> str:
    """A passphrase from a file, from the environment, or from a prompt; never from an argument.

    Raises:
        typer.Exit: there is none, and nobody to ask.
    """
    if file is not None:
        try:
            given = file.read_text("utf-8").partition("\n")[0].rstrip("\r")
        except UnicodeDecodeError:  # whose own words would show a part of it
            fail(f"{file} is not text in UTF-8: its first line is the passphrase", 2)
    elif PASSPHRASE_VARIABLE in os.environ:
        given = os.environ[PASSPHRASE_VARIABLE]
    elif sys.stdin.isatty():
        given = typer.prompt(f"Passphrase for {what}", hide_input=True, confirmation_prompt=confirm)
    else:
        fail(f"{what} needs a passphrase: --passphrase-file FILE, or ${PASSPHRASE_VARIABLE}", 2)
    if not given:
        fail(f"the passphrase for {what} is empty", 2)
    return str(given)
