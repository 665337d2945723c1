"""The server's own keys: the one that signs rounds, snapshot and timestamp, and its successors.

``<home>/online-key/`` holds them; the repository's root says which one counts. A new one is made
before the change that brings it in is signed, so both lie there for a while.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from aggregation import durable
from federation.errors import FederationError
from federation.keys import ONLINE_NAME, KeyFolder, Signer, generate

FOLDER = "online-key"
_NUMBERED = re.compile(rf"{ONLINE_NAME}-([0-9]{{1,6}})\Z", re.ASCII)


class OnlineKeyError(FederationError):
    """The online key that the repository names is not here; says where it was looked for."""


def online_signer(home: Path, keyid: str, passphrase: str | None) -> Signer:
    """The online key that a repository names.

    Args:
        home: the server's home.
        keyid: from its root.
        passphrase: of the key files; None where they are not encrypted.

    Raises:
        OnlineKeyError: it is not in the folder.
        KeyFileError: its file can't be read.
    """
    folder = KeyFolder(home / FOLDER)
    name = folder.find(keyid)
    if name is None:
        raise OnlineKeyError(
            f"the online key {keyid[:12]}, which the repository's root names, is not in "
            f"{folder.path}: bring it back, or replace it with: airpeft keys rotate --online"
        )
    return folder.signer(name, passphrase)


def new_online_key(home: Path, passphrase: str | None) -> Path:
    """Make the next online key beside the present one; its public half.

    Raises:
        KeyFileError: it can't be made.
        StorageError: the disk refused.
    """
    folder = KeyFolder(home / FOLDER)
    numbers = [int(m[1]) for m in map(_NUMBERED.match, folder.names()) if m]
    name = f"{ONLINE_NAME}-{max(numbers, default=1) + 1}"
    generate(folder.path, [name], passphrase=passphrase)
    return folder.path / f"{name}.pub.json"


def newest_file(home: Path) -> Path:
    """The private file of the newest online key, which tells whether they are encrypted."""
    folder = KeyFolder(home / FOLDER)
    return folder.private((folder.names() or (ONLINE_NAME,))[-1])


def key_folder(folder: Path, names: Iterable[str], passphrase: str | None) -> KeyFolder:
    """A folder of keys; they are made if there is none, all of them or nothing.

    Raises:
        KeyFileError: they can't be made.
        StorageError: the disk refused.
    """
    if not folder.exists():
        # Keys are never overwritten, so a folder of half a set must never be seen.
        partial = folder.with_name(folder.name + durable.PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        generate(partial, names, passphrase=passphrase)
        try:
            partial.replace(folder)
            durable.sync_folder(folder.parent)
        except OSError as error:
            raise durable.storage_error(folder, error) from error
    return KeyFolder(folder)
