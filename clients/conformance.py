"""``airpeft-tuf-conformance``: the device's verification behind the official suite's command line.

The suite (theupdateframework/tuf-conformance) starts a client for every step::

    airpeft-tuf-conformance --metadata-dir D init ROOT
    airpeft-tuf-conformance --metadata-dir D --metadata-url U refresh
    airpeft-tuf-conformance --metadata-dir D --metadata-url U --target-name P --target-base-url B
        --target-dir T download

and ends with 0 if all of it succeeded, else with 1. What verifies is what devices run,
:class:`clients.trust_metadata.Verification`; what differs lies around it:

* files come by HTTP, one by one and only when needed, instead of in one pushed bundle;
* the memory is the one of the specification (5.3.11, 5.4.3, 5.5.5): the files that were believed
  last, in D. A device's own marks (:mod:`clients.trust_state`) are stricter: they belong to the
  keys of each role, so that a new snapshot key alone does not let targets go back, which the suite
  asks for. They start empty here, and nothing else is relaxed;
* delegations are searched to any depth for the one target that is asked for, instead of loading
  the roles of a fleet.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import socket
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from tuf.api.exceptions import LengthOrHashMismatchError

from aggregation import durable
from aggregation.errors import AggregationError
from clients.errors import ClientError
from clients.link import Watchdog
from clients.trust_metadata import Verification, check_root
from clients.trust_state import TrustState

MAX_DELEGATIONS = 32
SILENCE = 10.0  # seconds without a byte
DEADLINE = 120.0  # seconds for one file, however steadily it drips
CHUNK = 65_536
_LEGAL = "/!$&'()*+,;=:@~%"  # of a URL's path, not to be quoted again


class DownloadError(ClientError):
    """A file that could not be had, or is not what was signed; says which and why."""


class Repository:
    """Metadata by HTTP, with a folder of what was believed last.

    Args:
        folder: D; files are named by role, not by version.
        url: U.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._url = url if url.endswith("/") else f"{url}/"

    def remote(self, name: str, limit: int) -> bytes | None:
        """See :class:`clients.trust_source.Source`."""
        return get(self._url + name, limit)

    def local(self, role: str) -> bytes | None:
        """See :class:`clients.trust_source.Source`."""
        path = self._path(role)
        return path.read_bytes() if path.is_file() else None

    def keep(self, role: str, data: bytes) -> None:
        """See :class:`clients.trust_source.Source`."""
        durable.write_bytes(self._path(role), data)

    def _path(self, role: str) -> Path:
        return self._folder / f"{quote(role, safe='')}.json"


def get(url: str, limit: int) -> bytes | None:
    """A file by HTTP; None if there is none.

    Args:
        url: of the file, quoted as it is to be sent.
        limit: bytes that it may have at most.

    Raises:
        DownloadError: no answer, another status, too many bytes, too slow.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=SILENCE)
    late, link = threading.Event(), list[socket.socket]()

    def cut() -> None:
        late.set()
        for one in link:
            with contextlib.suppress(OSError):  # past TLS, which would wait for an answer
                socket.socket.shutdown(one, socket.SHUT_RDWR)

    target = parts.path + (f"?{parts.query}" if parts.query else "")
    try:
        # A byte now and then, also among the headers, is no silence: so the whole has a deadline.
        with Watchdog(DEADLINE, cut):
            connection.connect()
            link.append(connection.sock)  # which it forgets when the answer is the last one
            found = _read(connection, target, limit)
    except (OSError, ValueError, http.client.HTTPException, DownloadError) as error:
        if not late.is_set():
            raise DownloadError(f"{url}: {error or type(error).__name__}") from error
    finally:
        connection.close()
    if late.is_set():  # and what seems to be the end was ours
        raise DownloadError(f"{url}: not here after {DEADLINE:g} seconds")
    return found


def _read(connection: http.client.HTTPConnection, path: str, limit: int) -> bytes | None:
    # The path goes out as it is: a quoted slash in a role's name must stay one name.
    connection.request("GET", path)
    answer = connection.getresponse()
    if answer.status in (403, 404):
        return None
    if answer.status != 200:
        raise DownloadError(f"HTTP {answer.status}")
    found = bytearray()
    while chunk := answer.read(min(CHUNK, limit + 1 - len(found))):
        found += chunk
        if len(found) > limit:
            raise DownloadError(f"more than the {limit} bytes that it may have")
    return bytes(found)


class Client:
    """One run of the client: verify from the root that is trusted now, then download.

    Args:
        folder: D.
        url: U.
        now: the time, with a zone.
    """

    def __init__(self, folder: Path, url: str, now: datetime) -> None:
        try:
            root = (folder / "root.json").read_bytes()
        except OSError as error:
            raise ClientError(f"{folder} has no trusted root: run init first") from error
        self._walk = Verification(
            Repository(folder, url),
            embedded=root,
            known={},
            state=TrustState(),
            now=now,
            built_unix=0,
        )
        self._trusted: Any = None

    def refresh(self) -> None:
        """Bring the top-level metadata up to date.

        Raises:
            Refused: it must not be believed.
        """
        with self._walk.refusals():
            self._trusted = self._walk.top_level()

    def find(self, path: str) -> Any:
        """The signed entry of a target, depth first in order of delegation (specification 5.6.7).

        Raises:
            Refused: a role on the way must not be believed.
            ClientError: no role lists it.
        """
        with self._walk.refusals():
            waiting, visited = [("targets", "root")], set[str]()
            while waiting and len(visited) <= MAX_DELEGATIONS:
                role, delegator = waiting.pop()
                if role in visited:
                    continue
                targets = self._trusted.targets
                if role != "targets":
                    targets = self._walk.load(self._trusted, role, delegator)
                if path in targets.targets:
                    return targets.targets[path]
                visited.add(role)
                children = []
                if targets.delegations is not None:
                    for child, terminating in targets.delegations.get_roles_for_target(path):
                        children.append((child, role))
                        if terminating:
                            waiting = []
                            break
                waiting += reversed(children)
        raise ClientError(f"no trusted role lists {path}")

    def download(self, path: str, base: str, folder: Path) -> None:
        """Fetch a target, unless the folder has it already.

        Raises:
            Refused: metadata must not be believed.
            ClientError: no such target, or not the signed bytes.
            StorageError: the disk refused.
        """
        target, kept = self.find(path), folder / quote(path, safe="")
        if kept.is_file() and _matches(target, kept.read_bytes()):
            return
        name = path
        if self._trusted.root.consistent_snapshot:
            parent, slash, last = path.rpartition("/")
            name = f"{parent}{slash}{next(iter(target.hashes.values()))}.{last}"
        start = base if base.endswith("/") else f"{base}/"
        data = get(start + quote(name, _LEGAL), target.length)
        if data is None or not _matches(target, data):
            raise DownloadError(f"{path}: the repository does not hand out the signed bytes")
        durable.write_bytes(kept, data)


def init(folder: Path, root: Path) -> None:
    """Trust a root for the first time; nothing is asked of the repository.

    Raises:
        Refused: it is none, or not signed by its own keys.
        StorageError: the folder can't be written.
    """
    data = root.read_bytes()
    check_root(data)
    durable.write_bytes(folder / "root.json", data)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code, which is 0 or 1 and nothing else."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as end:
        return 1 if end.code else 0
    folder = Path(options.metadata_dir)
    try:
        if options.command == "init":
            init(folder, Path(options.trusted_root))
            return 0
        if not options.metadata_url:
            raise ClientError("--metadata-url is needed")
        client = Client(folder, options.metadata_url, datetime.now(UTC))
        client.refresh()
        if options.command == "download":
            if not (options.target_name and options.target_base_url and options.target_dir):
                raise ClientError("--target-name, --target-base-url and --target-dir are needed")
            for name in options.target_name:
                client.download(name, options.target_base_url, Path(options.target_dir))
        return 0
    except (ClientError, AggregationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _matches(target: Any, data: bytes) -> bool:
    try:
        target.verify_length_and_hashes(data)
    except LengthOrHashMismatchError:
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="airpeft-tuf-conformance",
        description="The device's verification of metadata, as the official TUF client conformance "
        "suite calls it.",
        epilog="Example: airpeft-tuf-conformance --metadata-dir ./md init root.json && "
        "airpeft-tuf-conformance --metadata-dir ./md --metadata-url http://host/metadata refresh",
    )
    parser.add_argument("--metadata-dir", required=True, help="trusted metadata, kept by role")
    parser.add_argument("--metadata-url", help="the repository's metadata")
    parser.add_argument("--target-name", action="append", help="a target; may be repeated")
    parser.add_argument("--target-base-url", help="the repository's targets")
    parser.add_argument("--target-dir", help="where downloads go")
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("init", help="trust a root")
    begin.add_argument("trusted_root", help="file with root metadata")
    commands.add_parser("refresh", help="bring metadata up to date")
    commands.add_parser("download", help="bring metadata up to date, then download targets")
    return parser


if __name__ == "__main__":
    sys.exit(main())
