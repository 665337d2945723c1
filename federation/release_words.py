"""Releases as people read them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from federation.cli_support import Format, show_fields, show_json


def show_release(output: Format, data: dict[str, Any]) -> None:
    """One release, for people or for programs."""
    if output is Format.JSON:
        show_json("release", data)
        return
    fields = dict(data)
    if fields.pop("more_evaluations", None) is not None:
        fields["evaluation"] = [data["evaluation"], *data["more_evaluations"]]
    if "sizes" in fields:
        fields["sizes"] = _weights(fields["sizes"])
    if "readers" in fields:
        fields["readers"] = _readers(fields["readers"])
    for name in ("privacy", "lineage", "evaluation", "hardware", "seal"):
        if name in fields:
            fields[name] = _words(name, fields[name])
    for name in ("runtime", "signed_by", "critical"):
        if isinstance(fields.get(name), list):
            fields[name] = ", ".join(fields[name])
    if "made_unix" in fields:
        fields["made"] = day(fields.pop("made_unix"))
    show_fields({name: "-" if value in (None, "", []) else value for name, value in fields.items()})


def _words(name: str, value: Any) -> str:
    if name == "privacy":
        return epsilon(value)
    if name == "evaluation":
        listed = value if isinstance(value, list) else [value] if value else []
        return (
            "; ".join(
                f"{accuracy(one)} on {one['set']}, {one['examples']} examples" for one in listed
            )
            or "-"
        )
    said = {k: ", ".join(v) if isinstance(v, list) else v for k, v in (value or {}).items()}
    return ", ".join(f"{k} {v}" for k, v in said.items() if v) or "-"


def _weights(sizes: dict[str, int]) -> str:
    """How large a release is, for people."""
    share = 100 * sizes["payload"] / max(1, sizes["body"])
    said = (
        f"{sizes['payload'] / 1e6:.3f} MB to fetch, {share:.0f} % of {sizes['body'] / 1e6:.3f} MB"
    )
    if "sealing" in sizes:
        said += (
            f"; encryption adds {sizes['sealing']} bytes, wrapped keys are {sizes['wraps']} bytes"
        )
    return said


def _readers(readers: dict[str, Any]) -> str:
    """Who can read an encrypted release, for people."""
    lacking = readers["lacking"]
    count = readers["devices"]
    said = f"{count} enrolled device{'' if count == 1 else 's'}"
    if lacking:
        said += f"; without an encryption key yet: {', '.join(lacking[:5])}"
        said += ", ..." if len(lacking) > 5 else ""
    return f"{said}; more of them later by: airpeft release wrap"


def epsilon(privacy: dict[str, Any]) -> str:
    """The signed privacy claims in words."""
    parts = [
        f"{claim['epsilon_micro'] / 1e6:g} (delta {claim['delta_e12'] / 1e12:g}, {claim['unit']})"
        for claim in (privacy or {}).values()
        if claim
    ]
    return "; ".join(parts) or "-"


def accuracy(evaluation: dict[str, Any] | None) -> str:
    """The signed accuracy."""
    return f"{evaluation['accuracy_micro'] / 1e6:.4f}" if evaluation else "-"


def day(unix: int) -> str:
    """A time for people, UTC."""
    try:
        return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M") if unix else "-"
    except (ValueError, OverflowError, OSError):
        return f"{unix} seconds after 1970"
