"""What a server makes at its first start, and finds again at every later one.

Home folder::

    fleet.sqlite      devices, reports, rollouts, audit       admin.token     the operator's token
    authority/        certificate authority, TLS key          endpoints.json  while it runs
    online-key/       signs rounds, snapshot, timestamp       ports.json      taken again next time
    offline-keys/     root and adapter keys: move them away   server.lock     held while it runs
    repository/       signed metadata and payloads

With ``--database`` there is no ``fleet.sqlite``. With ``--gateway NAME`` there may be others: the
last three of the right column, and the server's own TLS key, lie in ``gateways/NAME/``.

Each thing appears as a whole or not at all, so that a first start which was killed is simply
started again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from aggregation import durable
from federation.commit import finish
from federation.errors import FederationError
from federation.homes import folder_of
from federation.keys import (
    ADAPTER_NAMES,
    ONLINE_NAME,
    ROOT_NAMES,
    KeyFolder,
    Signer,
)
from federation.online_keys import FOLDER as ONLINE_FOLDER
from federation.online_keys import key_folder, online_signer
from federation.reading import Reading
from federation.repository import Repository
from federation.shared_folder import lock_of

log = logging.getLogger("airpeft.federation.server")


class ServerError(FederationError):
    """The server cannot start; says what to do."""


@dataclass(frozen=True, kw_only=True)
class Passphrases:
    """Of the private key files; None where they are not encrypted."""

    offline: str | None = None
    online: str | None = None

    def __repr__(self) -> str:  # they must not end up in a log
        return "Passphrases(...)"


def take_home(home: Path) -> IO[str]:
    """Make the home folder and hold it for this process alone; keep the result.

    Raises:
        ServerError: not writable, or another server holds it.
    """
    lock, taken = _lock(home, fcntl.LOCK_EX)
    if not taken:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise ServerError(
            f"another server (process {holder}) runs in {home}: stop it, or choose another --home"
        )
    _write_pid(lock)
    return lock


def take_gateway(home: Path, gateway: str) -> contextlib.ExitStack:
    """Make the home folder and hold it beside other gateways; keep the result.

    Raises:
        ServerError: not writable, a server holds the home for itself, or a gateway has this name.
        HomeError: the name is malformed.
    """
    own = folder_of(home, gateway)
    with contextlib.ExitStack() as stack:
        beside, taken = _lock(home, fcntl.LOCK_SH)
        stack.callback(beside.close)
        if not taken:
            raise ServerError(
                f"a server runs in {home} without --gateway, and so for itself: stop it, and start"
                " it again with --database and --gateway NAME"
            )
        lock, taken = _lock(own, fcntl.LOCK_EX)
        stack.callback(lock.close)
        if not taken:
            raise ServerError(f"a gateway named {gateway!r} runs in {home}: choose another name")
        _write_pid(lock)
        return stack.pop_all()


def _lock(folder: Path, operation: int) -> tuple[IO[str], bool]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        lock = (folder / "server.lock").open("a+")
    except OSError as error:
        raise ServerError(str(durable.storage_error(folder, error))) from error
    try:
        fcntl.flock(lock, operation | fcntl.LOCK_NB)
    except OSError:
        return lock, False
    return lock, True


def _write_pid(lock: IO[str]) -> None:
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()


def open_repository(
    home: Path, *, offline_keys: Path | None, passphrases: Passphrases, now: datetime
) -> Repository:
    """The signed repository with its online key; made at the first start.

    Args:
        home: the server's home.
        offline_keys: root and adapter keys made before (``airpeft keys init``); None makes them in
            ``<home>/offline-keys``. They are read at the first start only.
        passphrases: of the key files.
        now: with a zone.

    Raises:
        ServerError: the given folder lacks a key.
        FederationError: a key or the repository cannot be read or made.
        StorageError: the disk refused.
    """
    folder = home / "repository"

    def find(keyid: str) -> Signer:
        return online_signer(home, keyid, passphrases.online)

    if (folder / "metadata" / "timestamp.json").exists():
        with lock_of(folder).held():
            finish(folder)
            named = Reading(folder).online_keyid()
        return Repository(folder, find(named), find)
    online = key_folder(home / ONLINE_FOLDER, (ONLINE_NAME,), passphrases.online)
    signer = online.signer(ONLINE_NAME, passphrases.online)
    names = (*ROOT_NAMES, *ADAPTER_NAMES)
    if offline_keys is None:
        offline = key_folder(home / "offline-keys", names, passphrases.offline)
        log.warning(
            "the offline keys were made in %s: move this folder to a machine without network;"
            " the server never needs it again",
            offline.path,
        )
    else:
        offline = KeyFolder(offline_keys)
        missing = sorted(set(names) - set(offline.names()))
        if missing:
            raise ServerError(
                f"{offline_keys} lacks {', '.join(missing)}: make keys with: airpeft keys init"
            )
    Repository.create(
        folder,
        root_keys=offline.signers("root-", passphrases.offline),
        adapter_keys=offline.signers("adapters-", passphrases.offline),
        online=signer,
        now=now,
    )
    return Repository(folder, signer, find)


def last_ports(home: Path) -> dict[str, int]:
    """The ports of the last start, so that devices find a server that was started again."""
    try:
        ports = json.loads((home / "ports.json").read_bytes())
        return {name: int(port) for name, port in ports.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
