"""Which fields a specification's JSON has, and the checks that it has those and no others."""

from __future__ import annotations

from typing import Any

from aggregation.module_spec import SpecError

FIELDS = {
    "base_digest",
    "labels",
    "modules",
    "others",
    "peft_type",
    "schema",
    "task",
    "use_rslora",
}
MODULE_FIELDS = {"alpha_micro", "d_in", "d_out", "name", "orientation", "rank"}


def exact(doc: Any, fields: set[str], what: str) -> None:
    """Refuse what is not an object with exactly these fields.

    Raises:
        SpecError: listing them.
    """
    if not isinstance(doc, dict) or set(doc) != fields:
        raise SpecError(f"a {what} must have exactly the fields {', '.join(sorted(fields))}")


def typed(kind: type, *values: Any) -> None:
    """Refuse values that are not of exactly this type; True is no number.

    Raises:
        SpecError: showing them.
    """
    if any(type(value) is not kind for value in values):
        raise SpecError(f"expected {kind.__name__} in {values!r}")
