"""The first files of a repository: the one act that needs all offline keys at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime

from federation import roles
from federation.keys import Signer
from federation.published import RepositoryError
from protos.signed import ADAPTERS_ROLE, CURRENT_ROUND, ROUNDS_ROLE, RoundDocument, payload_path


def first_files(
    root_keys: Sequence[Signer],
    adapter_keys: Sequence[Signer],
    online: Signer,
    threshold: int,
    now: datetime,
) -> dict[str, bytes]:
    """Every file of a repository without releases, by its path.

    Raises:
        RepositoryError: fewer keys than the threshold, or a key in two circles.
    """
    _check_separate(root_keys, adapter_keys, online, threshold)
    start = RoundDocument(sequence=0, rollout="", salt="", reason="no round yet")
    empty = roles.sign(roles.adapters([], 1, now), adapter_keys)
    files = {
        "1.root.json": roles.to_bytes(roles.root(root_keys, online, threshold, now)),
        "1.targets.json": roles.to_bytes(
            roles.targets(root_keys, adapter_keys, online, threshold, now)
        ),
        "1.adapters.json": roles.to_bytes(empty),
        "1.rounds.json": roles.to_bytes(roles.rounds(start, 1, now, online)),
    }
    covered = {
        role: (1, files[f"1.{role}.json"]) for role in ("targets", ADAPTERS_ROLE, ROUNDS_ROLE)
    }
    files["1.snapshot.json"] = roles.to_bytes(roles.snapshot(covered, 1, now, online))
    files["timestamp.json"] = roles.to_bytes(
        roles.timestamp(1, files["1.snapshot.json"], 1, now, online)
    )
    return {**{f"metadata/{name}": data for name, data in files.items()}, **round_file(start)}


def round_file(document: RoundDocument) -> dict[str, bytes]:
    """The target of a round, by its path in the repository."""
    content = roles.round_bytes(document)
    return {payload_path(CURRENT_ROUND, hashlib.sha256(content).hexdigest()): content}


def _check_separate(
    root_keys: Sequence[Signer], adapter_keys: Sequence[Signer], online: Signer, threshold: int
) -> None:
    """Each circle of keys reaches its threshold, and none lies in two of them."""
    circles = {
        "root": {signer.public_key.keyid for signer in root_keys},
        "adapter": {signer.public_key.keyid for signer in adapter_keys},
        "online": {online.public_key.keyid},
    }
    for circle in ("root", "adapter"):
        if not 1 <= threshold <= len(circles[circle]):
            raise RepositoryError(
                f"threshold {threshold} needs at least as many different {circle} keys; "
                f"{len(circles[circle])} given"
            )
    if sum(map(len, circles.values())) != len(frozenset[str]().union(*circles.values())):
        raise RepositoryError("root, adapter and online keys must all be different keys")
