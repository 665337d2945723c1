"""Who signed what, and when: a repository's files judged by its root alone.

Nothing is needed but the root that one trusts and the files, from wherever they came. Every file
is reached from that root, every signature is counted, every payload that is there is hashed.
Unlike a device, this reports what has expired instead of refusing it, so that one can look at an
old copy too; what does not verify is an error here as there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from federation.keys import key_name
from federation.metadata_files import load, without_revoked
from federation.published import Published, ReleaseRecord, RepositoryError
from federation.roles import in_seconds
from protos.signed import ROUNDS_ROLE, SIGNED_UNIX, RoundDocument

TOP_LEVEL = ("root", "timestamp", "snapshot", "targets")


@dataclass(frozen=True, kw_only=True)
class RoleSeal:
    """One role's file, and whose signatures under it are good.

    Attributes:
        role: its name.
        version: of the file.
        signed_by: names of the keys with a good signature, each once.
        threshold: how many there must be.
        made: when the file was made, as it says itself; None if it does not say.
        expires: until when devices believe it.
        expired: whether that is past.
    """

    role: str
    version: int
    signed_by: tuple[str, ...]
    threshold: int
    made: datetime | None
    expires: datetime
    expired: bool


@dataclass(frozen=True, kw_only=True)
class VerifiedRelease:
    """One release.

    Attributes:
        record: what is signed of it.
        payload: ``good``, ``missing`` or ``wrong``.
        role: the role whose file lists it.
        signed_by: names of the keys whose good signatures are under that file.
        revoked: why it is revoked; empty if it is not.
    """

    record: ReleaseRecord
    payload: str
    role: str
    signed_by: tuple[str, ...]
    revoked: str = ""


@dataclass(frozen=True, kw_only=True)
class VerifiedRepository:
    """All that the root vouches for."""

    roles: tuple[RoleSeal, ...]
    releases: tuple[VerifiedRelease, ...]
    round: RoundDocument

    @property
    def sound(self) -> bool:
        """Whether no payload is wrong and nothing has expired."""
        payloads = all(release.payload != "wrong" for release in self.releases)
        return payloads and not any(role.expired for role in self.roles)


def verify_repository(folder: Path, root: bytes, *, now: datetime) -> VerifiedRepository:
    """Judge the files of a repository by one of its roots.

    Args:
        folder: a repository or a copy of it, with ``metadata/`` and perhaps ``targets/``.
        root: the root metadata that one trusts.
        now: the time, with a zone.

    Raises:
        RepositoryError: a file is missing or does not verify, or the repository has another root.
    """
    state = load(folder)
    if root not in state.roots:
        raise RepositoryError(
            f"the repository in {folder} does not descend from the given root: "
            "it is another one, or somebody has replaced its root"
        )
    names = (*TOP_LEVEL, *state.adapter_roles, ROUNDS_ROLE)
    seals = {role: _seal(state, role, now) for role in names}
    releases = []
    for record in state.releases:
        role, revoked = state.role_of(record.statement.channel), state.revocation(record)
        releases.append(
            VerifiedRelease(
                record=record,
                payload=_payload(folder / record.path, record),
                role=role,
                signed_by=seals[role].signed_by,
                revoked=revoked.why if revoked else "",
            )
        )
    return VerifiedRepository(
        roles=tuple(seals.values()), releases=tuple(releases), round=state.round
    )


def _seal(state: Published, role: str, now: datetime) -> RoleSeal:
    metadata: Any = state.metadata[role]
    above = state.signed["root"]
    if role not in TOP_LEVEL:
        above = without_revoked(above, state.signed["targets"])
    result = above.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    made = metadata.signed.unrecognized_fields.get(SIGNED_UNIX)
    return RoleSeal(
        role=role,
        version=metadata.signed.version,
        signed_by=tuple(sorted(key_name(key) for key in result.signed.values())),
        threshold=result.threshold,
        made=_moment(made),
        expires=metadata.signed.expires,
        expired=metadata.signed.is_expired(in_seconds(now)),
    )


def _moment(made: Any) -> datetime | None:
    """What a file says of when it was made; whoever has its key may say what they like."""
    try:
        return datetime.fromtimestamp(made, UTC) if type(made) is int else None
    except (ValueError, OverflowError, OSError):
        return None


def _payload(path: Path, record: ReleaseRecord) -> str:
    if not path.is_file():
        return "missing"
    if path.stat().st_size != record.length:
        return "wrong"
    with path.open("rb") as stream:
        return (
            "good"
            if hashlib.file_digest(stream, "sha256").hexdigest() == record.sha256
            else ("wrong")
        )
