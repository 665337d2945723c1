"""Where the commands about releases learn what is current: a server, or a copy of its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federation.cli_support import fail
from federation.homes import endpoint_files

if TYPE_CHECKING:
    from federation.client import OperatorClient

Home = Annotated[Path | None, typer.Option("--home", help="Home of a server on this machine.")]
Url = Annotated[str | None, typer.Option("--url", help="Address of a server's API.")]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="File with the operator's token, for --url.")
]
Copy = Annotated[
    Path | None,
    typer.Option("--repository", help="A repository's folder or a copy, instead of a server."),
]


def server(home: Path | None, url: str | None, token_file: Path | None) -> OperatorClient:
    """A connection to the server that was named.

    Raises:
        typer.Exit: none was named.
        OperatorError: it does not run.
    """
    from federation.client import OperatorClient

    if home is not None:
        return OperatorClient.of_home(home)
    if url is None or token_file is None:
        fail("say which server: --home DIR, or --url URL with --token-file FILE", 2)
        raise AssertionError
    return OperatorClient(url, token_file.read_text().strip())


def current_adapters(
    home: Path | None,
    url: str | None,
    token_file: Path | None,
    repository: Path | None,
    channel: str = "",
) -> bytes:
    """The current metadata of a channel's role, from a server or from a copy of its repository."""
    from federation.reading import Reading

    if repository is not None:
        return Reading(repository).adapters(channel)
    with server(home, url, token_file) as operator:
        return operator.adapters(channel)[1]


def targets_in_use(
    home: Path | None, url: str | None, token_file: Path | None, repository: Path | None
) -> list[str]:
    """Targets that the current round hands out: they must stay listed."""
    from federation.reading import Reading

    if repository is not None:
        return sorted(Reading(repository).in_use())
    with server(home, url, token_file) as operator:
        return operator.in_use()


def offline_files(
    home: Path | None, url: str | None, token_file: Path | None, repository: Path | None
) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The files that offline keys have signed, by role, and when every file expires."""
    from federation.reading import Reading

    if repository is None and home is not None and not endpoint_files(home):
        repository = home / "repository"  # the server is down: its folder says the same
    if repository is None:
        with server(home, url, token_file) as operator:
            return operator.offline()
    reading = Reading(repository)
    expiries = [
        {"role": e.role, "version": e.version, "expires": e.expires.isoformat()}
        for e in reading.expiries()
    ]
    return reading.offline(), expiries


def known_releases(
    home: Path | None, url: str | None, token_file: Path | None, repository: Path | None
) -> list[dict[str, Any]]:
    """What the adapter keys vouch for, read from the signed metadata itself."""
    from federation.metadata_files import parse_metadata
    from federation.published import read_releases, read_standing
    from federation.release import describe

    files, _ = offline_files(home, url, token_file, repository)
    rows: list[dict[str, Any]] = []
    for role in files.keys() - {"root", "targets"}:
        signed = parse_metadata(files[role], role).signed
        said = read_standing(signed)
        for record in read_releases(signed):
            revoked = said.revocation(record.sha256)
            row = {**describe(record), "role": role, "revoked": revoked.why if revoked else ""}
            row["channel_floor"] = said.floors.get(record.statement.channel, 0)
            rows.append(row)
    return sorted(rows, key=lambda row: (row["channel"], row["counter"]))
