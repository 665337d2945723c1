"""Who holds what: the circles of keys that a root and its targets name.

A circle is a set of keys of which a threshold must sign together: ``root`` (root and targets), one
circle for each role that signs releases, and ``online`` (snapshot, timestamp and rounds).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tuf.api.metadata import Root, Targets  # type: ignore[attr-defined]  # it has no __all__

from federation.errors import FederationError
from federation.key_files import KeyFileError, check_identifier
from federation.keys import Key, key_name
from protos.signed import ROUNDS_ROLE, revoked_keys

ROOT, ONLINE = "root", "online"
ROOT_ROLES = ("root", "targets")
ONLINE_ROLES = ("snapshot", "timestamp")


class KeyChangeError(FederationError):
    """A change of keys that can't be made, or must not be signed or published; says why."""


@dataclass(frozen=True)
class Circle:
    """Keys that sign together.

    Attributes:
        name: ``root``, ``online``, or the role that signs releases.
        keys: by identifier.
        threshold: how many of them must sign.
        paths: targets that it may speak for; empty for root and online.
    """

    name: str
    keys: Mapping[str, Key]
    threshold: int
    paths: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What people call its keys."""
        return tuple(sorted(key_name(key) for key in self.keys.values()))


def circles(root: Root, targets: Targets) -> dict[str, Circle]:
    """Every circle, by name, root first.

    Raises:
        KeyChangeError: the files do not have the form of our repositories.
    """
    delegations = targets.delegations
    if delegations is None or not delegations.roles or ROUNDS_ROLE not in delegations.roles:
        raise KeyChangeError(
            f"targets delegates no role {ROUNDS_ROLE}: not one of our repositories"
        )
    role = root.roles["root"]
    found = {ROOT: Circle(ROOT, {k: root.keys[k] for k in role.keyids}, role.threshold)}
    for name, delegated in delegations.roles.items():
        if name != ROUNDS_ROLE:
            keys = {k: delegations.keys[k] for k in delegated.keyids}
            found[name] = Circle(name, keys, delegated.threshold, tuple(delegated.paths or ()))
    role = root.roles["timestamp"]
    found[ONLINE] = Circle(ONLINE, {k: root.keys[k] for k in role.keyids}, role.threshold)
    return found


def check_circles(root: Root, targets: Targets) -> dict[str, Circle]:
    """The circles, if they can do their work: thresholds in reach, no key in two of them.

    Raises:
        KeyChangeError: they can't, or a key is not the one that its identifier names; says which
            and why.
    """
    found = circles(root, targets)
    _check_identifiers(root, targets)
    homes: dict[str, str] = {}
    revoked = revoked_keys(root.unrecognized_fields)
    for circle in found.values():
        if not 1 <= circle.threshold <= len(circle.keys):
            raise KeyChangeError(
                f"{circle.name} would have {len(circle.keys)} keys and need {circle.threshold} "
                "signatures: add keys, or lower its threshold"
            )
        for keyid, key in circle.keys.items():
            if keyid in homes:
                raise KeyChangeError(
                    f"{key_name(key)} would be in {homes[keyid]} and in {circle.name}: "
                    "every circle needs keys of its own"
                )
            homes[keyid] = circle.name
            if keyid in revoked:
                raise KeyChangeError(
                    f"{key_name(key)} was revoked and can't come back: make a new key"
                )
    online = found[ONLINE]
    alike = (root.roles["snapshot"], (targets.delegations.roles or {})[ROUNDS_ROLE])  # type: ignore[union-attr]
    if len(online.keys) != 1 or any(set(r.keyids) != set(online.keys) for r in alike):
        raise KeyChangeError("snapshot, timestamp and rounds must have one and the same online key")
    if any(role.threshold != online.threshold for role in alike):
        raise KeyChangeError("snapshot, timestamp and rounds must need one signature each")
    top = root.roles["targets"]
    if (set(top.keyids), top.threshold) != (set(found[ROOT].keys), found[ROOT].threshold):
        raise KeyChangeError("root and targets must have the same keys, and need as many of them")
    return found


def _check_identifiers(root: Root, targets: Targets) -> None:
    delegated = targets.delegations.keys if targets.delegations is not None else {}
    for keys in (root.keys, delegated):
        for keyid, key in keys.items():
            try:
                check_identifier(key)
            except KeyFileError as error:
                raise KeyChangeError(f"key {keyid[:16]}: {error}") from None


def differences(before: Mapping[str, Circle], after: Mapping[str, Circle]) -> Iterator[str]:
    """What changes, one line each, for people who are asked to sign it."""
    for name, new in after.items():
        old = before.get(name)
        if old is None:
            paths = ", ".join(new.paths)
            yield f"{name}: new, {new.threshold} of {', '.join(new.names)} sign for {paths}"
            continue
        for keyid in [k for k in old.keys if k not in new.keys]:
            yield f"{name}: drops {key_name(old.keys[keyid])} ({keyid[:12]})"
        for keyid in [k for k in new.keys if k not in old.keys]:
            yield f"{name}: adds {key_name(new.keys[keyid])} ({keyid[:12]})"
        if old.threshold != new.threshold:
            yield f"{name}: {new.threshold} signatures are needed, {old.threshold} before"
        if old.paths != new.paths:
            yield f"{name}: speaks for {', '.join(new.paths)}, for {', '.join(old.paths)} before"
    for name in before.keys() - after.keys():
        yield f"{name}: is gone"


def find_key(name: str, known: Mapping[str, Circle]) -> tuple[str, str]:
    """Circle and identifier of the key that a person means.

    Args:
        name: its name, or the beginning of its identifier.
        known: the circles.

    Raises:
        KeyChangeError: no key is called so, or several are.
    """
    found = [
        (circle.name, keyid)
        for circle in known.values()
        for keyid, key in circle.keys.items()
        if key_name(key) == name or (len(name) >= 8 and keyid.startswith(name))
    ]
    if len(found) != 1:
        names = ", ".join(n for circle in known.values() for n in circle.names)
        how = "no key" if not found else "more than one key"
        raise KeyChangeError(f"{how} is called {name!r}; there are: {names}")
    return found[0]
