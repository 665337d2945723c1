"""``airpeft keys``: make and show the keys that sign releases.

Exit codes: 0 done; 1 refused or failed; 2 bad input (no such folder, a key that exists, no
passphrase).
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from federation.cli_support import (
    Format,
    FormatOption,
    PassphraseFile,
    errors,
    fail,
    passphrase,
    show_fields,
    show_json,
    show_table,
)

keys = typer.Typer(
    name="keys",
    help="Make and show the keys that sign releases. Keep them off the server.",
    epilog="Example: airpeft keys init ./offline-keys --passphrase-file secret.txt",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


class Scheme(StrEnum):
    """Signature schemes."""

    ED25519 = "ed25519"
    ECDSA_P256 = "ecdsa-p256"


@keys.command(
    epilog="Examples: airpeft keys init ./offline-keys | "
    "airpeft keys init ./trial-keys --no-passphrase --format json",
)
def init(
    folder: Annotated[Path, typer.Argument(help="Where; no key there is ever overwritten.")],
    scheme: Annotated[Scheme, typer.Option(help="Signature scheme.")] = Scheme.ED25519,
    count: Annotated[
        int, typer.Option(min=1, max=9, help="Keys in each circle; two of them must sign.")
    ] = 3,
    online: Annotated[
        bool, typer.Option("--online", help="Make an online key too; the server makes its own.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    no_passphrase: Annotated[
        bool, typer.Option("--no-passphrase", help="Leave the files unencrypted, for trials.")
    ] = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Make root keys and adapter keys, each in a file of its own."""
    from federation.keys import ONLINE_NAME, THRESHOLD, generate

    if count < THRESHOLD:
        fail(f"--count {count} is too few: {THRESHOLD} of the keys of a circle must sign", 2)
    with errors():
        secret = None
        if not no_passphrase:
            secret = passphrase(passphrase_file, what="the new keys", confirm=True)
        names = [f"{circle}-{n}" for circle in ("root", "adapters") for n in range(1, count + 1)]
        made = generate(
            folder,
            names + [ONLINE_NAME] * online,
            scheme=scheme.value,
            passphrase=secret,
        )
        rows = _rows(made.path)
    if output is Format.JSON:
        show_json("keys", rows)
        return
    _table(rows)
    typer.echo(
        f"\nSpread the files over people and places: any {THRESHOLD} keys of a circle can sign, "
        "and one alone can do nothing."
    )


@keys.command(epilog="Example: airpeft keys show ./offline-keys --format json")
def show(
    folder: Annotated[Path, typer.Argument(help="A folder of keys, or one .pub.json file.")],
    output: FormatOption = Format.TABLE,
) -> None:
    """Show the public halves; private files are not opened."""
    with errors():
        rows = _rows(folder)
    if output is Format.JSON:
        show_json("keys", rows)
    elif len(rows) == 1:
        show_fields(rows[0])
    else:
        _table(rows)


def _rows(path: Path) -> list[dict[str, Any]]:
    from federation.keys import KeyFileError, KeyFolder, key_name, read_public

    if path.is_file():
        files = {path.name.removesuffix(".pub.json"): read_public(path)}
    else:
        folder = KeyFolder(path)
        files = {name: folder.public(name) for name in folder.names()}
    if not files:
        raise KeyFileError(f"there are no keys in {path}; make some with: airpeft keys init")
    where = path.parent if path.is_file() else path
    return [
        {
            "name": key_name(key),
            "scheme": key.scheme,
            "keyid": key.keyid,
            "private": (where / f"{name}.pem").is_file(),
            "public": key.keyval["public"],
        }
        for name, key in files.items()
    ]


def _table(rows: list[dict[str, Any]]) -> None:
    show_table(
        ["name", "scheme", "private half", "keyid"],
        [
            [r["name"], r["scheme"], "here" if r["private"] else "elsewhere", r["keyid"][:16]]
            for r in rows
        ],
    )
