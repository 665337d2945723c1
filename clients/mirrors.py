"""A static copy of the repository: what it is to a device, and one in a folder.

Nothing that it says is believed (:mod:`clients.trust`), and nothing that it does may hold a device
up, fill its memory, or lead it to files that are not the copy's.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from clients.connection import ConnectionLost, Denied
from clients.download import GRACE, SLOWEST

BLOCK = 64 * 1024  # bytes read from a folder at once
_FILE = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]{0,254}/){0,8}[A-Za-z0-9][A-Za-z0-9._-]{0,254}\Z")


class Mirror(Protocol):
    """A static copy of the repository. Both verbs raise ``ConnectionLost`` or ``Denied``."""

    @property
    def name(self) -> str:
        """As it stands in the settings."""

    def read(self, path: str, limit: int) -> bytes:
        """A whole file, of at most ``limit`` bytes."""

    def fetch(self, path: str, offset: int) -> Iterator[bytes]:
        """A file's bytes from an offset to its end."""


class FolderMirror:
    """A folder with a copy of the repository, on a stick for instance; it may come and go.

    Args:
        folder: absolute.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def name(self) -> str:
        """The folder."""
        return str(self._folder)

    def read(self, path: str, limit: int) -> bytes:
        """A whole file.

        Raises:
            Denied: it is not there.
            ConnectionLost: it cannot be read, or is longer than ``limit``.
        """
        return whole(self.fetch(path, 0), limit, f"{self._folder}/{path}")

    def fetch(self, path: str, offset: int) -> Iterator[bytes]:
        """A file's bytes from an offset to its end.

        Raises:
            Denied: it is not there, or no ordinary file.
            ConnectionLost: it cannot be read (any more).
        """
        file = self._folder / checked(path)
        try:
            descriptor = self._open(path)
            with os.fdopen(descriptor, "rb", buffering=0) as stream:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise Denied("not-found", f"{file} is not an ordinary file")
                stream.seek(offset)
                while data := stream.read(BLOCK):
                    yield data
        except FileNotFoundError:
            raise Denied("not-found", f"{file} is not there") from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise Denied("not-found", f"{file} is a link, or lies behind one") from None
            raise ConnectionLost(f"{file}: {error.strerror or error}") from error

    def _open(self, path: str) -> int:
        """The file below the folder, step by step: no link leads elsewhere, no pipe holds it."""
        *folders, name = path.split("/")
        held = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for folder in folders:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                below = os.open(folder, flags, dir_fd=held)
                os.close(held)
                held = below
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(name, flags, dir_fd=held)
        finally:
            os.close(held)


def whole(
    parts: Iterator[bytes],
    limit: int,
    what: str,
    *,
    grace: float = GRACE,
    clock: Callable[[], float] = time.monotonic,
) -> bytes:
    """All parts as one, if they are not more than ``limit`` bytes, and come fast enough.

    Raises:
        ConnectionLost: they are more, or fewer than :data:`SLOWEST` a second after ``grace``.
    """
    data, begun = bytearray(), clock()
    for part in parts:
        data += part
        if len(data) > limit:
            raise ConnectionLost(f"{what}: longer than {limit} bytes")
        waited = clock() - begun
        if waited > grace and len(data) < SLOWEST * waited:
            raise ConnectionLost(f"{what}: {len(data)} bytes in {waited:.0f} seconds: too slow")
    return bytes(data)


def checked(path: str) -> str:
    """A path of the repository: below it, without any trick.

    Raises:
        Denied: it is none.
    """
    if not _FILE.match(path) or ".." in path:
        raise Denied("not-found", f"{path[:80]!r} is not a path of a repository")
    return path
