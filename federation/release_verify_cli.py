"""``airpeft release verify`` and ``revoke``: judging what is out, and taking it back."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federation.cli_support import Format, FormatOption, errors, fail, show_json, show_table
from federation.plain_text import plain
from federation.release_app import release
from federation.release_source import Copy, Home, TokenFile, Url, current_adapters, offline_files
from federation.release_words import day

if TYPE_CHECKING:
    from federation.verification import RoleSeal


@release.command(
    epilog="Example: airpeft release verify ./copy-of-the-repository --root root.json",
)
def verify(
    folder: Annotated[Path, typer.Argument(help="The repository, or a copy of it.")],
    root: Annotated[Path, typer.Option("--root", help="The root metadata that you trust.")],
    output: FormatOption = Format.TABLE,
) -> None:
    """Judge a repository by its root alone: who signed what, and when."""
    from federation.release import describe
    from federation.verification import verify_repository

    with errors():
        report = verify_repository(folder, root.read_bytes(), now=datetime.now(UTC))
        seals = [_seal(seal) for seal in report.roles]
        releases = [
            {
                **describe(r.record),
                "payload": r.payload,
                "role": r.role,
                "signed_by": list(r.signed_by),
                "revoked": r.revoked,
            }
            for r in report.releases
        ]
    if output is Format.JSON:
        data = {"sound": report.sound, "roles": seals, "releases": releases}
        show_json("verification", {**data, "round": report.round.to_custom()})
    else:
        show_table(
            ["role", "version", "signed by", "needed", "made", "expires"],
            [
                [
                    s["role"],
                    s["version"],
                    ", ".join(s["signed_by"]),
                    s["threshold"],
                    s["made"] or "-",
                    f"{s['expires']}{'  EXPIRED' if s['expired'] else ''}",
                ]
                for s in seals
            ],
        )
        typer.echo("")
        show_table(
            ["release", "payload", "made", "signed by", "sha256", "remarks"],
            [
                [
                    r["release"],
                    r["payload"],
                    day(r["made_unix"]),
                    ", ".join(r["signed_by"]),
                    r["sha256"][:16],
                    _remarks(r),
                ]
                for r in releases
            ],
        )
    if not report.sound:
        fail("something has expired, or a payload is not the signed one: see above", 1)


def _remarks(release: dict[str, Any]) -> str:
    said = []
    if release["revoked"]:
        said.append(f"REVOKED: {release['revoked']}")
    if release.get("forced"):
        said.append(f"worse than its parent, released because: {release['forced']}")
    return "; ".join(said) or "-"


def _seal(seal: RoleSeal) -> dict[str, Any]:
    return {
        "role": seal.role,
        "version": seal.version,
        "signed_by": list(seal.signed_by),
        "threshold": seal.threshold,
        "made": seal.made.isoformat() if seal.made else None,
        "expires": seal.expires.isoformat(),
        "expired": seal.expired,
    }


@release.command(
    epilog="Example: airpeft release revoke stable-3 --why 'answers with names' --home ./fleet "
    "-o bad && airpeft release sign bad --key adapters-1.pem --key adapters-2.pem && "
    "airpeft release publish bad --home ./fleet",
)
def revoke(
    name: Annotated[str, typer.Argument(help="The release, such as stable-3.")],
    why: Annotated[str, typer.Option(help="The reason; signed, and in each device's log.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the request, new.")],
    also_older: Annotated[
        bool, typer.Option("--also-older", help="Raise the floor above it: nothing older either.")
    ] = False,
    home: Home = None,
    url: Url = None,
    token_file: TokenFile = None,
    repository: Copy = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Make a request to revoke a release: no device installs it, and those that serve it leave it.

    A device goes back to the release before, if it still has it and nothing is said against it,
    else to the base model alone.
    """
    from federation.release import describe_revocation, make_revocation

    with errors():
        channel = name.rpartition("-")[0]
        request = make_revocation(
            out,
            adapters=current_adapters(home, url, token_file, repository, channel),
            release=name,
            why=why,
            also_older=also_older,
            now=datetime.now(UTC),
            above=offline_files(home, url, token_file, repository)[0],
        )
    data = {"request": str(out), **describe_revocation(request)}
    if output is Format.JSON:
        show_json("revocation", data)
        return
    typer.echo(f"request to revoke {name} in {out}: {plain(why)}")
    for line, floor in request.floors.items():
        typer.echo(f"nothing below {line}-{floor} is installed any more")
    typer.echo(f"\nnext: airpeft release sign {out} --key KEY.pem   (two different keys)")
