"""What the slots of a device write down: the facts of a release, and which slot serves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from clients.trust_verdict import SignedRelease


@dataclass(frozen=True)
class SlotRecord:
    """What a slot remembers of its release: the signed facts, and the order that brought it.

    Attributes:
        release: name that people use, such as ``default-3``.
        channel: the release channel.
        counter: the release counter, growing within its channel.
        target: path in the repository.
        sha256: hex digest of the payload; with ``length`` the identity of the bytes.
        length: payload bytes.
        plain_length: bytes after decompression.
        adapter_digest: digest of the decoded adapter.
        spec_digest: digest of its specification.
        base_digest: base model that it belongs to.
        rollout: rollout that ordered it.
        round_sequence: number of the round document that ordered it.
        key_check: how to know the content key of an encrypted payload; empty for a plain one.
        wrapped: that key, wrapped to this device, as hex; empty until it is there.
    """

    release: str
    channel: str
    counter: int
    target: str
    sha256: str
    length: int
    plain_length: int
    adapter_digest: str
    spec_digest: str
    base_digest: str
    rollout: str = ""
    round_sequence: int = 0
    key_check: str = ""
    wrapped: str = ""

    @classmethod
    def of(cls, release: SignedRelease) -> SlotRecord:
        """The record of a release that trust has accepted."""
        return cls(
            release=release.name,
            channel=release.channel,
            counter=release.counter,
            target=release.target,
            sha256=release.sha256,
            length=release.length,
            plain_length=release.plain_length,
            adapter_digest=release.adapter_digest,
            spec_digest=release.spec_digest,
            base_digest=release.base_digest,
            rollout=release.rollout,
            round_sequence=release.sequence,
            key_check=release.statement.seal.check if release.statement.seal else "",
        )

    def to_bytes(self) -> bytes:
        """As ``release.json`` has it; of a plain payload, as older agents read it too."""
        fields = asdict(self)
        if not self.key_check:
            del fields["key_check"], fields["wrapped"]
        return json.dumps(fields, sort_keys=True).encode()


@dataclass(frozen=True)
class SlotState:
    """The pointers, as ``state.json`` has them.

    Attributes:
        active: the slot that serves; None for the base alone.
        previous: the slot that served before, if it is still whole.
        trial: the slot that was staged and neither committed nor reverted.
        attempts: how often the trial was begun.
        untold: what is still to be reported of the last commit; None once that is done.
    """

    active: str | None = None
    previous: str | None = None
    trial: str | None = None
    attempts: int = 0
    untold: Mapping[str, Any] | None = None
