"""From a bundle of files to metadata that may be believed: The Update Framework, without its I/O.

The rules engine is python-tuf's ``TrustedMetadataSet`` (specification 1.0.34, section 5.3 to 5.6).
Around it stand our own marks (:mod:`clients.trust_state`) and a clock that can't be turned back.
The engine's ``reference_time`` is not public: the version of tuf is pinned and a test watches it.

The steps, in order; each may refuse, and what the earlier ones have learnt stays learnt:

1. sizes and names of the files
2. roots: the one given at enrolment, then each successor, known ones first
3. timestamp: signature, version, expiry; the clock floor rises to the time it was made
4. snapshot: as the timestamp names it; no role may vanish or go back
5. targets, then ``rounds`` and every other delegated role that the snapshot lists
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from tuf.api import exceptions
from tuf.api.serialization import DeserializationError
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from clients.errors import ClientError
from clients.trust_state import TrustState
from protos.messages import MetadataBundle, RejectReason
from protos.signed import SIGNED_UNIX

MAX_FILES = 128
MAX_FILE_BYTES = 5_000_000
MAX_TIMESTAMP_BYTES = 16_384
MAX_ROOT_BYTES = 512_000
MAX_ROOTS = 1_024
LAST_SECOND = 253_000_000_000  # in the year 9987: dates end in 9999
MAX_LEAP = timedelta(days=5 * 366)
"""How far ahead of a device's knowledge metadata may be dated: longer than any agent lives."""


class Refused(ClientError):  # noqa: N818  (named as devices report it)
    """Metadata that must not be acted on, with its reason from the closed vocabulary."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Believed:
    """Verified content: the targets file, and each delegated role's targets."""

    targets: Any
    delegated: Mapping[str, Any]

    def role_of(self, target: str) -> str | None:
        """The delegated role that may speak for a target, by path and order of delegation."""
        if self.targets.delegations is None:
            return None
        for role, terminating in self.targets.delegations.get_roles_for_target(target):
            if role in self.delegated and target in self.delegated[role].targets:
                return str(role)
            if terminating:
                return None
        return None


class Verification:
    """One walk through a bundle. ``state`` and ``roots`` are what it has learnt so far.

    Args:
        embedded: the root that the device was enrolled with.
        known: later roots that it has trusted before, by version; they are verified again.
        state: its marks.
        now: its clock, with a zone; it may be wrong.
        built_unix: when its software was built: it can't be earlier than that.
    """

    def __init__(
        self,
        *,
        embedded: bytes,
        known: Mapping[int, bytes],
        state: TrustState,
        now: datetime,
        built_unix: int,
    ) -> None:
        self.state = state
        self.roots: dict[int, bytes] = {}
        self._embedded = embedded
        self._known = known
        self._now = now.astimezone(UTC)
        self._built = built_unix

    def run(self, bundle: MetadataBundle) -> Believed:
        """Verify the whole bundle.

        Raises:
            Refused: with the reason; ``state`` and ``roots`` hold what was verified before it.
        """
        try:
            _check_sizes(bundle.files)
            trusted = self._root(bundle.files)
            self._timestamp(trusted, bundle.files)
            self._snapshot(trusted, bundle.files)
            return self._targets(trusted, bundle.files)
        except Refused:
            raise
        except exceptions.UnsignedMetadataError as error:
            raise Refused(RejectReason.METADATA_SIGNATURE, str(error)) from None
        except exceptions.BadVersionNumberError as error:
            raise Refused(RejectReason.METADATA_ROLLBACK, str(error)) from None
        except exceptions.ExpiredMetadataError as error:
            raise Refused(
                RejectReason.METADATA_EXPIRED,
                f"{error}; this device takes it to be {self._moment():%Y-%m-%d %H:%M} UTC",
            ) from None
        except Exception as error:
            # A hostile file can fail in many ways inside parsers and curves; all are refusals.
            kind = type(error).__name__
            raise Refused(RejectReason.METADATA_MALFORMED, f"{kind}: {error}"[:300]) from None

    def _moment(self) -> datetime:
        """The device's clock, but never before its software, its root and its last timestamp."""
        floor = min(max(self.state.time_floor, self._built, 0), LAST_SECOND)
        return max(self._now, datetime.fromtimestamp(floor, UTC))

    def _root(self, files: Mapping[str, bytes]) -> TrustedMetadataSet:
        trusted = TrustedMetadataSet(self._embedded, EnvelopeType.METADATA)
        while len(self.roots) < MAX_ROOTS:
            number = trusted.root.version + 1
            stored = self._known.get(number)
            if stored is not None and _advance(trusted, stored):
                self.roots[number] = stored
                continue
            data = files.get(f"{number}.root.json")
            if data is None:
                break
            trusted.update_root(data)
            self.roots[number] = data
        root = trusted.root
        if root.version < self.state.root:
            raise Refused(
                RejectReason.METADATA_ROLLBACK,
                f"root {root.version} is older than root {self.state.root}, trusted before",
            )
        self.state = self.state.seen_root(root.version)
        for role in ("timestamp", "snapshot", "targets"):
            self.state = self.state.rekeyed(role, root.roles[role].keyids)
        made = root.unrecognized_fields.get(SIGNED_UNIX)
        if type(made) is int:  # by the offline keys: no leap is too far for them
            self._built = max(self._built, made)
        return trusted

    def _timestamp(self, trusted: TrustedMetadataSet, files: Mapping[str, bytes]) -> None:
        trusted.reference_time = self._moment()
        data = _file(files, "timestamp.json")
        expired: exceptions.ExpiredMetadataError | None = None
        try:
            trusted.update_timestamp(data)
        except exceptions.ExpiredMetadataError as error:
            if "timestamp" not in trusted:  # it is the root that has expired
                raise
            expired = error
        timestamp = trusted.timestamp
        self._not_older("timestamp", timestamp.version)
        made = timestamp.unrecognized_fields.get(SIGNED_UNIX)
        if made is not None:
            self._learn_time(made)
        self.state = self.state.seen(
            "timestamp", timestamp.version, trusted.root.roles["timestamp"].keyids
        )
        if expired is not None:
            raise expired
        # The timestamp may have taught that it is later than this device thought.
        trusted.reference_time = self._moment()

    def _learn_time(self, made: Any) -> None:
        if type(made) is not int or made < 0:
            raise Refused(RejectReason.METADATA_MALFORMED, f"{SIGNED_UNIX} is not a whole number")
        latest = self._moment() + MAX_LEAP
        if made > latest.timestamp():
            raise Refused(
                RejectReason.CLOCK,
                f"the timestamp is dated {made} seconds since 1970, which is more than "
                f"{MAX_LEAP.days} days ahead of this device; set its clock",
            )
        self.state = self.state.seen_time(made)

    def _snapshot(self, trusted: TrustedMetadataSet, files: Mapping[str, bytes]) -> None:
        number = trusted.timestamp.snapshot_meta.version
        self._not_older("snapshot", number)
        snapshot = trusted.update_snapshot(_file(files, f"{number}.snapshot.json"))
        listed = {name.removesuffix(".json") for name in snapshot.meta}
        gone = [r for r in self.state.marks if r not in {*listed, "timestamp", "snapshot"}]
        if gone:
            raise Refused(
                RejectReason.METADATA_ROLLBACK, f"the snapshot no longer lists {', '.join(gone)}"
            )
        self.state = self.state.seen("snapshot", number, trusted.root.roles["snapshot"].keyids)

    def _targets(self, trusted: TrustedMetadataSet, files: Mapping[str, bytes]) -> Believed:
        meta = trusted.snapshot.meta
        number = meta["targets.json"].version
        self._not_older("targets", number)
        targets = trusted.update_targets(_file(files, f"{number}.targets.json"))
        self.state = self.state.seen("targets", number, trusted.root.roles["targets"].keyids)
        if targets.delegations is None or targets.delegations.roles is None:
            raise Refused(RejectReason.METADATA_MALFORMED, "targets delegates no roles by name")
        delegated = {}
        for role, delegation in targets.delegations.roles.items():
            if f"{role}.json" not in meta:
                continue
            number = meta[f"{role}.json"].version
            self.state = self.state.rekeyed(role, delegation.keyids)
            self._not_older(role, number)
            data = _file(files, f"{number}.{role}.json")
            delegated[role] = trusted.update_delegated_targets(data, role, "targets")
            self.state = self.state.seen(role, number, delegation.keyids)
        return Believed(targets, delegated)

    def _not_older(self, role: str, version: int) -> None:
        if version < self.state.version(role):
            raise Refused(
                RejectReason.METADATA_ROLLBACK,
                f"{role} {version} is older than {self.state.version(role)}, seen before",
            )


def check_root(data: bytes) -> int:
    """The version of a root, if it is one and its own keys have signed it.

    Raises:
        Refused: it is not.
    """
    try:
        return int(TrustedMetadataSet(data, EnvelopeType.METADATA).root.version)
    except (exceptions.RepositoryError, DeserializationError, ValueError) as error:
        raise Refused(RejectReason.METADATA_SIGNATURE, f"not a signed root: {error}") from None


def _advance(trusted: TrustedMetadataSet, data: bytes) -> bool:
    try:
        trusted.update_root(data)
    except exceptions.RepositoryError:
        return False
    return True


def _check_sizes(files: Mapping[str, bytes]) -> None:
    if len(files) > MAX_FILES + MAX_ROOTS:
        raise Refused(RejectReason.METADATA_MALFORMED, f"the bundle has {len(files)} files")
    for name, data in files.items():
        limit = MAX_FILE_BYTES
        if name == "timestamp.json":
            limit = MAX_TIMESTAMP_BYTES
        elif name.endswith(".root.json"):
            limit = MAX_ROOT_BYTES
        if len(data) > limit:
            raise Refused(
                RejectReason.METADATA_MALFORMED,
                f"{name[:60]} has {len(data)} bytes; at most {limit} are read",
            )


def _file(files: Mapping[str, bytes], name: str) -> bytes:
    try:
        return files[name]
    except KeyError:
        raise Refused(RejectReason.METADATA_MALFORMED, f"the bundle has no {name}") from None
