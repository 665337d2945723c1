"""The nouns inside signed metadata, and the rules that both sides share.

A release is described in the ``custom`` field of its target, a round in that of ``rounds/current``
(The Update Framework 1.0.34, section 4.5). Canonical JSON has no floats, so every number here is
an integer in a named unit. ``from_custom`` trusts nothing: a value of the wrong type or out of
bounds is refused before anything is built from it.

Fields that a reader does not know are ignored, so that later versions can add some, unless the
writer lists them in ``critical``: then a reader that does not know them must refuse the whole.

    >>> one = RoundDocument(sequence=1, rollout="r-1", salt="spring", reason="start")
    >>> RoundDocument.from_custom(one.to_custom()) == one
    True
    >>> split_target("adapters/stable/3.airpeft")
    ('stable', 3)

It knows nothing of TUF, of keys, or of files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from protos.errors import WireError
from protos.members import check_members, is_member
from protos.messages import BUCKETS, bucket
from protos.signed_checks import (
    ADAPTERS_ROLE,
    CURRENT_ROUND,
    DELTA_UNIT,
    HEX,
    MAX_ASSIGNMENTS,
    MAX_TEXT,
    MICRO,
    REVOKED_KEYS,
    ROUNDS_ROLE,
    SCHEMA,
    SIGNED_UNIX,
    StatementError,
    check_channel,
    check_document,
    check_integer,
    check_object,
    check_text,
    payload_path,
    split_target,
    target_name,
)
from protos.standing import STANDING, Revocation, Standing, revoked_keys
from protos.statement import Evaluation, Hardware, Lineage, PrivacyClaim, ReleaseStatement, Seal
from protos.window import Window

__all__ = [
    "ADAPTERS_ROLE",
    "CURRENT_ROUND",
    "DELTA_UNIT",
    "MICRO",
    "REVOKED_KEYS",
    "ROUNDS_ROLE",
    "SIGNED_UNIX",
    "STANDING",
    "Assignment",
    "Evaluation",
    "Hardware",
    "Lineage",
    "PrivacyClaim",
    "ReleaseStatement",
    "Revocation",
    "RoundDocument",
    "Seal",
    "SignedPayload",
    "Standing",
    "StatementError",
    "check_channel",
    "payload_path",
    "revoked_keys",
    "split_target",
    "target_name",
]


@dataclass(frozen=True)
class SignedPayload:
    """A release as the adapter keys signed it.

    Attributes:
        statement: what they say about it.
        sha256: of the payload, hex.
        length: bytes of the payload.
    """

    statement: ReleaseStatement
    sha256: str
    length: int

    @property
    def name(self) -> str:
        """What people call it: ``<channel>-<counter>``."""
        return self.statement.name

    @property
    def target(self) -> str:
        """Its name in the metadata."""
        return self.statement.target

    @property
    def path(self) -> str:
        """Its file in the repository, which devices ask for."""
        return payload_path(self.target, self.sha256)


@dataclass(frozen=True)
class Assignment:
    """Devices whose bucket lies below ``basis_points`` get this target, with this digest.

    With an empty target and an empty digest they go back to the base model alone.

    Attributes:
        basis_points: 0 to 10000.
        target: ``adapters/<channel>/<counter>.airpeft``, or empty.
        sha256: 64 hex digits, of the payload: what the adapters role must have signed too.
        members: the only devices that are meant, see :mod:`protos.members`; None: all of them.
    """

    basis_points: int
    target: str = ""
    sha256: str = ""
    members: str | None = None

    def __post_init__(self) -> None:
        check_integer("basis_points", self.basis_points, 0, BUCKETS)
        if self.members is not None:
            _statement(check_members, self.members)
        if not isinstance(self.target, str) or not isinstance(self.sha256, str):
            raise StatementError("target and sha256 of an assignment must be strings")
        if self.is_base:
            return
        split_target(self.target)
        if not HEX.match(self.sha256):
            raise StatementError(f"sha256 {self.sha256[:80]!r} is not 64 hex digits")

    @property
    def is_base(self) -> bool:
        """Whether it means the base model without an adapter."""
        return not self.target and not self.sha256

    @classmethod
    def from_custom(cls, doc: Any) -> Assignment:
        """From JSON objects.

        Raises:
            StatementError: a field is missing or wrong.
        """
        doc = check_object("assignment", doc)
        members = doc.get("members")
        return cls(doc.get("basis_points"), doc.get("target"), doc.get("sha256"), members)

    def to_custom(self) -> dict[str, Any]:
        """As JSON objects."""
        doc = {"basis_points": self.basis_points, "target": self.target, "sha256": self.sha256}
        return doc if self.members is None else {**doc, "members": self.members}


@dataclass(frozen=True, kw_only=True)
class RoundDocument:
    """Which devices get which release, as the online role says it.

    Attributes:
        sequence: grows with each document; a device never goes back.
        rollout: name of the rollout behind it.
        salt: with the device's name it makes the bucket (:func:`protos.messages.bucket`).
        assignments: the first one above the device's bucket holds; none: stay as you are.
        reason: for people.
        window: when devices install, in their own time (:mod:`protos.window`); empty: at any time.
        bake_seconds: for how long a device watches its health after an install; a day at most.
    """

    sequence: int
    rollout: str
    salt: str
    assignments: tuple[Assignment, ...] = ()
    reason: str = ""
    window: str = ""
    bake_seconds: int = 0

    def __post_init__(self) -> None:
        check_integer("sequence", self.sequence)
        check_text("rollout", self.rollout, 200)
        check_text("salt", self.salt, 200)
        check_text("reason", self.reason, MAX_TEXT)
        if len(self.assignments) > MAX_ASSIGNMENTS:
            raise StatementError(f"more than {MAX_ASSIGNMENTS} assignments")
        check_integer("bake_seconds", self.bake_seconds, 0, MAX_BAKE)
        if self.window != "":
            _statement(Window.parse, self.window)

    def assignment_of(self, device_id: str) -> Assignment | None:
        """The first assignment that reaches this device, or None: stay as you are."""
        place = bucket(self.salt, device_id)
        for one in self.assignments:
            if place < one.basis_points and (
                one.members is None or is_member(one.members, self.salt, device_id)
            ):
                return one
        return None

    def to_custom(self) -> dict[str, Any]:
        """The ``custom`` field of ``rounds/current``.

        What an older device must not overlook is listed in ``critical``; a plain round has none.
        """
        critical = ["members"] if any(a.members is not None for a in self.assignments) else []
        critical += ["window"] if self.window else []
        return {
            "schema": SCHEMA,
            "sequence": self.sequence,
            "rollout": self.rollout,
            "salt": self.salt,
            "assignments": [one.to_custom() for one in self.assignments],
            "reason": self.reason,
            **({"window": self.window} if self.window else {}),
            **({"bake_seconds": self.bake_seconds} if self.bake_seconds else {}),
            **({"critical": critical} if critical else {}),
        }

    @classmethod
    def from_custom(cls, custom: Any) -> RoundDocument:
        """Read a ``custom`` field; each value is checked.

        Raises:
            StatementError: as for :meth:`ReleaseStatement.from_custom`.
        """
        doc = check_document("round", custom, _FIELDS)
        items = doc["assignments"]
        if not isinstance(items, list) or len(items) > MAX_ASSIGNMENTS:
            raise StatementError(f"assignments must be a list of at most {MAX_ASSIGNMENTS}")
        return cls(
            sequence=doc["sequence"],
            rollout=doc["rollout"],
            salt=doc["salt"],
            assignments=tuple(Assignment.from_custom(item) for item in items),
            reason=doc.get("reason", ""),
            window=doc.get("window", ""),
            bake_seconds=doc.get("bake_seconds", 0),
        )


def _statement(check: Callable[[Any], object], value: object) -> None:
    try:
        check(value)
    except WireError as error:
        raise StatementError(str(error)) from None


MAX_BAKE = 86_400  # seconds
_FIELDS = (
    frozenset({"sequence", "rollout", "salt", "assignments"}),
    frozenset({"reason", "members", "window", "bake_seconds"}),
)
