"""From the record of a round to its line of ``metrics.jsonl``.

Everything in a line but ``seconds`` is the same whenever the same scenario is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from federation.rounds import Round
from privacy import calibration
from privacy.budget import LocalPrivacy
from privacy.events import SgdEvent


def epsilons(rounds: Sequence[Round], privacy: LocalPrivacy | None, upto: int) -> dict[str, float]:
    """Epsilon of each client, composed over its events of rounds 1 to ``upto``.

    Args:
        rounds: records; each says what its clients spent in it.
        privacy: gives delta and the accountant; None if clients trained without.
        upto: the last round that counts.
    """
    if privacy is None:
        return {}
    events: dict[str, list[SgdEvent]] = {}
    for record in rounds:
        if record.number <= upto:
            for client, event in record.privacy_events.items():
                events.setdefault(client, []).append(SgdEvent.from_mapping(event))
    return {
        client: calibration.epsilon(spent, privacy.delta, privacy.accountant)
        for client, spent in sorted(events.items())
    }


def line(rounds: Sequence[Round], record: Round, privacy: LocalPrivacy | None) -> dict[str, Any]:
    """One line of ``metrics.jsonl``.

    Args:
        rounds: the records up to this one, or more.
        record: the round.
        privacy: the clients' privacy, or None.
    """
    spent = epsilons(rounds, privacy, record.number)
    return {
        "round": record.number,
        **dict(record.metrics),
        "aggregation_error": record.aggregation_error,
        "kept_energy": record.kept_energy,
        "cohort": len(record.cohort),
        "used": len(record.used),
        "refused": dict(record.refused),
        "bytes_down": record.bytes_down,
        "bytes_up": record.bytes_up,
        "epsilon_max": max(spent.values(), default=0.0) if privacy else None,
        "epsilon": spent,
        "adapter": record.adapter_out,
        "seconds": record.seconds,
    }


def reproducible(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A line without what differs from run to run."""
    return {key: value for key, value in entry.items() if key != "seconds"}


def jsonl(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The file's content."""
    return b"".join(json.dumps(entry, sort_keys=True).encode() + b"\n" for entry in lines)
