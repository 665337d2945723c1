"""The parts of a release's statement, each a noun of its own: privacy, lineage, quality, needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from protos.signed_checks import (
    DELTA_UNIT,
    DIGEST,
    HEX,
    MICRO,
    WORD,
    StatementError,
    check_integer,
    check_object,
    check_text,
)

MAX_DATA = 64  # fingerprints of training data
STREAM = "stream-chacha20poly1305-1"


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
    """Where an adapter came from; empty strings and zero where that is not known.

    Attributes:
        parent: digest of the adapter that training started from.
        run: name of the training run.
        round: number of the round that made it.
        recipe: how updates were combined.
        data: fingerprints (``sha256:<hex>``) of the data that it was trained on, as far as they may
            be told; a fingerprint tells whoever has the same data that it was used.
    """

    parent: str = ""
    run: str = ""
    round: int = 0
    recipe: str = ""
    data: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, value in (("parent", self.parent), ("run", self.run), ("recipe", self.recipe)):
            check_text(f"lineage.{field}", value, 500)
        check_integer("lineage.round", self.round)
        digests = all(isinstance(one, str) and DIGEST.match(one) for one in self.data)
        if len(self.data) > MAX_DATA or not digests:
            raise StatementError(
                f"lineage.data {str(self.data)[:80]} must be at most {MAX_DATA} fingerprints of "
                "the form sha256:<64 hex digits>"
            )

    def to_custom(self) -> dict[str, Any]:
        """As JSON objects."""
        return {**asdict(self), "data": list(self.data)}

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
            data=_words("lineage.data", doc.get("data", [])),
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
class Hardware:
    """What a machine must have to serve a release.

    Attributes:
        machines: processor architectures as ``uname -m`` names them; empty: any.
        memory_mib: physical memory that the device must have at least, in MiB.
    """

    machines: tuple[str, ...] = ()
    memory_mib: int = 0

    def __post_init__(self) -> None:
        check_integer("hardware.memory_mib", self.memory_mib)
        words = all(isinstance(word, str) and WORD.match(word) for word in self.machines)
        if len(self.machines) > 16 or not words:
            raise StatementError(
                f"hardware.machines {str(self.machines)[:80]} must be at most 16 names such as "
                "'x86_64'"
            )

    @property
    def anything(self) -> bool:
        """Whether every machine will do."""
        return not self.machines and not self.memory_mib

    def lacking(self, machine: str, memory_mib: int) -> str:
        """What a machine lacks, in words; empty if it will do.

        >>> Hardware(machines=("aarch64",)).lacking("x86_64", 1024)
        'needs a machine of aarch64; here is x86_64'
        >>> Hardware(memory_mib=512).lacking("x86_64", 1024)
        ''
        """
        if self.machines and machine not in self.machines:
            return f"needs a machine of {', '.join(self.machines)}; here is {machine or 'unknown'}"
        if memory_mib < self.memory_mib:
            return f"needs {self.memory_mib} MiB of memory; here are {memory_mib}"
        return ""

    def to_custom(self) -> dict[str, Any]:
        """As JSON objects."""
        return {"machines": list(self.machines), "memory_mib": self.memory_mib}

    @classmethod
    def from_custom(cls, doc: Any) -> Hardware:
        """From JSON objects.

        Raises:
            StatementError: a field is wrong.
        """
        doc = check_object("hardware", doc)
        return cls(
            machines=_words("hardware.machines", doc.get("machines", [])),
            memory_mib=doc.get("memory_mib", 0),
        )


@dataclass(frozen=True, kw_only=True)
class Seal:
    """How a payload is encrypted (:mod:`aggregation.sealed`).

    Attributes:
        check: 64 hex digits, by which whoever holds the content key knows that it is the right one.
        scheme: the only one there is.
    """

    check: str
    scheme: str = STREAM

    def __post_init__(self) -> None:
        if self.scheme != STREAM:
            raise StatementError(f"seal.scheme {str(self.scheme)[:40]!r} is not {STREAM!r}")
        if not isinstance(self.check, str) or not HEX.match(self.check):
            raise StatementError(f"seal.check {str(self.check)[:80]!r} is not 64 hex digits")

    def to_custom(self) -> dict[str, Any]:
        """As JSON objects."""
        return asdict(self)

    @classmethod
    def from_custom(cls, doc: Any) -> Seal:
        """From JSON objects.

        Raises:
            StatementError: a field is missing or wrong, or the scheme is not known.
        """
        doc = check_object("seal", doc)
        return cls(check=doc.get("check"), scheme=doc.get("scheme"))


def _words(what: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise StatementError(f"{what} must be a list")
    return tuple(value)


UNKNOWN_ORIGIN = Lineage()
ANY_HARDWARE = Hardware()
