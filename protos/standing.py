"""What the adapter keys say of releases that are out already: which are bad, and the floors.

It travels as a field of the ``adapters`` file itself, beside the releases, and is signed with them.
It only ever grows: a device that has heard of a revocation keeps it, also when a later file (or a
thief of two keys) no longer says so.

    >>> one = Revocation(release="stable-3", sha256="ab" * 32, why="leaks names", made_unix=5)
    >>> said = Standing(revoked=(one,), floors={"stable": 4})
    >>> Standing.from_field(said.to_field()) == said
    True
    >>> Standing().to_field() is None
    True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from protos.signed_checks import (
    HEX,
    REVOKED_KEYS,
    StatementError,
    check_channel,
    check_integer,
    check_object,
    check_text,
    target_name,
)

STANDING = "x-airpeft-standing"
"""Field of an ``adapters`` file."""
MAX_REVOKED = 1_000
MAX_FLOORS = 200


@dataclass(frozen=True, kw_only=True)
class Revocation:
    """A release that no device may serve any longer.

    Attributes:
        release: its name, ``<channel>-<counter>``.
        sha256: of its payload, hex.
        why: for people.
        made_unix: when it was revoked, in seconds since 1970, UTC.
    """

    release: str
    sha256: str
    why: str
    made_unix: int = 0

    def __post_init__(self) -> None:
        check_text("revoked.release", self.release, 64)
        channel, _, counter = self.release.rpartition("-")
        check_channel(channel)
        if not counter.isascii() or not counter.isdigit() or len(counter) > 16:
            raise StatementError(f"revoked.release {self.release!r} is not <channel>-<counter>")
        check_text("revoked.why", self.why, 500)
        check_integer("revoked.made_unix", self.made_unix)
        if not isinstance(self.sha256, str) or not HEX.match(self.sha256):
            raise StatementError(f"revoked.sha256 {str(self.sha256)[:80]!r} is not 64 hex digits")

    @property
    def channel(self) -> str:
        """The line of releases that it belongs to."""
        return self.release.rpartition("-")[0]

    @property
    def target(self) -> str:
        """The release's name in the repository."""
        return target_name(self.channel, int(self.release.rpartition("-")[2]))


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Revocations and floors, as one ``adapters`` file says them.

    Attributes:
        revoked: oldest first.
        floors: by channel, the counter below which nothing is installed.
    """

    revoked: tuple[Revocation, ...] = ()
    floors: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.revoked) > MAX_REVOKED or len(self.floors) > MAX_FLOORS:
            raise StatementError(
                f"at most {MAX_REVOKED} revocations and {MAX_FLOORS} floors can be said"
            )
        for channel, floor in self.floors.items():
            check_channel(channel)
            check_integer(f"floor of {channel}", floor)

    def revocation(self, sha256: str) -> Revocation | None:
        """What is said against a payload, if anything."""
        return next((one for one in self.revoked if one.sha256 == sha256), None)

    def follows(self, before: Standing) -> bool:
        """Whether nothing that was said before is taken back."""
        kept = {one.sha256 for one in before.revoked} <= {one.sha256 for one in self.revoked}
        return kept and all(self.floors.get(c, 0) >= n for c, n in before.floors.items())

    def to_field(self) -> dict[str, Any] | None:
        """The value of the field :data:`STANDING`; None if there is nothing to say."""
        if not self.revoked and not self.floors:
            return None
        return {"revoked": [asdict(one) for one in self.revoked], "floors": dict(self.floors)}

    @classmethod
    def from_field(cls, doc: Any) -> Standing:
        """Read the field, or None where there is none.

        Raises:
            StatementError: a value is missing or wrong.
        """
        if doc is None:
            return cls()
        doc = check_object("standing", doc)
        items = doc.get("revoked", [])
        if not isinstance(items, list) or len(items) > MAX_REVOKED:
            raise StatementError(f"standing.revoked must be a list of at most {MAX_REVOKED}")
        entries = [check_object("revoked", item) for item in items]
        return cls(
            revoked=tuple(
                Revocation(
                    release=entry.get("release", ""),
                    sha256=entry.get("sha256", ""),
                    why=entry.get("why", ""),
                    made_unix=entry.get("made_unix", 0),
                )
                for entry in entries
            ),
            floors=check_object("standing.floors", doc.get("floors", {})),
        )


def revoked_keys(root_fields: Mapping[str, Any]) -> frozenset[str]:
    """Key identifiers that a root says are revoked, from its further fields.

    >>> revoked_keys({})
    frozenset()

    Raises:
        StatementError: the field is not a short list of identifiers.
    """
    listed = root_fields.get(REVOKED_KEYS, [])
    strings = isinstance(listed, list) and all(isinstance(one, str) for one in listed)
    if not strings or len(listed) > MAX_REVOKED:
        raise StatementError(f"{REVOKED_KEYS} is not a list of at most {MAX_REVOKED} identifiers")
    return frozenset(listed)
