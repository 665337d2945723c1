"""The metadata files of the repository as values: built, versioned, dated, signed.

Six roles (The Update Framework 1.0.34, section 2.1): root and targets are offline with a
threshold; targets delegates ``adapters`` (offline, threshold) and ``rounds`` (the online key);
snapshot and timestamp belong to the online key too. Lifetimes suit a fleet that is connected most
of the time; an expired file stops new installs and never a running adapter.

It knows nothing of files or of devices; time and keys are arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from tuf.api.metadata import (  # type: ignore[attr-defined]  # it has no __all__
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from federation.keys import Signer
from protos.signed import (
    ADAPTERS_ROLE,
    CURRENT_ROUND,
    ROUNDS_ROLE,
    SIGNED_UNIX,
    STANDING,
    ReleaseStatement,
    RoundDocument,
    Standing,
)

LIFETIME: Mapping[str, timedelta] = {
    "timestamp": timedelta(hours=24),
    "snapshot": timedelta(days=7),
    ROUNDS_ROLE: timedelta(days=30),
    ADAPTERS_ROLE: timedelta(days=180),
    "targets": timedelta(days=180),
    "root": timedelta(days=365),
}
"""How long each role's file is believed; further roles of adapters live as long as ``adapters``."""
AnyMetadata = Metadata[Root] | Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp]
S = TypeVar("S", Root, Targets, Snapshot, Timestamp)
ADAPTER_PATHS = ["adapters/*/*"]
ROUND_PATHS = ["rounds/*"]


def lifetime(role: str) -> timedelta:
    """How long a file of this role is believed."""
    return LIFETIME.get(role, LIFETIME[ADAPTERS_ROLE])


def in_seconds(now: datetime) -> datetime:
    """The time in UTC, whole seconds, as metadata stores it.

    Raises:
        ValueError: a time without a zone.
    """
    if now.tzinfo is None:
        raise ValueError(f"the time {now} has no zone: pass datetime.now(UTC)")
    return now.astimezone(UTC).replace(microsecond=0)


def dated(signed: Signed, role: str, version: int, now: datetime) -> None:
    """Give a new version its number, the time it was made and its expiry."""
    moment = in_seconds(now)
    signed.version = version
    signed.expires = moment + lifetime(role)
    signed.unrecognized_fields[SIGNED_UNIX] = int(moment.timestamp())


def to_bytes(metadata: AnyMetadata) -> bytes:
    """The file of a metadata value."""
    return metadata.to_bytes(JSONSerializer(compact=True))


def sign(metadata: Metadata[S], signers: Iterable[Signer]) -> Metadata[S]:
    """The same value with these signatures added."""
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata


def root(
    root_keys: Sequence[Signer], online: Signer, threshold: int, now: datetime
) -> Metadata[Root]:
    """The first root: offline keys for root and targets, the online key for the rest."""
    signed = Root(consistent_snapshot=True)
    dated(signed, "root", 1, now)
    offline = [signer.public_key for signer in root_keys]
    for key in [*offline, online.public_key]:
        signed.keys[key.keyid] = key
    for role in ("root", "targets"):
        signed.roles[role] = Role([key.keyid for key in offline], threshold)
    for role in ("snapshot", "timestamp"):
        signed.roles[role] = Role([online.public_key.keyid], 1)
    return sign(Metadata(signed), root_keys)


def targets(
    root_keys: Sequence[Signer],
    adapter_keys: Sequence[Signer],
    online: Signer,
    threshold: int,
    now: datetime,
) -> Metadata[Targets]:
    """The first targets: no target of its own, two delegations."""
    offline = [signer.public_key for signer in adapter_keys]
    keys = {key.keyid: key for key in [*offline, online.public_key]}
    roles = {
        ADAPTERS_ROLE: DelegatedRole(
            ADAPTERS_ROLE,
            [key.keyid for key in offline],
            threshold,
            terminating=True,
            paths=ADAPTER_PATHS,
        ),
        ROUNDS_ROLE: DelegatedRole(
            ROUNDS_ROLE, [online.public_key.keyid], 1, terminating=True, paths=ROUND_PATHS
        ),
    }
    signed = Targets(delegations=Delegations(keys, roles))
    dated(signed, "targets", 1, now)
    return sign(Metadata(signed), root_keys)


def adapters(
    listed: Iterable[TargetFile], version: int, now: datetime, standing: Standing | None = None
) -> Metadata[Targets]:
    """An unsigned ``adapters`` file that lists these releases, and says this of older ones."""
    signed = Targets(targets={target.path: target for target in listed})
    dated(signed, ADAPTERS_ROLE, version, now)
    said = standing.to_field() if standing is not None else None
    if said is not None:
        signed.unrecognized_fields[STANDING] = said
    return Metadata(signed)


def release_target(statement: ReleaseStatement, length: int, sha256: str) -> TargetFile:
    """The entry of a release: its payload's length and digest, its statement in ``custom``."""
    fields = {"custom": statement.to_custom()}
    return TargetFile(length, {"sha256": sha256}, statement.target, fields)


def rounds(
    document: RoundDocument, version: int, now: datetime, online: Signer
) -> Metadata[Targets]:
    """A signed ``rounds`` file; its one target is the document itself, repeated in ``custom``."""
    target = TargetFile.from_data(CURRENT_ROUND, round_bytes(document))
    target.unrecognized_fields["custom"] = document.to_custom()
    signed = Targets(targets={CURRENT_ROUND: target})
    dated(signed, ROUNDS_ROLE, version, now)
    return sign(Metadata(signed), [online])


def round_bytes(document: RoundDocument) -> bytes:
    """The bytes of the target ``rounds/current``: canonical JSON of the document."""
    return json.dumps(document.to_custom(), sort_keys=True, separators=(",", ":")).encode()


def snapshot(
    files: Mapping[str, tuple[int, bytes]], version: int, now: datetime, online: Signer
) -> Metadata[Snapshot]:
    """A signed snapshot of the given roles (version and file of each)."""
    meta = {
        f"{role}.json": MetaFile.from_data(number, data, ["sha256"])
        for role, (number, data) in files.items()
    }
    signed = Snapshot(meta=meta)
    dated(signed, "snapshot", version, now)
    return sign(Metadata(signed), [online])


def timestamp(
    snapshot_version: int, snapshot_file: bytes, version: int, now: datetime, online: Signer
) -> Metadata[Timestamp]:
    """A signed timestamp that names one snapshot."""
    signed = Timestamp(
        snapshot_meta=MetaFile.from_data(snapshot_version, snapshot_file, ["sha256"])
    )
    dated(signed, "timestamp", version, now)
    return sign(Metadata(signed), [online])
