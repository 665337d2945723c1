"""``airpeft keys``: make, note and show the keys that sign releases.

Exit codes: 0 done; 1 refused or failed; 2 bad input (no such folder, a key that exists, no
passphrase).
"""

from __future__ import annotations

from datetime import UTC, datetime
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
from federation.release_source import Copy, Home, TokenFile, Url, offline_files

keys = typer.Typer(
    name="keys",
    help="Make, show, replace and revoke the keys that sign releases. Keep them off the server.",
    epilog="Examples: airpeft keys init ./offline-keys --passphrase-file secret.txt | "
    "airpeft keys show --home ./fleet | airpeft keys revoke adapters-1 --by new.pub.json "
    "--why 'lost laptop' --home ./fleet -o change",
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
    "airpeft keys init ./trial-keys --no-passphrase --format json | "
    "airpeft keys init ./alice --name adapters-4 --holder 'adapters-4=Alice, Basel'",
)
def init(
    folder: Annotated[Path, typer.Argument(help="Where; no key there is ever overwritten.")],
    scheme: Annotated[Scheme, typer.Option(help="Signature scheme.")] = Scheme.ED25519,
    count: Annotated[
        int, typer.Option(min=1, max=9, help="Keys in each circle; two of them must sign.")
    ] = 3,
    name: Annotated[
        list[str] | None, typer.Option(help="Make only a key of this name; may be repeated.")
    ] = None,
    holder: Annotated[
        list[str] | None, typer.Option(help="NAME=PERSON: who holds it, public; may be repeated.")
    ] = None,
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
        names = list(name or ()) or [
            *(f"{circle}-{n}" for circle in ("root", "adapters") for n in range(1, count + 1)),
            *[ONLINE_NAME] * online,
        ]
        holders = _holders(holder, names)
        secret = None
        if not no_passphrase:
            secret = passphrase(passphrase_file, what="the new keys", confirm=True)
        made = generate(folder, names, scheme=scheme.value, passphrase=secret, holders=holders)
        rows = [row for row in _rows(made.path) if row["name"] in names]
    if output is Format.JSON:
        show_json("keys", rows)
        return
    _table(rows)
    typer.echo(
        f"\nSpread the files over people and places: any {THRESHOLD} keys of a circle can sign, "
        "and one alone can do nothing."
    )


@keys.command(
    epilog="Examples: airpeft keys sealing ./sealing.pem | "
    "airpeft keys sealing ./sealing.pem --passphrase-file secret",
)
def sealing(
    file: Annotated[Path, typer.Argument(help="Private half, a new .pem file; keep it offline.")],
    passphrase_file: PassphraseFile = None,
    no_passphrase: Annotated[
        bool, typer.Option("--no-passphrase", help="Leave the file unencrypted, for trials.")
    ] = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Make a sealing key: what encrypted releases are opened with to let more devices read them.

    Making a release needs its public half alone: airpeft release make --encrypt FILE.pub.pem
    """
    from federation.sealing import make_sealing_key

    with errors():
        secret = (
            None if no_passphrase else passphrase(passphrase_file, what=str(file), confirm=True)
        )
        public = make_sealing_key(file, secret)
    data = {"private": str(file), "public": str(public)}
    if output is Format.JSON:
        show_json("sealing-key", data)
    else:
        show_fields(data)


@keys.command(
    name="import",
    epilog="Examples: airpeft keys import ./bob adapters-5 --public bob.pub.pem "
    "--uri 'command:openssl dgst -sha256 -sign /vault/bob.pem' | "
    "airpeft keys import ./carol adapters-6 --uri 'pkcs11:token=YubiKey;id=%02'",
)
def import_key(
    folder: Annotated[Path, typer.Argument(help="Where to note it.")],
    name: Annotated[str, typer.Argument(help="What to call it, such as adapters-5.")],
    uri: Annotated[str, typer.Option(help="How to sign: command:..., pkcs11:... or hsm:...")],
    public: Annotated[
        Path | None, typer.Option(help="Public half (PEM or .pub.json); a token shows its own.")
    ] = None,
    holder: Annotated[str, typer.Option(help="Who holds it; public.")] = "",
    passphrase_file: PassphraseFile = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Note a key whose private half is on a token, or behind a command.

    The signer is tried once, on a few bytes, before the key is noted.
    """
    from federation.keys import adopt, read_public
    from federation.signers import import_token, open_signer

    def secret(what: str) -> str:
        return passphrase(passphrase_file, what=f"the {what} of {name}")

    with errors():
        if public is not None:
            key = read_public(public)
        elif uri.startswith("command:"):
            fail("a command does not show its public half: give --public FILE", 2)
        else:
            uri, key = import_token(uri, secret)
        open_signer(uri, key, secret).sign(b"airpeft keys import")
        rows = _rows(adopt(folder, name, key, uri, holder=holder).path)
    _show([row for row in rows if row["name"] == name], output)


@keys.command(
    epilog="Examples: airpeft keys show ./offline-keys | airpeft keys show --home ./fleet | "
    "airpeft keys show ./change --format json",
)
def show(
    path: Annotated[
        Path | None,
        typer.Argument(help="A folder of keys, a .pub.json, or a request to change keys."),
    ] = None,
    home: Home = None,
    url: Url = None,
    token_file: TokenFile = None,
    repository: Copy = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Show who holds what, until when it is believed, and what is due; or the keys in a folder.

    Private files are not opened.
    """
    from federation.key_request import is_change
    from federation.key_words import show_holdings, show_progress

    with errors():
        if path is None:
            files, expiries = offline_files(home, url, token_file, repository)
            show_holdings(output, files, expiries, now=datetime.now(UTC))
        elif is_change(path):
            show_progress(output, path)
        else:
            _show(_rows(path), output)


def _show(rows: list[dict[str, Any]], output: Format) -> None:
    if output is Format.JSON:
        show_json("keys", rows)
    elif len(rows) == 1:
        show_fields(rows[0])
    else:
        _table(rows)


def _holders(texts: list[str] | None, names: list[str]) -> dict[str, str]:
    found = {}
    for text in texts or ():
        name, equals, person = text.partition("=")
        if not equals or name not in names:
            fail(f"--holder {text!r} is not NAME=PERSON with one of: {', '.join(names)}", 2)
        found[name] = person
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    from federation.keys import KeyFileError, KeyFolder, key_holder, key_name, read_public

    if path.is_file():
        files = {path.name.removesuffix(".pub.json"): read_public(path)}
    else:
        folder = KeyFolder(path)
        files = {name: folder.public(name) for name in folder.names()}
    if not files:
        raise KeyFileError(f"there are no keys in {path}; make some with: airpeft keys init")
    where = KeyFolder(path.parent if path.is_file() else path)
    return [
        {
            "name": key_name(key),
            "holder": key_holder(key),
            "scheme": key.scheme,
            "keyid": key.keyid,
            "private": where.private(name).is_file(),
            "signs_by": where.private(name).suffix.removeprefix("."),
            "public": key.keyval["public"],
        }
        for name, key in files.items()
    ]


def _table(rows: list[dict[str, Any]]) -> None:
    show_table(
        ["name", "holder", "scheme", "private half", "keyid"],
        [
            [
                r["name"],
                r["holder"] or "-",
                r["scheme"],
                ("here" if r["signs_by"] == "pem" else "by URI") if r["private"] else "elsewhere",
                r["keyid"][:16],
            ]
            for r in rows
        ],
    )
