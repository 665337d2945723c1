"""Where the commands about releases learn what is current: a server, or a copy of its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federation.cli_support import fail

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
    home: Path | None, url: str | None, token_file: Path | None, repository: Path | None
) -> bytes:
    """The current ``adapters`` metadata, from a server or from a copy of its repository."""
    from federation.repository import Repository

    if repository is not None:
        return Repository(repository).adapters()
    with server(home, url, token_file) as operator:
        return operator.adapters()[1]


def known_releases(
    home: Path | None, url: str | None, token_file: Path | None, repository: Path | None
) -> list[dict[str, Any]]:
    """What the adapter keys vouch for, read from the signed metadata itself."""
    from federation.metadata_files import parse_metadata
    from federation.published import read_releases
    from federation.release import describe

    data = current_adapters(home, url, token_file, repository)
    metadata = parse_metadata(data, "the adapters metadata")
    return [describe(record) for record in read_releases(metadata.signed)]
