"""What a file may hold that is put before signers, or handed to a repository: that and no more.

A request is made by one person and signed by others, who look at what it says of itself. Whatever
else a file could carry must be refused here, or it would be signed unseen: a date in a thousand
years, a delegation to a key of somebody's, a channel whose last number has been used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # it has no __all__

from federation.published import ReleaseRecord
from federation.roles import lifetime
from protos.signed import REVOKED_KEYS, SIGNED_UNIX, STANDING, Standing, StatementError

LIVE_RELEASES = 24
"""Releases of a channel that stay listed; older ones leave the metadata, which keeps it small."""
MAX_AHEAD = 86_400  # seconds that a maker's clock may be ahead of the repository's
MAX_STEP = 1_000  # counters that one release may leave out
ROLE = re.compile(r"adapters-[a-z0-9-]{1,30}\Z", re.ASCII)
_CHANNELS = re.compile(r"adapters/[a-z0-9-]{0,32}\*?/\*\Z", re.ASCII)
_FIELDS: Mapping[str, frozenset[str]] = {
    "root": frozenset({SIGNED_UNIX, REVOKED_KEYS}),
    "targets": frozenset({SIGNED_UNIX}),
}
_RELEASES = frozenset({SIGNED_UNIX, STANDING})


def check_file(role: str, signed: Any, now: datetime | None = None) -> None:
    """Refuse a file of root, targets, or a role of releases that holds what nobody is shown.

    Args:
        role: whose file it is.
        signed: its content.
        now: with a zone; None where no clock can be relied on.

    Raises:
        StatementError: it is dated strangely, delegates, or has fields that we don't know.
    """
    unknown = sorted(signed.unrecognized_fields.keys() - _FIELDS.get(role, _RELEASES))
    if unknown:
        raise StatementError(
            f"{role}.json has fields that this version does not know: "
            f"{', '.join(name[:40] for name in unknown[:5])}"
        )
    made = signed.unrecognized_fields.get(SIGNED_UNIX)
    if type(made) is not int or made < 0:
        raise StatementError(f"{role}.json does not say when it was made ({SIGNED_UNIX})")
    if signed.expires.timestamp() - made > lifetime(role).total_seconds():
        raise StatementError(
            f"{role}.json would be believed until {signed.expires:%Y-%m-%d}: at most "
            f"{lifetime(role).days} days from when it was made are allowed"
        )
    if now is not None and made > now.timestamp() + MAX_AHEAD:
        raise StatementError(
            f"{role}.json was made {round((made - now.timestamp()) / 3600)} hours from now: the "
            "clock is wrong here, or where it was made"
        )
    if role not in ("root", "targets") and signed.delegations is not None:
        raise StatementError(
            f"{role}.json delegates to others, which a list of releases never does"
        )


def may_leave(records: Sequence[ReleaseRecord], channel: str) -> set[str]:
    """The targets of a channel that are too old to stay listed beside a new one.

    Args:
        records: the releases that are listed, by channel and counter.
        channel: of the new one.
    """
    mine = [record.target for record in records if record.statement.channel == channel]
    return set(mine[: -(LIVE_RELEASES - 1)])


def check_listing(
    before: Sequence[ReleaseRecord], after: Sequence[ReleaseRecord], new: ReleaseRecord
) -> None:
    """Refuse a release that pushes others out, or leaves no numbers to those that follow.

    Args:
        before: the releases that were listed, by channel and counter.
        after: those that will be.
        new: the one that is new.

    Raises:
        StatementError: one vanishes that isn't among the oldest of the channel, or a counter jumps.
    """
    channel, counter = new.statement.channel, new.statement.counter
    mine = [record for record in before if record.statement.channel == channel]
    old = may_leave(before, channel)
    kept = {record.target for record in after}
    gone = [r.name for r in before if r.target not in kept and r.target not in old]
    if gone:
        raise StatementError(
            f"{new.name} would take {', '.join(gone[:5])} out of the list: only the oldest of its "
            f"own channel leave, when there are more than {LIVE_RELEASES}"
        )
    highest = max((record.statement.counter for record in mine), default=0)
    if counter > highest + MAX_STEP:
        raise StatementError(
            f"{new.name} leaves out the numbers from {highest + 1} on: at most {MAX_STEP} at a time"
        )


def check_floors(before: Standing, after: Standing, records: Sequence[ReleaseRecord]) -> None:
    """Refuse a floor above everything that was released: a channel would never be used again.

    Raises:
        StatementError: one is.
    """
    for channel, floor in after.floors.items():
        mine = [r.statement.counter for r in records if r.statement.channel == channel]
        most = max([before.floors.get(channel, 0), *(counter + 1 for counter in mine)])
        if floor > most:
            raise StatementError(
                f"the floor {floor} of {channel} lies above every release: at most {most}"
            )


def check_delegations(before: Targets, after: Targets) -> dict[str, list[str]]:
    """Refuse a targets file in which a role may speak for other targets than before, or in turn.

    Returns:
        The roles that are new, each with its channels.

    Raises:
        StatementError: one may, or a new one is not a role for releases of certain channels.
    """
    if before.delegations is None or after.delegations is None:
        raise StatementError("targets.json delegates nothing")
    old, new = before.delegations.roles or {}, after.delegations.roles or {}
    if after.delegations.succinct_roles is not None or after.delegations.unrecognized_fields:
        raise StatementError("targets.json delegates in a way that is not ours")
    fresh = [name for name in new if name not in old]
    if list(new) != [*fresh, *old]:
        raise StatementError("targets.json asks roles in another order than before")
    for name, role in new.items():
        was = old.get(name)
        paths = role.paths if was is None else was.paths
        known = (role.terminating, role.path_hash_prefixes, role.unrecognized_fields)
        if known != (True, None, {}) or role.paths != paths or not role.paths:
            raise StatementError(f"targets.json lets {name} speak for other targets than before")
        if was is None and not (ROLE.match(name) and all(map(_CHANNELS.match, role.paths))):
            raise StatementError(f"targets.json lets {name[:60]!r} speak for what is no channel")
    return {name: [path.split("/")[1] for path in new[name].paths or ()] for name in fresh}
