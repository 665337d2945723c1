from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.training import PlanError, TrainingPlan, parts, shuffled_batches
from privacy.budget import BudgetError, LocalPrivacy
from privacy.randomness import Stream, seeded_key

PRIVATE = LocalPrivacy(epsilon=8.0, delta=1e-5)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": st.floats(1e-6, 10),
            "head_learning_rate": st.floats(1e-6, 10),
            "epochs": st.floats(0.01, 50),
            "steps": st.integers(1, 100),
            "batch_size": st.integers(1, 4096),
            "optimizer": st.sampled_from(["adamw", "sgd"]),
            "momentum": st.floats(0, 0.99),
            "max_length": st.integers(4, 512),
        },
    )
)
def test_a_plan_survives_its_mapping(values: dict[str, Any]) -> None:
    plan = TrainingPlan(**values)
    assert TrainingPlan.from_mapping(plan.to_mapping()) == plan


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 8, "sample_rate": 0.1}, "not both"),
        ({"sample_rate": 1.5}, r"sample_rate=1\.5"),
        ({"steps": 0}, "steps=0"),
        ({"optimizer": "lion"}, "adamw, sgd"),
        ({"momentum": 1.0}, "momentum"),
        ({"max_length": 1000}, "max_length=1000"),
        ({"batch": 8}, "allowed: batch_size"),
        ({"epochs": "many"}, "must be a number"),
        ({"batch_size": 8.5}, "whole number"),
    ],
)
def test_an_impossible_plan_is_refused_by_name(values: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        TrainingPlan.from_mapping(values)


def test_steps_and_rates() -> None:
    assert TrainingPlan().batch_size == 32
    assert TrainingPlan(batch_size=30, epochs=1.0).steps_per_round(100) == 4
    assert TrainingPlan(batch_size=300, epochs=1.0).steps_per_round(100) == 1
    assert TrainingPlan(sample_rate=0.2, epochs=0.5).steps_per_round(7) == 3
    assert TrainingPlan(sample_rate=0.2, steps=9).steps_per_round(7) == 9


def test_a_private_batch_larger_than_the_data_is_refused_with_the_remedy() -> None:
    with pytest.raises(PlanError, match="sample_rate instead"):
        TrainingPlan(batch_size=64).event(63, PRIVATE, 1.0)
    event = TrainingPlan(batch_size=64, epochs=2.0).event(640, PRIVATE, 1.0)
    assert (event.sample_rate, event.steps) == (0.1, 20)
    with pytest.raises(BudgetError, match="1/n"):
        TrainingPlan().event(200_000, PRIVATE, 1.0)


@given(st.integers(1, 200), st.integers(1, 64), st.floats(0.1, 4.0))
def test_without_privacy_batches_are_even_passes_over_the_data(
    examples: int, size: int, epochs: float
) -> None:
    plan = TrainingPlan(batch_size=size, epochs=epochs)
    batches = list(shuffled_batches(examples, plan, Stream(seeded_key(1))))
    assert len(batches) == plan.steps_per_round(examples)
    assert {len(batch) for batch in batches} == {min(size, examples)}
    counts = np.bincount(np.concatenate(batches), minlength=examples)
    assert counts.max() - counts.min() <= 2
    # A batch that crosses the end of a pass is the only one that may hold an example twice.
    assert counts.sum() == sum(len(batch) for batch in batches)


@given(
    st.lists(st.integers(1, 32), max_size=80),
    st.integers(32, 400),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_parts_hold_every_example_once_within_the_bounds(
    lengths: list[int], bound: int, rows: int | None
) -> None:
    batch = np.arange(len(lengths))
    out = parts(batch, lengths, bound, rows)
    assert all(len(part) <= (rows or 80) for part in out)
    assert sorted(i for part in out for i in part.tolist()) == batch.tolist()
    for part in out:
        assert len(part) * max(lengths[i] for i in part) <= bound
    longest = [max(lengths[i] for i in part) for part in out]
    assert longest == sorted(longest)
