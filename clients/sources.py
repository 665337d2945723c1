"""Where a device gets releases from: its fleet, HTTPS servers, relays, folders on a stick.

A setting lists them in order, ``["fleet", "https://mirror.example.org", "/media/stick"]``. Nothing
that a source says is believed: metadata goes to :mod:`clients.trust` and payloads are checked
against the signed digest, the same code for every source. What differs is who is asked first.

* Payloads are fetched from the first source that brings them; the next one goes on at the byte
  where it stopped (:mod:`clients.download`).
* Metadata comes pushed from the fleet. While the fleet is away, or not among the sources, the
  others are asked in order, every ``seconds``.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from clients.connection import Connection, ConnectionLost, Denied
from clients.download import Count, Download, Way
from clients.errors import ClientError
from clients.trust_source import (
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_ROOT_BYTES,
    MAX_TIMESTAMP_BYTES,
)
from protos.messages import MetadataBundle

log = logging.getLogger("airpeft.clients.sources")

FLEET = "fleet"
MIRROR_SECONDS = 300.0
BLOCK = 64 * 1024  # bytes read from a folder at once
NEW_ROOTS = 64  # of one visit; what they teach is kept, and the next visit goes on
_ROLE = re.compile(r"[a-z][a-z0-9_-]{0,63}\.json\Z", re.ASCII)
_FILE = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]{0,254}/){0,8}[A-Za-z0-9][A-Za-z0-9._-]{0,254}\Z")


class SourceError(ClientError):
    """A source that is none; says what may stand there."""


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
            # Not blocking: a pipe under that name must not hold the device for ever.
            descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb", buffering=0) as stream:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise Denied("not-found", f"{file} is not an ordinary file")
                stream.seek(offset)
                while data := stream.read(BLOCK):
                    yield data
        except FileNotFoundError:
            raise Denied("not-found", f"{file} is not there") from None
        except OSError as error:
            raise ConnectionLost(f"{file}: {error.strerror or error}") from error


class Sources:
    """A device's sources in order.

    Args:
        order: names; ``fleet`` stands for the fleet.
        mirrors: those among them that are mirrors, by name.
        seconds: between two rounds of asking the mirrors for metadata.
        clock: monotonic seconds.
        count: told of each try of a source, for metrics.
    """

    def __init__(
        self,
        order: Sequence[str] = (FLEET,),
        mirrors: Mapping[str, Mirror] | None = None,
        *,
        seconds: float = MIRROR_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        count: Count = lambda source, result: None,
    ) -> None:
        self._order, self._mirrors = tuple(order), dict(mirrors or {})
        self._seconds, self._clock, self._count = seconds, clock, count
        self._next_visit = 0.0

    @property
    def has_fleet(self) -> bool:
        """Whether the fleet is among them."""
        return FLEET in self._order

    def download(self, path: str, length: int, fleet: Connection | None) -> Download:
        """One payload, from whichever source has it.

        Args:
            path: of the payload in the repository.
            length: its signed length, bytes.
            fleet: the connection, if there is one.
        """
        ways = []
        for name in self._order:
            if name != FLEET:
                ways.append(Way(name, self._mirrors[name].fetch))
            elif fleet is not None:
                ways.append(Way(name, fleet.fetch))
        return Download(ways, path, length, count=self._count)

    def places(self, fleet: Connection | None) -> list[tuple[str, Mirror | Connection]]:
        """Where a wrapped content key may be had, in order: names, and whom to ask."""
        found: list[tuple[str, Mirror | Connection]] = []
        for name in self._order:
            if name != FLEET:
                found.append((name, self._mirrors[name]))
            elif fleet is not None:
                found.append((name, fleet))
        return found

    def visit(self, root_version: int, timestamp_version: int) -> Iterator[tuple[str, Any]]:
        """What the mirrors have, in order, as ``(name, bundle)``; nothing while it isn't due.

        Args:
            root_version: the highest root trusted.
            timestamp_version: the highest seen; a mirror that lags behind it is passed over.
        """
        if not self._mirrors or self._clock() < self._next_visit:
            return
        self._next_visit = self._clock() + self._seconds
        for name in (name for name in self._order if name != FLEET):
            try:
                bundle = read_bundle(self._mirrors[name], root_version)
                version = _document(bundle.files["timestamp.json"], "timestamp.json").get("version")
            except (ConnectionLost, Denied) as error:
                log.info("source %s: %s", name, error)
                self._count(name, "lost")
                continue
            if type(version) is int and version < timestamp_version:
                log.info("source %s lags: %d, seen is %d", name, version, timestamp_version)
                self._count(name, "lags")
                continue
            self._count(name, "metadata")
            yield name, bundle

    def pause(self, reconnect: float) -> float:
        """Seconds to wait, given what the back-off of the fleet says."""
        return reconnect if self.has_fleet else max(0.0, self._next_visit - self._clock())


def open_sources(
    order: Sequence[str],
    *,
    seconds: float = MIRROR_SECONDS,
    authorities: Sequence[bytes] = (),
    count: Count = lambda source, result: None,
) -> Sources:
    """Sources from a setting.

    Args:
        order: ``fleet``, ``https://...`` (``http://`` on loopback only), absolute folders.
        seconds: as for :class:`Sources`.
        authorities: certificates (PEM) that HTTPS servers may be signed by, beside the system's.
        count: as for :class:`Sources`.

    Raises:
        SourceError: one of them is none of these, or stands there twice.
    """
    if not order or len(set(order)) != len(order):
        raise SourceError(f"sources {list(order)!r}: at least one, and each of them once")
    mirrors: dict[str, Mirror] = {}
    for text in order:
        if text == FLEET:
            continue
        if Path(text).is_absolute():
            mirrors[text] = FolderMirror(Path(text))
        elif _is_address(text):
            from clients.https import HttpsMirror  # a device without such a source loads no httpx

            try:
                mirrors[text] = HttpsMirror(text, authorities=authorities)
            except (OSError, ValueError) as error:
                raise SourceError(f"source {text!r}: a certificate is not PEM: {error}") from None
        else:
            raise SourceError(
                f"source {text!r}: give 'fleet', https://HOST[:PORT][/PATH] "
                "(http:// on loopback only), or the absolute path of a folder"
            )
    return Sources(order, mirrors, seconds=seconds, count=count)


def read_bundle(mirror: Mirror, after_root: int) -> MetadataBundle:
    """The metadata of a mirror, found as it leads from file to file; nothing of it is believed.

    Args:
        mirror: any.
        after_root: roots up to this version are not needed.

    Raises:
        ConnectionLost: it cannot be read, or makes no sense.
        Denied: a file is missing.
    """
    files: dict[str, bytes] = {}
    for number in range(after_root + 1, after_root + 1 + NEW_ROOTS):
        name = f"{number}.root.json"
        try:
            files[name] = mirror.read(f"metadata/{name}", MAX_ROOT_BYTES)
        except Denied:
            break  # that one was the last
    timestamp = mirror.read("metadata/timestamp.json", MAX_TIMESTAMP_BYTES)
    files["timestamp.json"] = timestamp
    listed = _versions(timestamp, "timestamp.json")
    name = f"{listed.get('snapshot.json', 0)}.snapshot.json"
    files[name] = mirror.read(f"metadata/{name}", MAX_FILE_BYTES)
    for role, version in _versions(files[name], name).items():
        file = f"{version}.{role}"
        files[file] = mirror.read(f"metadata/{file}", MAX_FILE_BYTES)
    return MetadataBundle(files)


def whole(parts: Iterator[bytes], limit: int, what: str) -> bytes:
    """All parts as one, if they are not more than ``limit`` bytes.

    Raises:
        ConnectionLost: they are.
    """
    data = bytearray()
    for part in parts:
        data += part
        if len(data) > limit:
            raise ConnectionLost(f"{what}: longer than {limit} bytes")
    return bytes(data)


def checked(path: str) -> str:
    """A path of the repository: below it, without any trick.

    Raises:
        Denied: it is none.
    """
    if not _FILE.match(path) or ".." in path:
        raise Denied("not-found", f"{path[:80]!r} is not a path of a repository")
    return path


def _versions(data: bytes, what: str) -> dict[str, int]:
    meta = _document(data, what).get("meta")
    found: dict[str, int] = {}
    for name, entry in meta.items() if isinstance(meta, dict) else ():
        version = entry.get("version") if isinstance(entry, dict) else None
        if _ROLE.match(name) and type(version) is int and 0 < version < 10**16:
            found[name] = version
    if not found or len(found) > MAX_FILES:
        raise ConnectionLost(f"{what} lists {len(found)} files")
    return found


def _document(data: bytes, what: str) -> dict[str, Any]:
    try:
        signed = json.loads(data)["signed"]
    except (ValueError, KeyError, TypeError, RecursionError):
        signed = None
    if not isinstance(signed, dict):
        raise ConnectionLost(f"{what} is not metadata")
    return signed


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return False
    if parts.query or parts.fragment or parts.username or not host:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
