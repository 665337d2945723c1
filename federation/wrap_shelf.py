"""The wrapped content keys of a repository's encrypted releases, one file each, beside payloads.

``wraps/<sha256 of the payload>.wraps`` (:mod:`protos.wraps`). The server can open none of them: it
keeps what the maker of a release has wrapped, hands each device its own, and takes out what belongs
to a device that was revoked. A file is replaced as a whole or not at all.
"""

from __future__ import annotations

import fcntl
import functools
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509

from aggregation import durable
from federation.errors import FederationError
from protos.recipients import RecipientError, encryption_key
from protos.wraps import MAX_BYTES, WrapError, Wraps, wraps_path

FOLDER, LOCK = "wraps", ".lock"
READ = 8  # files that are kept in memory; devices ask for those of the current round


class WrapShelfError(FederationError):
    """Wrapped keys that are damaged on the disk, or for another payload."""


class NoKeyError(FederationError):
    """The device that asks has no encryption key."""


class NoWrapError(FederationError):
    """No content key was wrapped to the device that asks."""


class WrapShelf:
    """The wrapped keys in one repository's folder; safe for threads and for several processes.

    Args:
        repository: the folder with ``metadata/`` and ``targets/``.
    """

    def __init__(self, repository: Path) -> None:
        self._repository = repository
        self._lock = threading.Lock()
        self._read: dict[str, tuple[tuple[int, int], Wraps]] = {}

    def get(self, sha256: str) -> Wraps:
        """All of one payload's; empty where there are none.

        Raises:
            WrapShelfError: the file is damaged, or cannot be read.
        """
        file = self._repository / wraps_path(sha256)
        try:
            about = file.stat()
            stamp = (about.st_mtime_ns, about.st_size)
            held = self._read.get(sha256)
            if held is not None and held[0] == stamp:
                return held[1]
            with file.open("rb") as stream:
                found = Wraps.from_bytes(stream.read(MAX_BYTES + 1), sha256)
        except FileNotFoundError:
            return Wraps(sha256, {})
        except OSError as error:
            raise WrapShelfError(f"cannot read {file}: {error.strerror}") from error
        except WrapError as error:
            raise WrapShelfError(
                f"{file}: {error}; remove it and wrap again: airpeft release wrap"
            ) from None
        while len(self._read) >= READ:
            self._read.pop(next(iter(self._read)), None)
        self._read[sha256] = (stamp, found)
        return found

    def find(self, sha256: str, public: bytes) -> bytes | None:
        """One recipient's wrapped key for one payload, if there is one.

        Raises:
            WrapShelfError: the file is damaged, or cannot be read.
        """
        return self.get(sha256).find(public)

    def find_for(self, sha256: str, certificate: bytes) -> bytes:
        """The wrapped key of the device with this certificate (PEM, verified by TLS).

        Raises:
            NoKeyError: its certificate names no encryption key.
            NoWrapError: nothing was wrapped to it.
            WrapShelfError: the file is damaged, or cannot be read.
        """
        public = _encryption_key(certificate)
        if public is None:
            raise NoKeyError(
                "this device's certificate names no encryption key: update the agent, which "
                "brings one when it renews"
            )
        found = self.find(sha256, public)
        if found is None:
            raise NoWrapError(
                f"the content key of {sha256[:12]}… is not wrapped to this device (yet): "
                "airpeft release wrap"
            )
        return found

    def add(self, more: Wraps, barred: Collection[bytes] = ()) -> int:
        """Keep further wrapped keys; how many are new. Doing it again changes nothing.

        Args:
            more: of one payload.
            barred: public keys whose wrapped keys are not kept.

        Raises:
            WrapShelfError: the file is damaged, or there would be too many.
            StorageError: the disk refused; nothing has changed.
        """
        with self._alone():
            before = self.get(more.sha256)
            try:
                after = before.merged(more, barred)
            except WrapError as error:
                raise WrapShelfError(str(error)) from None
            if after != before:
                self._write(after)
            return len(after.entries.keys() - before.entries.keys())

    def drop(self, publics: Collection[bytes]) -> int:
        """Forget the wrapped keys of these recipients, of every payload; how many there were.

        Raises:
            WrapShelfError: a file is damaged.
            StorageError: the disk refused; doing it again finishes it.
        """
        gone = 0
        if not publics or not (self._repository / FOLDER).is_dir():
            return 0
        with self._alone():
            for file in sorted((self._repository / FOLDER).glob("*.wraps")):
                before = self.get(file.stem)
                after = before.merged(Wraps(file.stem, {}), publics)
                if after != before:
                    self._write(after)
                    gone += len(before.entries) - len(after.entries)
        return gone

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else changes what is here, in this process or in another."""
        folder = self._repository / FOLDER
        try:
            durable.make_folder(folder)
            with self._lock, (folder / LOCK).open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise durable.storage_error(folder, error) from error

    def _write(self, wraps: Wraps) -> None:
        durable.write_bytes(self._repository / wraps_path(wraps.sha256), wraps.to_bytes())
        self._read.pop(wraps.sha256, None)


@functools.lru_cache(maxsize=8192)
def _encryption_key(certificate: bytes) -> bytes | None:
    try:
        return encryption_key(x509.load_pem_x509_certificate(certificate))
    except (RecipientError, ValueError):
        return None  # the authority issues no such certificate
