"""What the commands that sign share: keys as files or by URI, and where their secrets come from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federation.cli_support import fail, passphrase

if TYPE_CHECKING:
    from federation.keys import Signer

Keys = Annotated[
    list[str],
    typer.Option(
        "--key", help="A .pem or .uri file, or a URI (command:..., pkcs11:...); may be repeated."
    ),
]
Publics = Annotated[
    list[Path] | None,
    typer.Option("--public", help="Public half of a key given by URI, in the same order."),
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Signature file; else inside the request.")
]

Root = Annotated[
    list[Path] | None,
    typer.Option(
        "--root",
        help="Root metadata that you trust, from elsewhere than the request; for a key that has "
        "not signed what is published itself. May be repeated: those that followed it, in turn.",
    ),
]


def signers(
    keys: list[str], publics: list[Path] | None, passphrase_file: Path | None
) -> list[Signer]:
    """The keys that were named, ready to sign.

    Raises:
        KeyFileError: one can't be read, or its passphrase is wrong.
        SignerError: one by URI can't be used.
        typer.Exit: a URI without a public half, or the other way round.
    """
    from federation.keys import is_encrypted, load_signer, read_public
    from federation.signers import is_uri, open_signer

    halves = list(publics or ())
    if len(halves) != sum(map(is_uri, keys)):
        fail("each --key that is a URI needs one --public FILE, in the same order", 2)
    found: list[Signer] = []
    for text in keys:
        if is_uri(text):
            scheme = text.partition(":")[0]

            def secret(what: str, scheme: str = scheme) -> str:
                return passphrase(passphrase_file, what=f"the {what} of {scheme}")

            found.append(open_signer(text, read_public(halves.pop(0)), secret))
            continue
        path = Path(text)
        given = passphrase(passphrase_file, what=text) if is_encrypted(path) else None
        found.append(load_signer(path, given))
    return found
