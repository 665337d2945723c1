"""What is known of an adapter beside its numbers, in the files of its folder.

``version.json`` says where it came from and how good it is, ``evaluation.json`` how good it is on
several named sets, ``privacy.json`` what was spent on it. All are optional, and a field that is
there is checked. Floats become integers in named units here, rounded to the side that promises
less: epsilon and delta up, accuracy down. An ``evaluation.json``::

    {"evaluations": [{"set": "heldout", "accuracy": 0.8425, "examples": 400}, ...]}
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from federation.errors import FederationError
from protos.signed import (
    DELTA_UNIT,
    MICRO,
    Evaluation,
    Lineage,
    PrivacyClaim,
    StatementError,
)
from protos.signed_checks import check_text

VERSION_FILE = "version.json"
PRIVACY_FILE = "privacy.json"
EVALUATION_FILE = "evaluation.json"
MAX_FILE = 4 << 20


class ProvenanceError(FederationError):
    """A file beside an adapter that does not say what it should; names the file and the field."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What an adapter's folder says of it; empty where it says nothing.

    Attributes:
        lineage: where it came from.
        evaluation: how good it is.
        example: what was spent on each example.
        client: what was spent on each client.
        personal: why it is no model of its own, if it is only what personal models share.
    """

    lineage: Lineage = field(default_factory=Lineage)
    evaluations: tuple[Evaluation, ...] = ()
    example: PrivacyClaim | None = None
    client: PrivacyClaim | None = None
    personal: str = ""


def read_provenance(folder: Path) -> Provenance:
    """Read the files that stand beside an adapter, as far as they are there.

    What ``evaluation.json`` says of a set comes before what ``version.json`` says of it.

    Raises:
        ProvenanceError: a file is not JSON, or one of its fields is wrong.
    """
    version = _read_json(folder / VERSION_FILE)
    privacy = _read_json(folder / PRIVACY_FILE)
    try:
        mine = version.get("evaluation")
        measured = read_evaluations(folder / EVALUATION_FILE)
        if mine is not None:
            one = Evaluation.from_custom(mine)
            measured = {one.set: one, **measured}
        return Provenance(
            lineage=Lineage.from_custom(version.get("lineage", {})),
            evaluations=tuple(measured.values()),
            example=claim(privacy, "example"),
            client=claim(privacy, "client"),
            personal=check_text("personal", version.get("personal", ""), 1000),
        )
    except StatementError as error:
        raise ProvenanceError(f"{folder}: {error}") from None


def read_evaluations(path: Path) -> dict[str, Evaluation]:
    """The named sets of an ``evaluation.json``; none if there is no such file.

    Raises:
        ProvenanceError: it is not JSON, or one of its fields is wrong.
    """
    listed = _read_json(path).get("evaluations", [])
    if not isinstance(listed, list):
        raise ProvenanceError(f"{path}: evaluations must be a list")
    found: dict[str, Evaluation] = {}
    for item in listed:
        fields = item if isinstance(item, dict) else {}
        name, accuracy, examples = (fields.get(k) for k in ("set", "accuracy", "examples"))
        number = isinstance(accuracy, int | float) and not isinstance(accuracy, bool)
        if not isinstance(name, str) or not name or not number or name in found:
            raise ProvenanceError(
                f"{path}: {str(item)[:80]} must have a set of its own, an accuracy from 0 to 1 and "
                "a number of examples"
            )
        try:
            found[name] = evaluation(name, float(accuracy), examples)  # type: ignore[arg-type]
        except StatementError as error:
            raise ProvenanceError(f"{path}: {error}") from None
    return found


def fingerprint(data: str) -> str:
    """``sha256:<hex>`` of a file of training data; what is a fingerprint already stays as it is.

    Raises:
        ProvenanceError: there is no such file.
    """
    if data.startswith("sha256:"):
        return data
    try:
        with Path(data).open("rb") as stream:
            return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
    except OSError as error:
        raise ProvenanceError(f"cannot read {data}: {error.strerror}") from error


def claim(privacy: Mapping[str, Any], unit: str) -> PrivacyClaim | None:
    """What a privacy statement says for one unit, or None if it says nothing.

    A statement has either one object for each unit, or is itself that of the unit it names.

    >>> claim({"example": {"epsilon": 7.9999999, "delta": 1e-5}}, "example").epsilon_micro
    8000000
    >>> claim({"unit": "example", "epsilon": 8, "delta": 1e-5}, "client") is None
    True

    Raises:
        ProvenanceError: epsilon or delta is not a number that fits.
    """
    part = privacy.get(unit)
    if part is None and privacy.get("unit") == unit:
        part = privacy
    if not isinstance(part, Mapping) or part.get("epsilon") is None:
        return None
    epsilon: Any = part["epsilon"]
    delta: Any = part.get("delta")
    for name, value, most in (("epsilon", epsilon, 1e6), ("delta", delta, 1.0)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= most:
            raise ProvenanceError(
                f"{PRIVACY_FILE}: {unit}.{name}={value!r} must be a number from 0 to {most:g}"
            )
    return PrivacyClaim(
        epsilon_micro=math.ceil(epsilon * MICRO), delta_e12=math.ceil(delta * DELTA_UNIT), unit=unit
    )


def evaluation(name: str, accuracy: float, examples: int) -> Evaluation:
    """A measured accuracy as it is signed.

    >>> evaluation("heldout", 0.8249999, 400).accuracy_micro
    824999

    Raises:
        ProvenanceError: an accuracy outside 0 to 1.
    """
    if not 0 <= accuracy <= 1:
        raise ProvenanceError(f"accuracy={accuracy!r} must be from 0 to 1")
    return Evaluation(set=name, accuracy_micro=math.floor(accuracy * MICRO), examples=examples)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        with path.open("rb") as stream:
            doc = json.loads(stream.read(MAX_FILE))
    except OSError as error:
        raise ProvenanceError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ProvenanceError(f"{path} is not JSON: {error}") from None
    if not isinstance(doc, dict):
        raise ProvenanceError(f"{path} is not a JSON object")
    return doc
