"""What a repository's folder offers, to devices, operators and makers of releases; read only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from federation.metadata_files import load
from federation.published import Expiry, NotFoundError, Published, ReleaseRecord
from protos.messages import MetadataBundle
from protos.signed import ADAPTERS_ROLE, RoundDocument, Standing

_METADATA_NAME = re.compile(r"(timestamp|[0-9]{1,16}\.[a-z][a-z0-9-]{0,40})\.json\Z", re.ASCII)


class Reading:
    """The reading half of a repository.

    Args:
        folder: of the repository.

    Raises:
        RepositoryError: there is none, a file is missing or does not verify.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state: Published = load(folder)

    def bundle(self, after_root: int = 0) -> MetadataBundle:
        """All that a device needs in order to decide, as it is pushed to devices.

        Args:
            after_root: leave out root versions up to this one, which the device trusts already.
        """
        return self._state.bundle(after_root)

    def root(self) -> bytes:
        """The newest root, as signed: what a device is given at enrolment and trusts ever after.

        Not the first one: whoever has come by keys that were replaced since could lead a device
        that starts there astray.
        """
        return self._state.roots[-1]

    def adapters(self, channel: str = "") -> bytes:
        """The current metadata of the role that signs a channel's releases.

        Raises:
            NotFoundError: no role may sign releases of that channel.
        """
        return self._state.files[self._state.role_of(channel) if channel else ADAPTERS_ROLE]

    def offline(self) -> dict[str, bytes]:
        """The files that offline keys sign, by role: what a change of keys is made from."""
        names = ("root", "targets", *self._state.adapter_roles)
        return {role: self._state.files[role] for role in names}

    def in_use(self) -> frozenset[str]:
        """Targets that the current round hands out."""
        return frozenset(a.target for a in self._state.round.assignments if not a.is_base)

    def online_keyid(self) -> str:
        """Identifier of the online key that the root names."""
        return str(self._state.signed["root"].roles["timestamp"].keyids[0])

    def standing(self) -> Mapping[str, Standing]:
        """What each role that signs releases says of those that are out already."""
        return self._state.standing

    def check_orderable(self, record: ReleaseRecord) -> None:
        """Refuse to begin with what every device would refuse.

        Raises:
            PublishError: it is revoked, or below its channel's floor.
        """
        self._state.check_orderable(record)

    def refusal(self, name: str) -> str:
        """Why every device would refuse a release; empty if they would not.

        Args:
            name: of a release; empty for the base model alone.
        """
        return self._state.refusal(name)

    def releases(self) -> tuple[ReleaseRecord, ...]:
        """Every release that the adapter keys vouch for, by channel and counter."""
        return self._state.releases

    def release(self, name: str) -> ReleaseRecord:
        """One release by name, such as ``stable-3``.

        Raises:
            NotFoundError: there is none of that name; names those there are.
        """
        return self._state.release(name)

    def round(self) -> RoundDocument:
        """The round in force; sequence 0 before the first."""
        return self._state.round

    def versions(self) -> Mapping[str, int]:
        """The current version of each role."""
        return {expiry.role: expiry.version for expiry in self.expiries()}

    def expiries(self) -> tuple[Expiry, ...]:
        """When each role's file expires, soonest first."""
        rows = [
            Expiry(role, signed.version, signed.expires)
            for role, signed in self._state.signed.items()
        ]
        return tuple(sorted(rows, key=lambda row: row.expires))

    def locate(self, path: str) -> Path:
        """The file behind a path of the repository, an opaque key such as devices ask for.

        Raises:
            NotFoundError: nothing that is offered; the path is never followed outside.
        """
        folder, _, name = path.partition("/")
        known = path in self._state.payloads or (
            folder == "metadata" and _METADATA_NAME.match(name) is not None
        )
        file = self.folder / path
        if not known or not file.is_file():
            raise NotFoundError(f"the repository has no file {path[:200]!r}")
        return file

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of one file, from an offset on.

        Raises:
            NotFoundError: as for :meth:`locate`, or an offset behind the end.
        """
        file = self.locate(path)
        if not 0 <= offset <= file.stat().st_size:
            raise NotFoundError(f"{path[:200]!r} has no byte {offset}")
        with file.open("rb") as stream:
            stream.seek(offset)
            return stream.read(-1 if length is None else length)
