"""From files to metadata that may be believed: The Update Framework, without its I/O.

The rules engine is python-tuf's ``TrustedMetadataSet`` (specification 1.0.34, section 5.3 to 5.6).
Around it stand our own marks (:mod:`clients.trust_state`) and a clock that can't be turned back.
The engine's ``reference_time`` and loader are not public: tuf is pinned, and tests watch them.

The steps, in order; each may refuse, and what the earlier ones have learnt stays learnt:

1. sizes and names of the files
2. roots: the one given at enrolment, then each successor, known ones first
3. timestamp: signature, version, expiry; the clock floor rises to the time it was made
4. snapshot: as the timestamp names it; no role may vanish or go back
5. targets, then ``rounds`` and every other delegated role that the snapshot lists; the keys that
   the root has revoked count for none of them
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from tuf.api import exceptions
from tuf.api.serialization import DeserializationError
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from clients.trust_loader import Loader
from clients.trust_source import (
    MAX_FILE_BYTES,
    MAX_ROOT_BYTES,
    MAX_ROOTS,
    MAX_TIMESTAMP_BYTES,
    Refused,
    Source,
)
from clients.trust_state import TrustState
from clients.trust_verdict import Believed
from protos.messages import RejectReason
from protos.signed import SIGNED_UNIX, StatementError, revoked_keys

LAST_SECOND = 253_000_000_000  # in the year 9987: dates end in 9999
MAX_LEAP = timedelta(days=5 * 366)
"""How far ahead of a device's knowledge metadata may be dated: longer than any agent lives."""


class Verification:
    """One walk through metadata. ``state`` and ``roots`` are what it has learnt so far.

    Args:
        source: where the files are.
        embedded: the root that the device was enrolled with.
        known: later roots that it has trusted before, by version; they are verified again.
        state: its marks.
        now: its clock, with a zone; it may be wrong.
        built_unix: when its software was built: it can't be earlier than that.
        loader: remembers files between walks.
    """

    def __init__(
        self,
        source: Source,
        *,
        embedded: bytes,
        known: Mapping[int, bytes],
        state: TrustState,
        now: datetime,
        built_unix: int,
        loader: Loader | None = None,
    ) -> None:
        self.state = state
        self.roots: dict[int, bytes] = {}
        self._source, self._loader = source, loader or Loader()
        self._embedded = embedded
        self._known = known
        self._now = now.astimezone(UTC)
        self._built = built_unix

    def run(self) -> Believed:
        """Verify everything that the snapshot lists.

        Raises:
            Refused: with the reason; ``state`` and ``roots`` hold what was verified before it.
        """
        with self.refusals():
            return self._delegated(self.top_level())

    def top_level(self) -> TrustedMetadataSet:
        """Verify root, timestamp, snapshot and targets; to be called within :meth:`refusals`."""
        trusted = self._root()
        self._timestamp(trusted)
        self._snapshot(trusted)
        listed = trusted.snapshot.meta["targets.json"].version
        self._not_older("targets", listed)
        self.load(trusted, "targets", "root")
        self.state = self.state.seen("targets", listed, trusted.root.roles["targets"].keyids)
        return trusted

    def load(self, trusted: TrustedMetadataSet, role: str, delegator: str) -> Any:
        """Verify one role's targets by the role that delegates to it, as the snapshot lists it.

        Raises:
            Refused: it is not listed, not to be had, or does not verify.
        """
        meta = trusted.snapshot.meta.get(f"{role}.json")
        if meta is None:
            raise Refused(RejectReason.METADATA_MALFORMED, f"the snapshot does not list {role}")
        return self._obtain(
            role,
            _file_name(trusted, role, meta.version),
            meta.length or MAX_FILE_BYTES,
            lambda data, _: trusted.update_delegated_targets(data, role, delegator),
        )

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Turn whatever goes wrong inside into a refusal from the closed vocabulary.

        Raises:
            Refused: instead of anything else.
        """
        try:
            yield
        except Refused:
            raise
        except exceptions.UnsignedMetadataError as error:
            raise Refused(RejectReason.METADATA_SIGNATURE, str(error)) from None
        except exceptions.BadVersionNumberError as error:
            raise Refused(RejectReason.METADATA_ROLLBACK, str(error)) from None
        except exceptions.ExpiredMetadataError as error:
            raise Refused(
                RejectReason.METADATA_EXPIRED,
                f"{error}; this device takes it to be {self.moment():%Y-%m-%d %H:%M} UTC",
            ) from None
        except Exception as error:
            # A hostile file can fail in many ways inside parsers and curves; all are refusals.
            kind = type(error).__name__
            raise Refused(RejectReason.METADATA_MALFORMED, f"{kind}: {error}"[:300]) from None

    def moment(self) -> datetime:
        """The device's clock, but never before its software, its root and its last timestamp."""
        floor = min(max(self.state.time_floor, self._built, 0), LAST_SECOND)
        return max(self._now, datetime.fromtimestamp(floor, UTC))

    def _root(self) -> TrustedMetadataSet:
        trusted = TrustedMetadataSet(self._embedded, EnvelopeType.METADATA)
        trusted._load_data = self._loader
        while len(self.roots) < MAX_ROOTS:
            number = trusted.root.version + 1
            stored = self._known.get(number)
            if stored is not None and _advance(trusted, stored):
                self.roots[number] = stored
                continue
            data = self._source.remote(f"{number}.root.json", MAX_ROOT_BYTES)
            if data is None:
                break
            trusted.update_root(data)
            self.roots[number] = data
            self._source.keep("root", data)
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

    def _timestamp(self, trusted: TrustedMetadataSet) -> None:
        trusted.reference_time = self.moment()
        local = self._source.local("timestamp")
        if local is not None:
            with contextlib.suppress(exceptions.RepositoryError):
                trusted.update_timestamp(local)
        data = self._need("timestamp.json", MAX_TIMESTAMP_BYTES)
        expired: exceptions.ExpiredMetadataError | None = None
        news = True
        try:
            trusted.update_timestamp(data)
        except exceptions.EqualVersionNumberError:
            news = False  # the one that is remembered stands (specification 5.4.3)
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
        trusted.reference_time = self.moment()
        if news:
            self._source.keep("timestamp", data)

    def _learn_time(self, made: Any) -> None:
        if type(made) is not int or made < 0:
            raise Refused(RejectReason.METADATA_MALFORMED, f"{SIGNED_UNIX} is not a whole number")
        latest = self.moment() + MAX_LEAP
        if made > latest.timestamp():
            raise Refused(
                RejectReason.CLOCK,
                f"the timestamp is dated {made} seconds since 1970, which is more than "
                f"{MAX_LEAP.days} days ahead of this device; set its clock",
            )
        self.state = self.state.seen_time(made)

    def _snapshot(self, trusted: TrustedMetadataSet) -> None:
        meta = trusted.timestamp.snapshot_meta
        self._not_older("snapshot", meta.version)
        snapshot = self._obtain(
            "snapshot",
            _file_name(trusted, "snapshot", meta.version),
            meta.length or MAX_FILE_BYTES,
            trusted.update_snapshot,
        )
        listed = {name.removesuffix(".json") for name in snapshot.meta}
        gone = [r for r in self.state.marks if r not in {*listed, "timestamp", "snapshot"}]
        if gone:
            raise Refused(
                RejectReason.METADATA_ROLLBACK, f"the snapshot no longer lists {', '.join(gone)}"
            )
        keys = trusted.root.roles["snapshot"].keyids
        self.state = self.state.seen("snapshot", meta.version, keys)

    def _delegated(self, trusted: TrustedMetadataSet) -> Believed:
        """Every delegated role that the snapshot lists, for a device that decides at once."""
        targets, meta = trusted.targets, trusted.snapshot.meta
        if targets.delegations is None or targets.delegations.roles is None:
            raise Refused(RejectReason.METADATA_MALFORMED, "targets delegates no roles by name")
        try:
            revoked = revoked_keys(trusted.root.unrecognized_fields)
        except StatementError as error:
            raise Refused(RejectReason.METADATA_MALFORMED, f"root: {error}") from None
        delegated = {}
        for role, delegation in targets.delegations.roles.items():
            if f"{role}.json" not in meta:
                continue
            # An old targets file may still name a key that the root has revoked since.
            delegation.keyids = [keyid for keyid in delegation.keyids if keyid not in revoked]
            number = meta[f"{role}.json"].version
            self.state = self.state.rekeyed(role, delegation.keyids)
            self._not_older(role, number)
            delegated[role] = self.load(trusted, role, "targets")
            self.state = self.state.seen(role, number, delegation.keyids)
        return Believed(targets, delegated)

    def _obtain(
        self, role: str, name: str, limit: int, update: Callable[[bytes, bool], Any]
    ) -> Any:
        """The remembered file of a role if it is still the one that is wanted, else a new one."""
        local = self._source.local(role)
        if local is not None:
            with contextlib.suppress(exceptions.RepositoryError):
                return update(local, True)
        data = self._need(name, limit)
        result = update(data, False)
        self._source.keep(role, data)
        return result

    def _need(self, name: str, limit: int) -> bytes:
        data = self._source.remote(name, limit)
        if data is None:
            raise Refused(RejectReason.METADATA_MALFORMED, f"there is no {name}")
        return data

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


def _file_name(trusted: TrustedMetadataSet, role: str, version: int) -> str:
    """A role's file as it is asked for; role names are quoted, and never unquoted again."""
    name = f"{quote(role, safe='')}.json"
    return f"{version}.{name}" if trusted.root.consistent_snapshot else name
