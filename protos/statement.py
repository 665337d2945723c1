"""What the adapter keys say about a release: the ``custom`` field of its target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from protos.signed_checks import (
    DIGEST,
    MAX_TEXT,
    SCHEMA,
    WORD,
    StatementError,
    check_channel,
    check_document,
    check_integer,
    check_object,
    check_text,
    optional,
    target_name,
)
from protos.statement_parts import (
    ANY_HARDWARE,
    UNKNOWN_ORIGIN,
    Evaluation,
    Hardware,
    Lineage,
    PrivacyClaim,
    Seal,
)

__all__ = ["Evaluation", "Hardware", "Lineage", "PrivacyClaim", "ReleaseStatement", "Seal"]

MAX_EVALUATIONS = 16


@dataclass(frozen=True, kw_only=True)
class ReleaseStatement:
    """What the adapter keys say about one release.

    Attributes:
        channel: which line of releases it belongs to.
        counter: its number in the channel, from 1; never reused.
        adapter_digest: ``sha256:<hex>`` of the decoded adapter.
        spec_digest: ``sha256:<hex>`` of its specification.
        base_digest: ``sha256:<hex>`` of the only base model that it fits.
        plain_length: bytes of the decoded payload: the hard cap of the decoder.
        runtime: kinds of inference engine that can serve it.
        floor: from now on no device installs a counter of this channel below this one.
        example: example-level privacy, if training had any.
        client: client-level privacy, if training had any.
        lineage: where it came from.
        evaluation: how good it is, if that was measured.
        more_evaluations: the same on further named sets.
        forced: why it was released although it is worse than the release before, or was not
            measured where that one was; empty otherwise.
        model_signing: ``sha256:<hex>`` of an OpenSSF model-signing bundle over the adapter's
            folder, or empty: provenance, for whoever asks where the adapter was trained.
        hardware: what a machine must have.
        seal: how the payload is encrypted, if it is; digest and length are of what is sent.
        notes: for people.
        made_unix: when the release was made, in seconds since 1970, UTC.
    """

    channel: str
    counter: int
    adapter_digest: str
    spec_digest: str
    base_digest: str
    plain_length: int
    runtime: tuple[str, ...] = ("torch",)
    floor: int = 0
    example: PrivacyClaim | None = None
    client: PrivacyClaim | None = None
    lineage: Lineage = UNKNOWN_ORIGIN
    evaluation: Evaluation | None = None
    more_evaluations: tuple[Evaluation, ...] = ()
    forced: str = ""
    model_signing: str = ""
    hardware: Hardware = ANY_HARDWARE
    seal: Seal | None = None
    notes: str = ""
    made_unix: int = 0

    def __post_init__(self) -> None:
        check_channel(self.channel)
        check_integer("counter", self.counter, 1)
        for field in ("adapter_digest", "spec_digest", "base_digest"):
            value = getattr(self, field)
            if not isinstance(value, str) or not DIGEST.match(value):
                raise StatementError(f"{field} {str(value)[:80]!r} is not sha256:<64 hex digits>")
        check_integer("plain_length", self.plain_length, 1)
        check_integer("floor", self.floor, 0, self.counter)
        check_integer("made_unix", self.made_unix)
        check_text("notes", self.notes, MAX_TEXT)
        check_text("forced", self.forced, 500)
        if self.model_signing and not DIGEST.match(
            check_text("model_signing", self.model_signing, 80)
        ):
            raise StatementError(
                f"model_signing {self.model_signing!r} is not sha256:<64 hex digits>"
            )
        sets = [one.set for one in self.evaluations]
        if len(sets) > MAX_EVALUATIONS or len(set(sets)) < len(sets):
            raise StatementError(
                f"evaluations must be at most {MAX_EVALUATIONS}, each on another set; given: "
                f"{', '.join(sets)[:200]}"
            )
        if not 1 <= len(self.runtime) <= 16 or not all(
            isinstance(word, str) and WORD.match(word) for word in self.runtime
        ):
            raise StatementError(
                f"runtime {str(self.runtime)[:80]} must be 1 to 16 short words such as 'torch'"
            )

    @property
    def name(self) -> str:
        """What people call it: ``<channel>-<counter>``."""
        return f"{self.channel}-{self.counter}"

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """All evaluations, the first one first."""
        return (*([self.evaluation] if self.evaluation else []), *self.more_evaluations)

    @property
    def target(self) -> str:
        """Its name in the repository."""
        return target_name(self.channel, self.counter)

    def to_custom(self) -> dict[str, Any]:
        """The ``custom`` field of the target; integers and strings only.

        What may be missing is left out where it says nothing; ``hardware`` and ``seal`` are
        critical: an agent that does not know them must not take a release that it might not be
        able to serve, or to read.
        """
        extra: dict[str, Any] = {}
        critical = []
        if self.more_evaluations:
            extra["more_evaluations"] = [one.to_custom() for one in self.more_evaluations]
        if self.forced:
            extra["forced"] = self.forced
        if self.model_signing:
            extra["model_signing"] = self.model_signing
        if not self.hardware.anything:
            extra["hardware"] = self.hardware.to_custom()
            critical.append("hardware")
        if self.seal is not None:
            extra["seal"] = self.seal.to_custom()
            critical.append("seal")
        if critical:
            extra["critical"] = critical
        return {
            "schema": SCHEMA,
            "channel": self.channel,
            "counter": self.counter,
            "adapter_digest": self.adapter_digest,
            "spec_digest": self.spec_digest,
            "base_digest": self.base_digest,
            "plain_length": self.plain_length,
            "runtime": list(self.runtime),
            "floor": self.floor,
            "privacy": {
                "example": self.example.to_custom() if self.example else None,
                "client": self.client.to_custom() if self.client else None,
            },
            "lineage": self.lineage.to_custom(),
            "evaluation": self.evaluation.to_custom() if self.evaluation else None,
            "notes": self.notes,
            "made_unix": self.made_unix,
            **extra,
        }

    @classmethod
    def from_custom(cls, custom: Any) -> ReleaseStatement:
        """Read a ``custom`` field; each value is checked.

        Raises:
            StatementError: a field is missing, of the wrong type or out of bounds, or one that
                must be understood is not known here.
        """
        doc = check_document("release", custom, _FIELDS)
        privacy = check_object("privacy", doc.get("privacy", {}))
        runtime, more = doc["runtime"], doc.get("more_evaluations", [])
        if not isinstance(runtime, list) or not isinstance(more, list):
            raise StatementError("runtime and more_evaluations must be lists")
        return cls(
            channel=doc["channel"],
            counter=doc["counter"],
            adapter_digest=doc["adapter_digest"],
            spec_digest=doc["spec_digest"],
            base_digest=doc["base_digest"],
            plain_length=doc["plain_length"],
            runtime=tuple(runtime),
            floor=doc["floor"],
            example=optional(PrivacyClaim.from_custom, privacy.get("example")),
            client=optional(PrivacyClaim.from_custom, privacy.get("client")),
            lineage=Lineage.from_custom(doc.get("lineage", {})),
            evaluation=optional(Evaluation.from_custom, doc.get("evaluation")),
            more_evaluations=tuple(
                Evaluation.from_custom(one) for one in more[: MAX_EVALUATIONS + 1]
            ),
            forced=doc.get("forced", ""),
            model_signing=doc.get("model_signing", ""),
            hardware=Hardware.from_custom(doc.get("hardware", {})),
            seal=optional(Seal.from_custom, doc.get("seal")),
            notes=doc.get("notes", ""),
            made_unix=doc.get("made_unix", 0),
        )


_FIELDS = (
    frozenset(
        {
            "channel",
            "counter",
            "adapter_digest",
            "spec_digest",
            "base_digest",
            "plain_length",
            "runtime",
            "floor",
        }
    ),
    frozenset(
        {
            "privacy",
            "lineage",
            "evaluation",
            "more_evaluations",
            "forced",
            "model_signing",
            "hardware",
            "seal",
            "notes",
            "made_unix",
        }
    ),
)
