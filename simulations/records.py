"""From the record of a round to its line of ``metrics.jsonl``.

Everything in a line but ``seconds`` is the same whenever the same scenario is run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from aggregation.choices import CHOICES
from federation.provenance import evaluation
from federation.rounds import LATE, STALE, TOO_SMALL, UNREACHABLE, Round, RoundsConfig
from privacy import calibration
from privacy.budget import LocalPrivacy
from privacy.central import CentralPrivacy
from privacy.events import CohortEvent, SgdEvent
from protos.signed import Lineage


def epsilons(rounds: Sequence[Round], privacy: LocalPrivacy | None, upto: int) -> dict[str, float]:
    """Epsilon of each client, composed over its events of rounds 1 to ``upto``.

    Args:
        rounds: records; each says what its clients spent in it.
        privacy: gives delta and the accountant; None if clients trained without.
        upto: the last round that counts.
    """
    if privacy is None:
        return {}
    events, _ = example_events(rounds, upto)
    return {
        client: calibration.epsilon(spent, privacy.delta, privacy.accountant)
        for client, spent in sorted(events.items())
    }


def example_events(rounds: Sequence[Round], upto: int) -> tuple[dict[str, list[SgdEvent]], int]:
    """What each client has spent on its examples, and how many were asked and never said so.

    A client whose reply is late has trained and sent its update all the same, perhaps into the
    void: it counts with the event that it told of last in other rounds, which all go by one plan.

    Args:
        rounds: records; each says what its clients told.
        upto: the last round that counts.
    """
    events: dict[str, list[SgdEvent]] = {}
    unheard: Counter[str] = Counter()
    for record in (record for record in rounds if record.number <= upto):
        unheard.update(record.cohort)
        for client, event in record.privacy_events.items():
            events.setdefault(client, []).append(SgdEvent.from_mapping(event))
        # One that refused has sent nothing; and one that was never asked is not in the cohort.
        silent = {c for c, why in record.refused.items() if why in (LATE, STALE)}
        unasked = {c for c, why in record.refused.items() if why in (TOO_SMALL, UNREACHABLE)}
        heard = {*record.used, *record.refused, *record.privacy_events} - silent
        unheard.subtract((heard | (silent & record.privacy_events.keys())) - unasked)
        unheard.subtract(unasked & set(record.cohort))
    for client, times in (+unheard).items():
        if client in events:
            events[client] += [events[client][-1]] * times
    return events, len((+unheard).keys() - events.keys())


def client_events(rounds: Sequence[Round], upto: int) -> list[CohortEvent]:
    """What rounds 1 to ``upto`` have spent on every client, as the server's ledger has it."""
    return [
        CohortEvent.from_mapping(event)
        for record in rounds
        if record.number <= upto
        for event in record.client_events
    ]


def line(
    rounds: Sequence[Round],
    record: Round,
    privacy: LocalPrivacy | None,
    central: CentralPrivacy | None = None,
) -> dict[str, Any]:
    """One line of ``metrics.jsonl``.

    Args:
        rounds: the records up to this one, or more.
        record: the round.
        privacy: the clients' privacy, or None.
        central: what is promised to every client as a whole, or None.
    """
    spent = epsilons(rounds, privacy, record.number)
    known = record.measured and not central
    return {
        "round": record.number,
        **dict(record.metrics),
        # With noise on the sum nobody may know what it is without.
        "aggregation_error": record.aggregation_error if known else None,
        "kept_energy": record.kept_energy if known else None,
        "cohort": len(record.cohort),
        "used": len(record.used),
        "refused": dict(record.refused),
        "bytes_down": record.bytes_down,
        "bytes_up": record.bytes_up,
        "bytes_measuring": record.bytes_measuring,
        "personal": {name: found["accuracy"] for name, found in record.personal.items()},
        "influence": dict(record.influence),
        "unchanged": record.unchanged,
        **({"secure_sum": dict(record.secure)} if record.secure else {}),
        "epsilon_max": max(spent.values(), default=0.0) if privacy else None,
        "epsilon": spent,
        "client_epsilon": calibration.epsilon(
            client_events(rounds, record.number), central.delta, central.accountant
        )
        if central
        else None,
        "adapter": record.adapter_out,
        "seconds": record.seconds,
    }


def origin(
    config: RoundsConfig, run: str, rounds: Sequence[Round], *, data: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What ``version.json`` beside the adapter says: where it came from, how good it is.

    Args:
        config: how the rounds went.
        run: name of the run.
        rounds: the records of all rounds.
        data: fingerprints of the data, if they may be told.
    """
    last, chosen = rounds[-1], config.chosen()
    lineage = Lineage(
        parent=last.adapter_in, run=run, round=last.number, recipe=config.recipe, data=data
    )
    said: dict[str, Any] = {
        "lineage": lineage.to_custom(),
        "recipe": {
            "line": str(chosen),
            "pieces": {piece: str(getattr(chosen, piece)) for piece in CHOICES},
        },
    }
    if chosen.train.personal:
        return {**said, "personal": shared_only(config.recipe)}
    if "accuracy" in last.metrics:
        accuracy, examples = last.metrics["accuracy"], int(last.metrics["examples"])
        said["evaluation"] = evaluation("heldout", accuracy, examples).to_custom()
    return said


def shared_only(recipe: str) -> str:
    """What to say of the adapter of a recipe without a global model."""
    return (
        f"recipe {recipe} makes one model for each client, and this adapter is only what they "
        "share; the rest never leaves the clients. Serve it on the clients, each with its own "
        "part, or train with a recipe that makes a global model, such as svd-warm-start"
    )


def jsonl(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The file's content."""
    return b"".join(json.dumps(entry, sort_keys=True).encode() + b"\n" for entry in lines)
