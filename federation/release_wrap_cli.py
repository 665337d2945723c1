"""``airpeft release wrap``: the keys of encrypted releases, for devices that came later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federation.cli_support import (
    DryRun,
    Format,
    FormatOption,
    PassphraseFile,
    errors,
    optional_passphrase,
    show_json,
    show_table,
)
from federation.release_app import release
from federation.release_source import Home, TokenFile, Url, known_releases, server

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    from federation.client import OperatorClient
    from federation.readers import Readers
    from federation.sealing import SealTo

Where = Annotated[
    str, typer.Option(help="Only devices that this filter means, as in airpeft fleet list.")
]
Roster = Annotated[
    Path | None,
    typer.Option(
        help="Only devices in this roster (airpeft fleet roster), with the identities in it: "
        "then the server can add none of its own."
    ),
]


@release.command(
    epilog="Examples: airpeft release wrap --key sealing.pem --home ./fleet | "
    "airpeft release wrap stable-3 --key sealing.pem --roster cohort.json --url "
    "http://127.0.0.1:8443 --token-file token | "
    "airpeft release wrap --key sealing.pem --home ./fleet --where 'tag.site == \"basel\"' "
    "--dry-run",
)
def wrap(
    key: Annotated[
        Path, typer.Option("--key", help="A sealing key that the releases were encrypted to.")
    ],
    names: Annotated[
        list[str] | None, typer.Argument(help="Releases; all encrypted ones that are listed.")
    ] = None,
    where: Where = "",
    roster: Roster = None,
    home: Home = None,
    url: Url = None,
    token_file: TokenFile = None,
    passphrase_file: PassphraseFile = None,
    dry_run: DryRun = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Give the keys of encrypted releases to devices that were enrolled since.

    To be run where the sealing key is; the content key never leaves that machine. Revoked devices
    get nothing. Doing it again changes nothing.
    """
    from federation.sealing import load_sealing_key

    with errors():
        private = load_sealing_key(key, optional_passphrase(passphrase_file, key))
        releases = _encrypted(known_releases(home, url, token_file, None), names or [])
        with server(home, url, token_file) as operator:
            found = readers(operator, where, roster)
            rows = [_wrap(operator, one, private, found, dry_run) for one in releases]
    if output is Format.JSON:
        data = {"releases": rows, "lacking": list(found.lacking), "dry_run": dry_run}
        show_json("wraps", data)
        return
    show_table(
        ["release", "devices", "would get it" if dry_run else "new"],
        [[row["release"], row["devices"], row["new"]] for row in rows],
    )
    _tell_lacking(found)


def seal_to(
    sealing_keys: list[Path],
    where: str,
    roster: Path | None,
    home: Path | None,
    url: str | None,
    token_file: Path | None,
) -> tuple[SealTo, Readers]:
    """Who shall read a release that is being made.

    Without a server (a copy of the repository knows no devices) these are the sealing keys alone.

    Raises:
        SealingError: a sealing key can't be read.
        ReaderError: a device that a key cannot be wrapped to.
    """
    from federation.readers import Readers
    from federation.sealing import SealTo, read_sealing_public

    publics = tuple(read_sealing_public(path) for path in sealing_keys)
    found = Readers({})
    if home is not None or url is not None:
        with server(home, url, token_file) as operator:
            found = readers(operator, where, roster)
    return SealTo(publics, found.keys), found


def readers(operator: OperatorClient, where: str, roster: Path | None) -> Readers:
    """The devices that can be wrapped to, as the server lists them and the roster allows.

    Raises:
        ReaderError: a device that a key cannot be wrapped to.
    """
    from federation.readers import ReaderError, read_readers
    from privacy.secure_roster import Roster, RosterError

    try:
        pinned = Roster.read(roster).members if roster is not None else None
    except RosterError as error:
        raise ReaderError(str(error)) from None
    return read_readers(operator.certificates(where), pinned)


def sizes(folder: Path, data: dict[str, Any]) -> dict[str, int]:
    """What a request's release weighs, in bytes.

    Args:
        folder: of the request.
        data: the release as :func:`federation.release.describe` gives it.

    Returns:
        ``body``: the tensors in the payload's number format; ``payload``: as devices fetch it;
        for an encrypted one also ``sealing``, what encryption adds to it, and ``wraps``, the file
        of wrapped keys beside it.
    """
    from aggregation.sealed import plain_length
    from federation.release_request import WRAPS

    found = {"body": int(data["plain_length"]), "payload": int(data["length"])}
    if data.get("seal"):
        found["sealing"] = found["payload"] - plain_length(found["payload"])
        found["wraps"] = (folder / WRAPS).stat().st_size
    return found


def _tell_lacking(found: Readers) -> None:
    if found.lacking:
        some = ", ".join(found.lacking[:5]) + (", ..." if len(found.lacking) > 5 else "")
        typer.echo(
            f"\n{len(found.lacking)} without an encryption key yet ({some}): they bring one when "
            "their agents are new enough and renew; wrap again then"
        )


def _encrypted(rows: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    from federation.published import NotFoundError
    from federation.sealing import SealingError

    known = {row["release"]: row for row in rows}
    for name in names:
        if name not in known:
            raise NotFoundError(f"no release {name!r}; the latest are: {', '.join([*known][-5:])}")
        if not known[name].get("seal"):
            raise SealingError(f"{name} is not encrypted: there is no key to wrap")
        if known[name]["revoked"]:
            raise SealingError(f"{name} is revoked ({known[name]['revoked']})")
    chosen = names or [n for n, row in known.items() if row.get("seal") and not row["revoked"]]
    return [known[name] for name in chosen]


def _wrap(
    operator: OperatorClient,
    row: dict[str, Any],
    private: X25519PrivateKey,
    found: Readers,
    dry_run: bool,
) -> dict[str, Any]:
    from federation.sealing import more_wraps
    from protos.signed import Seal
    from protos.wraps import Wraps

    held = Wraps.from_bytes(operator.wraps(row["release"]), row["sha256"])
    new = more_wraps(held, Seal.from_custom(row["seal"]), private, found.keys.values())
    if new.entries and not dry_run:
        operator.add_wraps(row["release"], new.to_bytes())
    return {"release": row["release"], "devices": len(found.keys), "new": len(new.entries)}
