"""From what people want changed to the next root, targets and adapters files, unsigned.

The Update Framework 1.0.34, section 6.1 (key management and migration): a new root is signed by a
threshold of the old root keys and by a threshold of the new ones; targets and the delegated files
by whoever holds them from now on. What a dropped key has signed counts no more: its identifier goes
on a list in the root (:data:`protos.signed.REVOKED_KEYS`), so that not even an old targets file,
which would still verify, brings it back.

It reads and writes no files and holds no keys; the time is an argument.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tuf.api.metadata import (  # type: ignore[attr-defined]  # it has no __all__
    DelegatedRole,
    Metadata,
    Root,
    Targets,
)

from federation import roles
from federation.circles import (
    ONLINE,
    ONLINE_ROLES,
    ROOT,
    ROOT_ROLES,
    Circle,
    KeyChangeError,
    check_circles,
    circles,
    find_key,
)
from federation.keys import THRESHOLD, Key, key_name
from federation.metadata_files import parse_metadata
from federation.published import RepositoryError, read_releases, read_standing
from federation.signable import ROLE, check_delegations, check_file
from protos.signed import REVOKED_KEYS, ROUNDS_ROLE, StatementError, check_channel

KEPT_REVOKED = 256  # identifiers in a root; files that name older ones have long expired


@dataclass(frozen=True, kw_only=True)
class KeyChange:
    """What people want.

    Attributes:
        drop: names of keys (or beginnings of their identifiers) that count no more.
        add: keys that join, by circle.
        thresholds: how many must sign from now on, by circle.
        delegate: new roles that sign releases, each with the channels it speaks for (``acme``, or
            ``acme-*``); ``add`` says with which keys.
        renew: date every offline file anew.
    """

    drop: tuple[str, ...] = ()
    add: Mapping[str, tuple[Key, ...]] = field(default_factory=dict)
    thresholds: Mapping[str, int] = field(default_factory=dict)
    delegate: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renew: bool = False


@dataclass(frozen=True)
class Offline:
    """The files that offline keys sign, by role: root, targets, and those of releases."""

    files: Mapping[str, Metadata[Any]]

    @classmethod
    def parse(cls, files: Mapping[str, bytes]) -> Offline:
        """From bytes by role; nothing of it is believed yet.

        Raises:
            KeyChangeError: one is not what its name says.
        """
        try:
            parsed = {role: parse_metadata(data, f"{role}.json") for role, data in files.items()}
        except RepositoryError as error:
            raise KeyChangeError(str(error)) from None
        for role, metadata in parsed.items():
            kind = "root" if role == "root" else "targets"
            if metadata.signed.type != kind:
                raise KeyChangeError(f"{role}.json is {metadata.signed.type} metadata")
        return cls(parsed)

    @property
    def root(self) -> Root:
        """The root's content."""
        signed: Root = self._file("root")
        return signed

    @property
    def targets(self) -> Targets:
        """The targets file's content."""
        signed: Targets = self._file("targets")
        return signed

    def _file(self, role: str) -> Any:
        if role not in self.files:
            raise KeyChangeError(f"{role}.json is missing")
        return self.files[role].signed

    def circles(self) -> dict[str, Circle]:
        """Who holds what."""
        return circles(self.root, self.targets)

    def over(self, before: Offline) -> Offline:
        """These files, and those of before where there is none of these."""
        return Offline({**before.files, **self.files})


def plan(before: Offline, change: KeyChange, now: datetime) -> Offline:
    """The files that carry a change out, next versions, unsigned; only those that change.

    Raises:
        KeyChangeError: it names an unknown key or circle, or leads to circles that can't work.
    """
    root, targets = copy.deepcopy(before.root), copy.deepcopy(before.targets)
    _delegate(targets, change, before)
    touched = set(change.thresholds) | set(change.delegate)
    dropped = [find_key(name, before.circles()) for name in change.drop]
    for circle, keyid in dropped:
        touched.add(circle)
        _revoke(root, targets, circle, keyid)
    for circle, keys in change.add.items():
        if circle not in circles(root, targets):
            known = ", ".join(before.circles())
            raise KeyChangeError(f"there is no circle {circle!r}; there are: {known}")
        touched.add(circle)
        for key in keys:
            _check_name(key, circle, circles(root, targets))
            _add(root, targets, circle, key)
    for circle, threshold in change.thresholds.items():
        _set_threshold(root, targets, circle, threshold)
    if dropped:
        listed = [*root.unrecognized_fields.get(REVOKED_KEYS, []), *(keyid for _, keyid in dropped)]
        root.unrecognized_fields[REVOKED_KEYS] = list(dict.fromkeys(listed))[-KEPT_REVOKED:]
    if not touched and not change.renew:
        raise KeyChangeError("nothing changes: name keys to drop or to add, or renew the files")
    after: dict[str, Metadata[Any]] = {}
    if change.renew or dropped or touched & {ROOT, ONLINE}:
        after["root"] = Metadata(root)
    if change.renew or touched:
        after["targets"] = Metadata(targets)
    for role in [r for r in circles(root, targets) if r not in (ROOT, ONLINE)]:
        if role in change.delegate:
            after[role] = Metadata(Targets())
        elif change.renew or role in touched:
            after[role] = Metadata(copy.deepcopy(before.files[role].signed))
    for role, metadata in after.items():
        number = 1 if role in change.delegate else metadata.signed.version + 1
        roles.dated(metadata.signed, role, number, now)
    result = Offline(after)
    check_change(before, result)
    return result


def check_change(before: Offline, after: Offline) -> dict[str, Circle]:
    """Whether files change keys, dates and nothing else; the circles as they will be.

    Raises:
        KeyChangeError: they do something else too, or the circles can't work.
    """
    whole = after.over(before)
    if not after.files:
        raise KeyChangeError("no file changes")
    for role, metadata in after.files.items():
        old = before.files.get(role)
        expected = 1 if old is None else old.signed.version + 1
        if metadata.signed.version != expected:
            raise KeyChangeError(
                f"{role}.json has version {metadata.signed.version}, and {expected} is next: "
                "make the request again"
            )
    found = check_circles(whole.root, whole.targets)
    roles_of_releases = found.keys() - {ROOT, ONLINE}
    if whole.files.keys() != roles_of_releases | {"root", "targets"}:
        raise KeyChangeError("the files are not those of the roles that targets delegates")
    if before.circles().keys() - found.keys():
        raise KeyChangeError("a role can never be taken away: drop its keys, or leave it empty")
    if whole.targets.targets or not whole.root.consistent_snapshot:
        raise KeyChangeError("targets lists nothing itself, and snapshots are consistent")
    old_revoked = set(before.root.unrecognized_fields.get(REVOKED_KEYS, []))
    new_revoked = set(whole.root.unrecognized_fields.get(REVOKED_KEYS, []))
    if old_revoked - new_revoked and len(new_revoked) < KEPT_REVOKED:
        raise KeyChangeError("a revoked key would come back")
    dropped = _keyids(before.circles()) - _keyids(found)
    if not new_revoked <= old_revoked | dropped:
        raise KeyChangeError("the list of revoked keys names one that nobody has held till now")
    try:
        for role, metadata in after.files.items():
            check_file(role, metadata.signed)
        for channels in check_delegations(before.targets, whole.targets).values():
            _check_channels(channels, before)
    except StatementError as error:
        raise KeyChangeError(str(error)) from None
    for role in roles_of_releases & after.files.keys():
        _check_same_releases(role, before, after)
    return found


def _keyids(found: Mapping[str, Circle]) -> set[str]:
    return {keyid for circle in found.values() for keyid in circle.keys}


def _check_same_releases(role: str, before: Offline, after: Offline) -> None:
    old = before.files[role].signed if role in before.files else Targets()
    new = after.files[role].signed
    try:
        same = read_releases(old) == read_releases(new) and read_standing(old) == read_standing(new)
    except StatementError as error:
        raise KeyChangeError(f"{role}.json: {error}") from None
    if not same:
        raise KeyChangeError(f"{role}.json lists other releases than before: keys alone may change")


def _delegate(targets: Targets, change: KeyChange, before: Offline) -> None:
    assert targets.delegations is not None  # noqa: S101  # circles() has looked
    known = dict(targets.delegations.roles or {})
    fresh = {}
    for role, channels in change.delegate.items():
        if role in known or not ROLE.match(role):
            raise KeyChangeError(
                f"role {role!r} must be new, and adapters-NAME in lower-case letters and digits, "
                "such as adapters-acme"
            )
        if not channels or role not in change.add:
            raise KeyChangeError(f"{role} needs channels and keys")
        _check_channels(channels, before)
        paths = [f"adapters/{channel}/*" for channel in channels]
        fresh[role] = DelegatedRole(role, [], THRESHOLD, terminating=True, paths=paths)
    # Before the role that may speak for every channel.
    targets.delegations.roles = {**fresh, **known}


def _check_channels(channels: Iterable[str], before: Offline) -> None:
    for channel in channels:
        check_channel(channel.removesuffix("*").rstrip("-") or "x")
        taken = [r for r in before.circles() if _listed(before, r, channel)]
        if taken:
            raise KeyChangeError(
                f"channel {channel} has releases that {taken[0]} has signed: choose another"
            )


def _listed(before: Offline, role: str, channel: str) -> bool:
    """Whether a role's file lists a release of this channel (``acme``, or ``acme-*``)."""
    if role not in before.files or role == ROOT:
        return False
    start = f"adapters/{channel.removesuffix('*')}" + ("" if channel.endswith("*") else "/")
    return any(path.startswith(start) for path in before.files[role].signed.targets)


def _check_name(key: Key, circle: str, known: Mapping[str, Circle]) -> None:
    for other in known.values():
        if key_name(key) in other.names:
            raise KeyChangeError(
                f"{circle}: a key called {key_name(key)} is there already: give the new one a "
                "name of its own (airpeft keys init FOLDER --name NAME)"
            )


def _revoke(root: Root, targets: Targets, circle: str, keyid: str) -> None:
    if circle in (ROOT, ONLINE):
        for role in ROOT_ROLES if circle == ROOT else ONLINE_ROLES:
            root.revoke_key(keyid, role)
    if circle != ROOT:
        targets.revoke_key(keyid, ROUNDS_ROLE if circle == ONLINE else circle)


def _add(root: Root, targets: Targets, circle: str, key: Key) -> None:
    if circle in (ROOT, ONLINE):
        for role in ROOT_ROLES if circle == ROOT else ONLINE_ROLES:
            root.add_key(key, role)
    if circle != ROOT:
        targets.add_key(key, ROUNDS_ROLE if circle == ONLINE else circle)


def _set_threshold(root: Root, targets: Targets, circle: str, threshold: int) -> None:
    if circle == ONLINE:
        raise KeyChangeError("the online circle is one key: its threshold stays 1")
    if circle not in circles(root, targets):
        raise KeyChangeError(f"there is no circle {circle!r}")
    for role in _roles_of(root, targets, circle):
        role.threshold = threshold


def _roles_of(root: Root, targets: Targets, circle: str) -> Iterable[Any]:
    if circle == ROOT:
        return [root.roles[name] for name in ROOT_ROLES]
    assert targets.delegations is not None  # noqa: S101
    return [(targets.delegations.roles or {})[circle]]
