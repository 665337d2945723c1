"""The gate before signing: no release that is worse than the one before, unless somebody says why.

Compared is what is signed: accuracy in millionths, on sets that have names. A set on which the
parent was measured and the new release was not counts as worse, for otherwise leaving it out would
open the gate. Whoever passes all the same gives a reason, which is signed with the release.
"""

from __future__ import annotations

from collections.abc import Sequence

from federation.published import ReleaseRecord
from protos.signed import MICRO, ReleaseStatement, Standing


def parent_of(
    statement: ReleaseStatement, records: Sequence[ReleaseRecord], standing: Standing
) -> ReleaseRecord | None:
    """The release that a new one is compared with.

    It is the one that training started from, if it was released in this channel; else the newest
    of the channel, for that is what devices run now. What is revoked is nobody's measure.
    """
    mine = [
        record
        for record in records
        if record.statement.channel == statement.channel
        and record.statement.counter < statement.counter
        and standing.revocation(record.sha256) is None
    ]
    for record in mine:
        if record.statement.adapter_digest == statement.lineage.parent:
            return record
    return max(mine, key=lambda record: record.statement.counter, default=None)


def worse(statement: ReleaseStatement, parent: ReleaseRecord | None) -> list[str]:
    """In what a release is worse than its parent, one line for each set; empty if in nothing."""
    if parent is None:
        return []
    measured = {one.set: one for one in statement.evaluations}
    found = []
    for old in parent.statement.evaluations:
        new = measured.get(old.set)
        before = f"{parent.name} has {old.accuracy_micro / MICRO:.4f} on {old.set}"
        if new is None:
            found.append(f"{before}, where this one was not measured")
        elif new.accuracy_micro < old.accuracy_micro:
            found.append(f"{before}, this one {new.accuracy_micro / MICRO:.4f}")
    return found
