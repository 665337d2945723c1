"""``airpeft keys sign`` and ``publish``: a change of keys on its way to the devices."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from federation.cli_support import (
    DryRun,
    Format,
    FormatOption,
    PassphraseFile,
    confirm,
    errors,
    fail,
    optional_passphrase,
    show_json,
    show_table,
)
from federation.keys_cli import keys
from federation.release_source import Home, TokenFile, Url
from federation.signing_cli import Keys, Out, Publics, Root, signers

Request = Annotated[Path, typer.Argument(help="Folder of the request.")]


@keys.command(
    epilog="Examples: airpeft keys sign change --key root-1.pem --key root-2.pem --yes | "
    "airpeft keys sign change --key root-4.pem --root root.json --yes | "
    "airpeft keys sign change --key 'command:sign-with-vault root-3' --public root-3.pub.json "
    "--out root-3.json --yes",
)
def sign(
    request: Request,
    key: Keys,
    public: Publics = None,
    out: Out = None,
    root: Root = None,
    passphrase_file: PassphraseFile = None,
    yes: Annotated[bool, typer.Option("--yes", help="Sign without being asked.")] = False,
    dry_run: DryRun = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Read what changes, then add signatures to the request. Needs no network.

    A key that has not signed what is published itself, a new one for instance, needs a root that
    you trust.
    """
    from federation.key_request import read_change, sign_change
    from federation.key_words import show_progress
    from federation.keys import key_name

    if out is not None and len(key) > 1:
        fail("--out takes one key's signatures: give one --key", 2)
    with errors():
        waiting = read_change(request)  # once: what is signed is what was shown
        if output is Format.TABLE or dry_run:
            show_progress(output, waiting)
        if dry_run:
            return
        confirm("Sign this change?", yes)
        rows = []
        trusted = [path.read_bytes() for path in root or ()]
        for signer in signers(key, public, passphrase_file):
            path = sign_change(waiting, signer, out=out, roots=trusted)
            rows.append({"key": key_name(signer.public_key), "signature": str(path)})
    if output is Format.JSON:
        show_json("signatures", {"request": str(request), "signatures": rows})
        return
    typer.echo("")
    show_table(["key", "signatures"], [[row["key"], row["signature"]] for row in rows])


@keys.command(
    epilog="Examples: airpeft keys publish change --home ./fleet --yes | "
    "airpeft keys publish change --home ./fleet --signature from-bob.json --dry-run",
)
def publish(
    request: Request,
    signature: Annotated[
        list[Path] | None, typer.Option(help="A signature file; may be repeated.")
    ] = None,
    hold: Annotated[
        bool,
        typer.Option(
            "--hold", help="Devices stay as they are until the next order: the old key was stolen."
        ),
    ] = False,
    home: Home = None,
    url: Url = None,
    token_file: TokenFile = None,
    passphrase_file: PassphraseFile = None,
    yes: Annotated[bool, typer.Option("--yes", help="Publish without being asked.")] = False,
    dry_run: DryRun = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Send a signed change of keys to the server. Doing it again changes nothing.

    If the server at --home is not running, its repository is changed in place.
    """
    from federation.key_publishing import publish_change
    from federation.key_words import change_data, show_progress

    with errors():
        if output is Format.TABLE or dry_run:
            show_progress(output, request, signature or ())
        missing = sum(n["missing"] for n in change_data(request, signature or ())["needs"])
        if dry_run:
            return
        if missing:
            fail(f"{missing} signatures are missing: see above, or airpeft keys show {request}", 1)
        confirm("Publish this change?", yes)
        versions = publish_change(
            request,
            signatures=signature or (),
            hold=hold,
            home=home,
            url=url,
            token_file=token_file,
            secret=lambda path: optional_passphrase(passphrase_file, path),
            now=datetime.now(UTC),
        )
    if output is Format.JSON:
        show_json("versions", versions)
        return
    typer.echo("\npublished: " + ", ".join(f"{role} {n}" for role, n in sorted(versions.items())))
