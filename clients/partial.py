"""A download that survives kills, and the errors of a disk that takes no more.

The file is named by the signed hash, so it can only ever be finished as those very bytes; it is
appended to without a buffer, so that a SIGKILL loses none that had arrived.
"""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from aggregation.durable import StorageError
from clients.connection import ConnectionLost
from clients.errors import ClientError
from clients.health import NoSpace
from clients.link import Backoff

Fetch = Callable[[int], Iterator[bytes]]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class PayloadMismatch(ClientError):  # noqa: N818  (named by the reason that it is reported with)
    """Fetched bytes are not the signed ones; what was fetched has been deleted."""


class Partial:
    """A download that survives kills. ``offset`` says where to go on.

    Raises:
        NoSpace: there is no room for the folder that it lies in.
        StorageError: another reason why it cannot be made.
    """

    def __init__(self, path: Path, sha256: str, length: int) -> None:
        self._path, self._sha256, self.length = path, sha256, length
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(path.parent, error) from error
        if self.offset > length:
            self.discard()

    @property
    def offset(self) -> int:
        """Bytes that are there."""
        return self._path.stat().st_size if self._path.exists() else 0

    def append(self, data: bytes) -> None:
        """Add the next bytes.

        Raises:
            PayloadMismatch: more bytes than were signed; the file is deleted.
            NoSpace: the disk is full; what fitted stays for the next try.
            StorageError: another failure to write.
        """
        if self.offset + len(data) > self.length:
            self.discard()
            raise PayloadMismatch(f"more than the {self.length} bytes that were signed")
        try:
            with self._path.open("ab", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
        except OSError as error:
            raise storage_error(self._path, error) from error

    def finish(self) -> bytes:
        """The whole content, if it is what was signed.

        Raises:
            PayloadMismatch: another length or hash; the file is deleted, so the next try is clean.
        """
        data = self._path.read_bytes() if self._path.exists() else b""
        found = hashlib.sha256(data).hexdigest()
        if len(data) != self.length or found != self._sha256:
            self.discard()
            raise PayloadMismatch(
                f"fetched {len(data)} bytes with sha256 {found[:16]}…, "
                f"signed are {self.length} bytes with {self._sha256[:16]}…"
            )
        return data

    def discard(self) -> None:
        """Forget what was fetched."""
        self._path.unlink(missing_ok=True)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that the disk or a quota of it is used up."""
    while error is not None:
        if isinstance(error, NoSpace) or (isinstance(error, OSError) and error.errno in _FULL):
            return True
        error = error.__cause__
    return False


def fill(
    partial: Partial, fetch: Fetch, *, backoff: Backoff, stop: threading.Event, tries: int
) -> None:
    """Go on where a download stopped, through any number of cuts that let some bytes pass.

    Args:
        partial: what is there already.
        fetch: the payload's bytes from an offset on.
        backoff: waits between two cuts.
        stop: ends the waiting.
        tries: consecutive cuts without a byte between them, before the link is given up.

    Raises:
        ConnectionLost: given up; what is there stays.
        PayloadMismatch: more bytes than were signed.
        NoSpace: the disk is full.
    """
    vain = 0
    while partial.offset < partial.length:
        start = partial.offset
        try:
            for chunk in fetch(start):
                partial.append(chunk)
            break
        except ConnectionLost as lost:
            vain = 0 if partial.offset > start else vain + 1
            if vain >= tries or stop.wait(backoff.next(lost.retry_after)):
                raise
    backoff.reset()


def storage_error(path: Path, error: BaseException | None) -> ClientError | StorageError:
    """The error with its remedy: a full disk is the device's to report, and passes."""
    if is_full(error):
        return NoSpace(f"{path}: the disk is full: free some space; the device tries again")
    return StorageError(f"cannot write {path}: {error}")
