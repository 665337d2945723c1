"""Bringing a signed change of keys to a repository: through its server, or in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

from federation.homes import endpoint_files
from federation.key_request import assemble_change, read_change
from federation.keys import Signer
from federation.online_keys import newest_file, online_signer


def publish_change(
    request: Path,
    *,
    signatures: Iterable[Path],
    hold: bool,
    home: Path | None,
    url: str | None,
    token_file: Path | None,
    secret: Callable[[Path], str | None],
    now: datetime,
) -> dict[str, int]:
    """Publish a change; the versions of all files afterwards.

    Args:
        request: folder of the request.
        signatures: further signature files.
        hold: see :meth:`federation.repository.Repository.publish_keys`.
        home: of a server on this machine, running or not.
        url: of a server elsewhere, with ``token_file``.
        token_file: the operator's token.
        secret: the passphrase of a key file, None if it is not encrypted.
        now: the time, with a zone.

    Raises:
        KeyChangeError: the request or a signature is not what it should be.
        PublishError: the repository refuses.
        OperatorError: the server does.
        ServerError: the home is in use.
    """
    from federation.release_source import server

    files, why = assemble_change(request, signatures), read_change(request).why
    if home is not None and not endpoint_files(home):
        return _in_place(home, files, hold, secret, now)
    with server(home, url, token_file) as operator:
        answer = operator.change_keys(files, hold=hold, why=why)
    return {str(role): int(version) for role, version in answer["versions"].items()}


def _in_place(
    home: Path,
    files: dict[str, bytes],
    hold: bool,
    secret: Callable[[Path], str | None],
    now: datetime,
) -> dict[str, int]:
    """The server is down: nobody else holds its folder while this is done."""
    from federation.commit import finish
    from federation.first_start import take_home
    from federation.repository import Repository

    def online(keyid: str) -> Signer:
        return online_signer(home, keyid, secret(newest_file(home)))

    lock = take_home(home)
    try:
        finish(home / "repository")
        repository = Repository(home / "repository")
        repository.publish_keys(files, now=now, online=online, hold=hold)
        return dict(repository.versions())
    finally:
        lock.close()
