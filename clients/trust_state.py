"""What a device has seen and will never go back behind: high-water marks, durable.

Rollback protection in The Update Framework lives in a client's cache of metadata files; a cache
that is wiped, or lost in a power cut, forgets. These marks are a small file of our own, written
and fsynced before anything that they allow is done. A missing file is a new device; a damaged one
is an error, never a new device.

A mark belongs to the keys that stood behind it. When the root (or targets) names entirely other
keys, the mark starts anew: so a stolen online key that has run every number up to the limit is
cured by a rotation (specification 1.0.34, section 5.3.11), and nothing that the old keys signed
can come back, since none of them is trusted any more.

    >>> state = TrustState().seen("timestamp", 7, ["k1"])
    >>> state.version("timestamp"), state.rekeyed("timestamp", ["k2"]).version("timestamp")
    (7, 0)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from aggregation import durable
from clients.errors import ClientError

MAX_BAD = 1_000
MAX_REVOKED = 4_000
MAX_CHANGES = 48
"""Orders a day to serve something else: a stolen online key can't wear out a device's flash."""
DAY = 86_400
FILE = "trust.json"


class TrustStateError(ClientError):
    """The file of high-water marks is damaged; nothing is installed until it is repaired."""


@dataclass(frozen=True)
class Mark:
    """The highest version seen of a role, and the keys that the role had then."""

    version: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class TrustState:
    """All marks of a device. Immutable; each verb returns the next one.

    Attributes:
        root: version of the newest root trusted.
        marks: highest version seen, by role.
        sequence: highest round sequence seen.
        round_digest: digest of the round with that sequence.
        floors: by channel, the release counter below which nothing is installed.
        time_floor: the latest time that verified metadata was made at, seconds since 1970.
        bad: payload digests that this device has tried and will not try again, oldest first.
        revoked: payload digests that the adapter keys have revoked, with their words.
        ordered: payload digest of the last order that was followed; empty for the base model.
        changes: when the last orders to serve something else were followed, seconds since 1970.
    """

    root: int = 0
    marks: Mapping[str, Mark] = field(default_factory=dict)
    sequence: int = 0
    round_digest: str = ""
    floors: Mapping[str, int] = field(default_factory=dict)
    time_floor: int = 0
    bad: tuple[str, ...] = ()
    revoked: Mapping[str, str] = field(default_factory=dict)
    ordered: str = ""
    changes: tuple[int, ...] = ()

    def version(self, role: str) -> int:
        """The highest version seen of a role, 0 if none."""
        return self.marks[role].version if role in self.marks else 0

    def seen(self, role: str, version: int, keys: Iterable[str]) -> TrustState:
        """With this version of a role seen."""
        mark = Mark(max(version, self.version(role)), tuple(sorted(keys)))
        return replace(self, marks={**self.marks, role: mark})

    def seen_root(self, version: int) -> TrustState:
        """With this root trusted."""
        return replace(self, root=max(version, self.root))

    def seen_time(self, made_unix: int) -> TrustState:
        """With the knowledge that it is this time, or later."""
        return replace(self, time_floor=max(made_unix, self.time_floor))

    def seen_round(self, sequence: int, digest: str) -> TrustState:
        """With this round seen."""
        return replace(self, sequence=sequence, round_digest=digest)

    def seen_floors(self, floors: Mapping[str, int]) -> TrustState:
        """With these floors, or the higher ones from before."""
        merged = {c: max(n, self.floors.get(c, 0)) for c, n in floors.items() if n > 0}
        return replace(self, floors={**self.floors, **merged})

    def seen_revoked(self, revoked: Mapping[str, str]) -> TrustState:
        """With these revocations beside those from before; none is ever forgotten."""
        merged = {**revoked, **self.revoked}
        if len(merged) > MAX_REVOKED:
            merged = dict(list(merged.items())[-MAX_REVOKED:])  # the older ones, known already
        return replace(self, revoked=merged)

    def may_follow(self, sha256: str, now_unix: int) -> bool:
        """Whether an order to serve this is one too many within a day."""
        recent = [moment for moment in self.changes if moment > now_unix - DAY]
        return sha256 == self.ordered or len(recent) < MAX_CHANGES

    def followed(self, sha256: str, now_unix: int) -> TrustState:
        """With this order followed; moments ahead of the clock are taken to be now."""
        if sha256 == self.ordered:
            return self
        kept = [min(moment, now_unix) for moment in self.changes if moment > now_unix - DAY]
        return replace(self, ordered=sha256, changes=(*kept, now_unix)[-MAX_CHANGES:])

    def with_bad(self, sha256: str) -> TrustState:
        """With one more payload never to be tried again; the oldest go first when it is full."""
        kept = tuple(known for known in self.bad if known != sha256)
        return replace(self, bad=(*kept, sha256)[-MAX_BAD:])

    def rekeyed(self, role: str, keys: Iterable[str]) -> TrustState:
        """The same, or without the role's mark if no key is left of those behind it."""
        mark = self.marks.get(role)
        if mark is None or set(mark.keys) & set(keys):
            return self
        state = replace(self, marks={r: m for r, m in self.marks.items() if r != role})
        if role == "timestamp":
            return replace(state, time_floor=0)
        if role == "rounds":
            return replace(state, sequence=0, round_digest="")
        return state


def read_state(folder: Path) -> TrustState:
    """The marks in a device's trust folder; fresh ones if there are none yet.

    Raises:
        TrustStateError: the file cannot be read, or is not what was written.
    """
    path = folder / FILE
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return TrustState()
    except OSError as error:
        raise TrustStateError(f"cannot read {path}: {error.strerror}") from error
    try:
        envelope = json.loads(text)
        doc = envelope["state"]
        if envelope["sha256"] != _digest(doc):
            raise ValueError("its checksum is wrong")
        marks = {role: Mark(m["version"], tuple(m["keys"])) for role, m in doc["marks"].items()}
        lists = {name: tuple(doc.get(name, ())) for name in ("bad", "changes")}
        return TrustState(**{**doc, "marks": marks, **lists})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TrustStateError(
            f"{path} is damaged ({error!r}); the running adapter is untouched, but nothing new is "
            "installed: enrol the device again into a fresh folder"
        ) from None


def write_state(folder: Path, state: TrustState) -> None:
    """Replace the marks, durably.

    Raises:
        StorageError: the disk refused; the old marks still stand.
    """
    doc = asdict(state)
    envelope = {"schema": 1, "sha256": _digest(doc), "state": doc}
    durable.write_bytes(folder / FILE, json.dumps(envelope, sort_keys=True).encode(), mode=0o600)


def _digest(doc: Any) -> str:
    text = json.dumps(doc, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
