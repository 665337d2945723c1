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
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clients.connection import Connection, ConnectionLost, Denied
from clients.download import Count, Download, Way
from clients.errors import ClientError
from clients.mirrors import FolderMirror, Mirror
from clients.trust_source import (
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_ROOT_BYTES,
    MAX_TIMESTAMP_BYTES,
)
from protos.channel import MESSAGE_MAX
from protos.messages import MetadataBundle

log = logging.getLogger("airpeft.clients.sources")

FLEET = "fleet"
MIRROR_SECONDS = 300.0
BUNDLE_SECONDS = 600.0  # for all metadata of one mirror
NEW_ROOTS = 64  # of one visit; what they teach is kept, and the next visit goes on
_ROLE = re.compile(r"[a-z][a-z0-9_-]{0,63}\.json\Z", re.ASCII)


class SourceError(ClientError):
    """A source that is none; says what may stand there."""


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


def read_bundle(
    mirror: Mirror,
    after_root: int,
    *,
    seconds: float = BUNDLE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> MetadataBundle:
    """The metadata of a mirror, found as it leads from file to file; nothing of it is believed.

    Args:
        mirror: any.
        after_root: roots up to this version are not needed.
        seconds: that all of it may take.
        clock: monotonic seconds.

    Raises:
        ConnectionLost: it cannot be read, is too much or too slow, or makes no sense.
        Denied: a file is missing.
    """
    files: dict[str, bytes] = {}
    end = clock() + seconds

    def read(name: str, limit: int) -> bytes:
        # What a device takes from its fleet at once it takes from others, and not more.
        left = MESSAGE_MAX - sum(map(len, files.values()))
        if clock() > end:
            raise ConnectionLost(f"its metadata was not here after {seconds:g} seconds")
        return mirror.read(f"metadata/{name}", min(limit, left))

    for number in range(after_root + 1, after_root + 1 + NEW_ROOTS):
        name = f"{number}.root.json"
        try:
            files[name] = read(name, MAX_ROOT_BYTES)
        except Denied:
            break  # that one was the last
    timestamp = read("timestamp.json", MAX_TIMESTAMP_BYTES)
    files["timestamp.json"] = timestamp
    listed = _versions(timestamp, "timestamp.json")
    name = f"{listed.get('snapshot.json', 0)}.snapshot.json"
    files[name] = read(name, MAX_FILE_BYTES)
    for role, version in _versions(files[name], name).items():
        file = f"{version}.{role}"
        files[file] = read(file, MAX_FILE_BYTES)
    return MetadataBundle(files)


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
