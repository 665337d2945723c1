"""What the adapter keys say about a release: the ``custom`` field of its target."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from protos.signed_checks import (
    DELTA_UNIT,
    DIGEST,
    MAX_TEXT,
    MICRO,
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


@dataclass(frozen=True, kw_only=True)
class PrivacyClaim:
    """A privacy budget spent on an adapter, as signed.

    Attributes:
        epsilon_micro: epsilon in millionths, rounded up.
        delta_e12: delta in units of 10^-12, rounded up.
        unit: whose presence it hides: ``example`` or ``client``.
    """

    epsilon_micro: int
    delta_e12: int
    unit: str

    def __post_init__(self) -> None:
        check_integer("privacy.epsilon_micro", self.epsilon_micro)
        check_integer("privacy.delta_e12", self.delta_e12, 0, DELTA_UNIT)
        check_text("privacy.unit", self.unit, 32)

    def to_custom(self) -> dict[str, Any]:
        """As JSON objects."""
        return asdict(self)

    @classmethod
    def from_custom(cls, doc: Any) -> PrivacyClaim:
        """From JSON objects.

        Raises:
            StatementError: a field is missing or wrong.
        """
        doc = check_object("privacy", doc)
        return cls(
            epsilon_micro=doc.get("epsilon_micro"),
            delta_e12=doc.get("delta_e12"),
            unit=doc.get("unit"),
        )


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where an adapter came from; empty strings and zero where that is not known."""

    parent: str = ""
    run: str = ""
    round: int = 0
    recipe: str = ""

    def __post_init__(self) -> None:
        for field, value in (("parent", self.parent), ("run", self.run), ("recipe", self.recipe)):
            check_text(f"lineage.{field}", value, 500)
        check_integer("lineage.round", self.round)

    def to_custom(self) -> dict[str, Any]:
        """As JSON objects."""
        return asdict(self)

    @classmethod
    def from_custom(cls, doc: Any) -> Lineage:
        """From JSON objects.

        Raises:
            StatementError: a field is wrong.
        """
        doc = check_object("lineage", doc)
        return cls(
            parent=doc.get("parent", ""),
            run=doc.get("run", ""),
            round=doc.get("round", 0),
            recipe=doc.get("recipe", ""),
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy, in millionths, on a named set of so many examples."""

    set: str
    accuracy_micro: int
    examples: int

    def __post_init__(self) -> None:
        check_text("evaluation.set", self.set, 200)
        check_integer("evaluation.accuracy_micro", self.accuracy_micro, 0, MICRO)
        check_integer("evaluation.examples", self.examples)

    def to_custom(self) -> dict[str, Any]:
        """As JSON objects."""
        return asdict(self)

    @classmethod
    def from_custom(cls, doc: Any) -> Evaluation:
        """From JSON objects.

        Raises:
            StatementError: a field is missing or wrong.
        """
        doc = check_object("evaluation", doc)
        return cls(
            set=doc.get("set"),
            accuracy_micro=doc.get("accuracy_micro"),
            examples=doc.get("examples"),
        )


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
    lineage: Lineage = Lineage()
    evaluation: Evaluation | None = None
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
    def target(self) -> str:
        """Its name in the repository."""
        return target_name(self.channel, self.counter)

    def to_custom(self) -> dict[str, Any]:
        """The ``custom`` field of the target; integers and strings only."""
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
        runtime = doc["runtime"]
        if not isinstance(runtime, list):
            raise StatementError("runtime must be a list of words")
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
    frozenset({"privacy", "lineage", "evaluation", "notes", "made_unix"}),
)
