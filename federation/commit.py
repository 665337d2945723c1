"""The files of a repository's next state, and how they reach the disk.

``timestamp.json`` alone says what is current, so it goes last, when all that it leads to is there.
A new root is different: it is found by its number. So a commit with one is first written down as a
whole (``change/``) and then carried out; what a kill leaves half done is carried out by
:func:`finish`, as often as it takes. That needs no key, for everything in it is signed already.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from aggregation import durable
from federation import roles
from federation.keys import Signer
from federation.published import Published
from protos.signed import ROUNDS_ROLE

CHANGE = "change"
ABSURD = 2**31
"""Versions above this were not reached by work: a thief has run them up. A new key starts anew."""


def next_files(
    state: Published,
    changed: Mapping[str, bytes],
    *,
    now: datetime,
    online: Signer,
    root: bytes | None = None,
    anew: bool = False,
) -> dict[str, bytes]:
    """Metadata files by name, in the order in which they must be written.

    Args:
        state: what is current.
        changed: signed files of targets, rounds and the roles of releases; new roles too.
        now: with a zone.
        online: signs snapshot and timestamp.
        root: the next root.
        anew: the online key is another one than before, so that its version numbers may fall.
    """

    def following(role: str) -> int:
        version = int(state.signed[role].version) if role in state.signed else 0
        if anew and version > ABSURD and role in (ROUNDS_ROLE, "snapshot", "timestamp"):
            return 1
        return version + 1

    new = {f"{following(role)}.{role}.json": data for role, data in changed.items()}
    snapshot, number = state.files["snapshot"], int(state.signed["snapshot"].version)
    if changed or anew or half_over(state, "snapshot", now):
        number = following("snapshot")
        covered = {
            role: (following(role), changed[role])
            if role in changed
            else (int(state.signed[role].version), state.files[role])
            for role in dict.fromkeys(("targets", *state.adapter_roles, ROUNDS_ROLE, *changed))
        }
        snapshot = roles.to_bytes(roles.snapshot(covered, number, now, online))
        new[f"{number}.snapshot.json"] = snapshot
    if root is not None:
        new[f"{len(state.roots) + 1}.root.json"] = root
    dated = roles.timestamp(number, snapshot, following("timestamp"), now, online)
    new["timestamp.json"] = roles.to_bytes(dated)
    return new


def write(folder: Path, payloads: Mapping[str, bytes], metadata: Mapping[str, bytes]) -> None:
    """Bring a commit to the disk: wholly, or not at all.

    Raises:
        StorageError: the disk refused.
    """
    for path, data in payloads.items():
        durable.write_bytes(folder / path, data)
    if any(name.endswith(".root.json") for name in metadata):
        durable.write_folder(folder / CHANGE, metadata)
        finish(folder)
        return
    for name, data in metadata.items():
        durable.write_bytes(folder / "metadata" / name, data)


def finish(folder: Path) -> None:
    """Carry out a commit that was written down; nothing to do is the usual case.

    Raises:
        StorageError: the disk refused.
    """
    durable.recover_folder(folder / CHANGE)
    names = [path.name for path in (folder / CHANGE).glob("*.json")]
    for name in sorted(names, key=_order):
        durable.write_bytes(folder / "metadata" / name, (folder / CHANGE / name).read_bytes())
    if names:
        try:
            shutil.rmtree(folder / CHANGE)
            durable.sync_folder(folder)
        except OSError as error:
            raise durable.storage_error(folder / CHANGE, error) from error


def half_over(state: Published, role: str, now: datetime) -> bool:
    """Whether half of a file's life has passed."""
    remaining = state.signed[role].expires - roles.in_seconds(now)
    return bool(remaining < roles.lifetime(role) / 2)


def _order(name: str) -> tuple[int, str]:
    last = {"root": 1, "timestamp": 2}
    return last.get(name.split(".")[-2], 0), name
