"""A publisher with all keys, honest or stolen, and one device: every attack is staged with these.

The publisher is the bundle source itself: a test changes what it hands out as an attacker would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, MetaFile

from clients.trust import DeviceFacts, Install, Rejected, SignedRelease, Trust, Verdict
from federation import keys, roles
from federation.keys import KeyFolder
from federation.published import ReleaseRecord, read_standing
from federation.repository import Repository
from protos.messages import MetadataBundle, RejectReason
from protos.signed import Assignment, ReleaseStatement, RoundDocument, Standing

START = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
BASE = "sha256:" + "b" * 64
OTHER_BASE = "sha256:" + "c" * 64


def digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def statement(counter: int, *, channel: str = "stable", **changes: Any) -> ReleaseStatement:
    fields: dict[str, Any] = {
        "channel": channel,
        "counter": counter,
        "adapter_digest": digest(f"adapter {channel} {counter}"),
        "spec_digest": digest("spec"),
        "base_digest": BASE,
        "plain_length": 1_000,
    }
    return ReleaseStatement(**{**fields, **changes})


def payload_of(counter: int, channel: str = "stable") -> bytes:
    return f"payload of {channel} {counter} ".encode() * 40


class Publisher:
    """The server's side with every key at hand."""

    def __init__(self, folder: Path, *, scheme: str = "ed25519", now: datetime = START) -> None:
        self.now = now
        names = (*keys.ROOT_NAMES, *keys.ADAPTER_NAMES, keys.ONLINE_NAME)
        self.keys: KeyFolder = keys.generate(folder / "keys", names, scheme=scheme)
        self.root_keys = self.keys.signers("root-")
        self.adapter_keys = self.keys.signers("adapters-")
        self.online = self.keys.signer("online")
        self.repository = Repository.create(
            folder / "repository",
            root_keys=self.root_keys,
            adapter_keys=self.adapter_keys,
            online=self.online,
            now=now,
        )

    def signed_adapters(
        self,
        new: ReleaseStatement,
        data: bytes,
        *,
        signers: Any = None,
        keep: bool = True,
        standing: Standing | None = None,
    ) -> bytes:
        """The next ``adapters`` file with one more release, and what was said of older ones."""
        current = Metadata[Any].from_bytes(self.repository.adapters()).signed
        listed = list(current.targets.values()) if keep else []
        target = roles.release_target(new, len(data), hashlib.sha256(data).hexdigest())
        said = read_standing(current) if standing is None else standing
        unsigned = roles.adapters([*listed, target], current.version + 1, self.now, said)
        chosen = self.adapter_keys[:2] if signers is None else signers
        return roles.to_bytes(roles.sign(unsigned, chosen))

    def release(self, counter: int, *, channel: str = "stable", **changes: Any) -> ReleaseRecord:
        new, data = statement(counter, channel=channel, **changes), payload_of(counter, channel)
        return self.repository.publish_release(self.signed_adapters(new, data), data, now=self.now)

    def order(
        self,
        *assignments: Assignment | ReleaseRecord,
        salt: str = "salt",
        rollout: str = "r",
        window: str = "",
    ) -> RoundDocument:
        rows = tuple(
            a if isinstance(a, Assignment) else Assignment(10_000, a.target, a.sha256)
            for a in assignments
        )
        document = RoundDocument(
            sequence=self.repository.round().sequence + 1,
            rollout=rollout,
            salt=salt,
            assignments=rows,
            window=window,
        )
        return self.repository.publish_round(document, now=self.now)

    def later(self, **span: float) -> None:
        self.now += timedelta(**span)

    def refresh(self) -> None:
        self.repository.refresh_timestamp(self.now)

    def bundle(self) -> MetadataBundle:
        return self.repository.bundle()

    def forged(self, **changed: Metadata[Any] | bytes) -> MetadataBundle:
        """What a thief of the online key can serve: these roles, and all that leads to them."""
        files = dict(self.bundle().files)
        current = {name.split(".")[-2]: name for name in files if "root" not in name}
        snapshot = Metadata[Any].from_bytes(files[current["snapshot"]])
        for role, metadata in changed.items():
            data = metadata if isinstance(metadata, bytes) else roles.to_bytes(metadata)
            version = Metadata[Any].from_bytes(data).signed.version
            files[f"{version}.{role}.json"] = data
            snapshot.signed.meta[f"{role}.json"] = MetaFile.from_data(version, data, ["sha256"])
        return self.resign(files, snapshot)

    def resign(self, files: dict[str, bytes], snapshot: Metadata[Any]) -> MetadataBundle:
        snapshot.signed.version += 1
        snapshot.sign(self.online)
        data = roles.to_bytes(snapshot)
        files[f"{snapshot.signed.version}.snapshot.json"] = data
        old = Metadata[Any].from_bytes(files["timestamp.json"]).signed.version
        files["timestamp.json"] = roles.to_bytes(
            roles.timestamp(snapshot.signed.version, data, old + 1, self.now, self.online)
        )
        return MetadataBundle(files)


class Device:
    """One device's trust, with its own clock."""

    def __init__(self, folder: Path, publisher: Publisher, **facts: Any) -> None:
        self.folder = folder
        self.publisher = publisher
        self.facts = DeviceFacts(
            **{"device_id": "d-1", "base_digest": BASE, "runtime": "torch", **facts}
        )
        self.trust = Trust.bootstrap(folder, publisher.repository.root())

    def accept(
        self, bundle: MetadataBundle | None = None, *, now: datetime | None = None
    ) -> Verdict:
        return self.trust.accept(
            bundle if bundle is not None else self.publisher.bundle(),
            device=self.facts,
            now=now or self.publisher.now,
        )

    def installs(self, bundle: MetadataBundle | None = None) -> SignedRelease:
        verdict = self.accept(bundle)
        assert isinstance(verdict, Install), verdict
        return verdict.release

    def refuses(
        self, bundle: MetadataBundle | None = None, *, now: datetime | None = None
    ) -> Rejected:
        try:
            verdict = self.accept(bundle, now=now)
        except Rejected as rejected:
            return rejected
        raise AssertionError(f"accepted: {verdict}")

    def reason(
        self, bundle: MetadataBundle | None = None, *, now: datetime | None = None
    ) -> RejectReason:
        return self.refuses(bundle, now=now).reason

    def restart(self) -> None:
        self.trust = Trust.open(self.folder)


def with_files(bundle: MetadataBundle, changed: Mapping[str, bytes | None]) -> MetadataBundle:
    """The bundle with files replaced, or left out (None)."""
    files = {**bundle.files, **changed}
    return MetadataBundle({name: data for name, data in files.items() if data is not None})


def file_of(bundle: MetadataBundle, role: str) -> str:
    """The name of a role's newest file in a bundle."""
    names = [n for n in bundle.files if n == f"{role}.json" or n.endswith(f".{role}.json")]
    return max(names, key=lambda n: int(n.split(".")[0]) if n[0].isdigit() else 0)


def rebuilt(data: bytes, change: Any) -> bytes:
    """The file with its JSON changed and its signatures left as they were."""
    doc = json.loads(data)
    change(doc)
    return json.dumps(doc).encode()
