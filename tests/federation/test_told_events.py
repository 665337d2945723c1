"""What clients say they have spent: counted whatever becomes of the update, and not believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from aggregation.update import Update
from federation.rounds import Round
from federation.server_app import run_training
from privacy.budget import LocalPrivacy
from privacy.calibration import epsilon
from privacy.events import SgdEvent
from protos import flower
from simulations.grid import LocalGrid
from simulations.records import epsilons, example_events
from tests.simulations.toy import START, Behaviour, honest, settings, toy_app

PRIVACY = LocalPrivacy(epsilon=8.0, delta=1e-3, rounds=3)
EVENT = SgdEvent(noise_multiplier=1.0, sample_rate=0.1, steps=2, max_grad_norm=1.0)
LIAR = "client-00002"


def saying(event: Mapping[str, Any], **changes: object) -> Behaviour:
    """Everybody tells of the same event, and one of something else."""

    def behave(task: flower.TrainTask, client: str) -> Update:
        update = replace(honest(task, client), privacy_event=EVENT.to_mapping())
        return replace(update, privacy_event=event, **changes) if client == LIAR else update  # type: ignore[arg-type]

    return behave


def rounds_of(behave: Behaviour, number: int = 2) -> tuple[Round, ...]:
    config = settings(rounds=number, privacy=PRIVACY.to_mapping())
    with LocalGrid(toy_app(behave), config.clients) as grid:
        return run_training(grid, config, initial=START).rounds


@pytest.mark.parametrize("changes", [{"weight": math.nan}, {"start": "sha256:0"}, {"client": "x"}])
def test_what_was_sent_counts_though_the_update_is_refused(changes: dict[str, object]) -> None:
    rounds = rounds_of(saying(EVENT.to_mapping(), **changes))
    assert LIAR in rounds[1].refused
    assert rounds[1].privacy_events[LIAR] == EVENT.to_mapping()
    assert epsilons(rounds, PRIVACY, 2)[LIAR] == epsilon([EVENT] * 2, PRIVACY.delta)


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"kind": "something"},
        {**EVENT.to_mapping(), "noise_multiplier": 0.0},
        {**EVENT.to_mapping(), "noise_multiplier": 1e-3, "steps": 10**6},
        {**EVENT.to_mapping(), "steps": 10**400},
        {**EVENT.to_mapping(), "max_grad_norm": 10**400},
    ],
)
def test_one_that_tells_of_no_such_event_is_left_out_and_ends_nothing(
    event: dict[str, Any],
) -> None:
    rounds = rounds_of(saying(event), 1)
    assert rounds[1].refused == {LIAR: "malformed"}
    assert LIAR not in epsilons(rounds, PRIVACY, 1)
    assert len(rounds[1].used) == 4


def record(number: int, **fields: object) -> Round:
    return Round(number=number, adapter_in="", adapter_out="", **fields)  # type: ignore[arg-type]


def test_who_is_late_has_trained_all_the_same() -> None:
    told = {"ann": EVENT.to_mapping()}
    rounds = [
        record(1, cohort=("ann", "bob", "eve"), used=("ann",), privacy_events=told,
               refused={"bob": "late", "eve": "budget-exceeded"}),
        record(2, cohort=("ann", "bob", "eve"), refused=dict.fromkeys(("ann", "bob"), "late")
               | {"eve": "no-data"}),
    ]  # fmt: skip
    assert example_events(rounds, 1) == ({"ann": [EVENT]}, 1)
    assert example_events(rounds, 2) == ({"ann": [EVENT] * 2}, 1)  # bob has never said anything


def test_without_rounds_those_still_at_work_count_too() -> None:
    told = {"ann": EVENT.to_mapping()}
    rounds = [
        record(1, cohort=("ann", "bob"), used=("ann",), privacy_events=told),
        record(2, cohort=("ann",), refused={"bob": "stale", "eve": "max-rank"}),
    ]
    assert example_events(rounds, 2) == ({"ann": [EVENT] * 2}, 1)
    heard = replace(rounds[1], privacy_events={"bob": EVENT.to_mapping()})
    assert example_events([rounds[0], heard], 2) == ({"ann": [EVENT] * 2, "bob": [EVENT]}, 0)
