"""A repository as static files elsewhere: copied to a folder, found by the paths devices ask for.

A mirror holds no key and decides nothing: a device verifies what it reads there exactly as if the
server had sent it. ``export_mirror`` copies what is current, verified, in an order that leaves the
copy usable whenever it is interrupted: payloads, then metadata, and ``timestamp.json`` last.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from aggregation import durable
from federation.errors import FederationError
from federation.metadata_files import load
from federation.published import NotFoundError, Published
from protos.wraps import WrapError, Wraps, wraps_path

TIMESTAMP = "metadata/timestamp.json"
METADATA = re.compile(
    r"metadata/(?:timestamp|[0-9]{1,16}\.[a-z][a-z0-9_-]{0,63})\.json\Z", re.ASCII
)
PAYLOAD = re.compile(
    r"targets/(?:[A-Za-z0-9][A-Za-z0-9._-]{0,127}/){1,4}([0-9a-f]{64})\."
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z",
    re.ASCII,
)
WRAPS = re.compile(r"wraps/[0-9a-f]{64}\.wraps\Z", re.ASCII)


class MirrorError(FederationError):
    """A mirror that cannot be made or served; says what to do."""


@dataclass(frozen=True)
class Exported:
    """What an export did, or would do.

    Attributes:
        folder: the copy.
        files: files that belong to it.
        copied: of these, those that were not there yet or were different.
        bytes: bytes copied.
        releases: names of the releases whose payloads are there.
        usable_until: when devices stop believing this copy; export again before that.
    """

    folder: Path
    files: int
    copied: int
    bytes: int
    releases: tuple[str, ...]
    usable_until: datetime


def export_mirror(
    repository: Path, folder: Path, *, only_assigned: bool = False, dry_run: bool = False
) -> Exported:
    """Copy what is current in a repository into a folder; what is there already stays.

    Args:
        repository: the ``repository`` folder of a server, or another mirror.
        folder: of the copy; made if it is missing.
        only_assigned: leave out payloads that the round in force gives to nobody.
        dry_run: only say what would be copied.

    Raises:
        MirrorError: a payload is missing or is not what its name says, or a link in the folder
            leads out of it.
        RepositoryError: there is no repository, or it does not verify.
        StorageError: the copy cannot be written; run it again and it goes on.
    """
    if folder.resolve().is_relative_to(repository.resolve()):
        raise MirrorError(f"{folder} lies inside {repository}: choose a folder outside of it")
    _check_no_link(folder)
    state = load(repository)
    wanted, names = _payloads(state, only_assigned)
    copied = count = 0
    for path in wanted:
        data = _payload(repository, path)
        if _differs(folder / path, data):
            copied, count = copied + len(data), count + 1
            if not dry_run:
                durable.write_bytes(folder / path, data)
    small = _wraps(repository, state, names)
    small |= {f"metadata/{name}": data for name, data in state.bundle(0).files.items()}
    for path in sorted(small, key=lambda name: (name == TIMESTAMP, name)):
        if _differs(folder / path, small[path]):
            copied, count = copied + len(small[path]), count + 1
            if not dry_run:
                durable.write_bytes(folder / path, small[path])
    return Exported(
        folder=folder,
        files=len(wanted) + len(small),
        copied=count,
        bytes=copied,
        releases=tuple(names),
        usable_until=min(signed.expires for signed in state.signed.values()),
    )


def _check_no_link(folder: Path) -> None:
    """Refuse a copy, on a stick for instance, that would have us write somewhere else."""
    for top in ("metadata", "targets", "wraps"):
        for found in (folder / top, *(folder / top).rglob("*/")):
            if found.is_symlink():
                raise MirrorError(f"{found} is a link: remove it, or choose another folder")


class FolderShelf:
    """A repository's folder, or a copy of it, as a mirror serves it.

    Args:
        folder: with ``metadata/`` and ``targets/``.

    Raises:
        MirrorError: there is no repository in the folder.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / TIMESTAMP).is_file():
            raise MirrorError(
                f"{folder} holds no repository ({TIMESTAMP} is missing): give the repository"
                " folder of a server, or make a copy with: airpeft mirror export"
            )
        self._folder = folder

    async def find(self, path: str) -> Path:
        """The file behind a path.

        Raises:
            NotFoundError: there is none; the path is never followed outside.
        """
        file = self._folder / checked(path)
        # A link could lead to anything that this process may read.
        if not file.is_file() or file.resolve() != self._folder.resolve() / path:
            raise NotFoundError(f"no file {path[:200]!r}")
        return file


def checked(path: str) -> str:
    """A path that a repository may have.

    Raises:
        NotFoundError: it has the form of none.
    """
    if ".." in path or not any(form.match(path) for form in (METADATA, PAYLOAD, WRAPS)):
        raise NotFoundError(f"no file {path[:200]!r}")
    return path


def digest_named(path: str) -> str | None:
    """The SHA-256 that a payload's path names; None for metadata and wrapped keys."""
    found = PAYLOAD.match(path)
    return found[1] if found else None


def _payloads(state: Published, only_assigned: bool) -> tuple[list[str], list[str]]:
    """Paths of the payloads to copy, and names of the releases among them."""
    assigned = {one.target for one in state.round.assignments}
    left_out = {r.path for r in state.releases if only_assigned and r.target not in assigned}
    names = [record.name for record in state.releases if record.path not in left_out]
    return sorted(state.payloads - left_out), names


def _wraps(repository: Path, state: Published, names: list[str]) -> dict[str, bytes]:
    """The wrapped keys of these releases, as far as they are encrypted, by path."""
    found = {}
    for record in state.releases:
        file = repository / wraps_path(record.sha256)
        if record.name in names and record.statement.seal is not None and file.is_file():
            data = file.read_bytes()
            try:
                Wraps.from_bytes(data, record.sha256)
            except WrapError as error:
                raise MirrorError(f"{file}: {error}; wrap again: airpeft release wrap") from None
            found[wraps_path(record.sha256)] = data
    return found


def _payload(repository: Path, path: str) -> bytes:
    try:
        data = (repository / path).read_bytes()
    except OSError as error:
        raise MirrorError(f"cannot read {repository / path}: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != digest_named(path):
        raise MirrorError(
            f"{repository / path} is not what its name says: devices would refuse it; put the"
            " published file back (airpeft release publish with the same files)"
        )
    return data


def _differs(file: Path, data: bytes) -> bool:
    return not file.is_file() or file.stat().st_size != len(data) or file.read_bytes() != data
