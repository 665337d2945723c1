"""How gradients per example are formed, as it is announced and as it is; and in how many parts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from aggregation.init import initial_adapter
from aggregation.recipes import RECIPES
from aggregation.train import Assignment
from clients.attachments import attached
from clients.base import BaseRef
from clients.data import Examples
from clients.faults import JobFailure
from clients.gradients import planned_mode
from clients.model import adapter_spec, attach, build
from clients.trainer import ResidentTrainer
from clients.training import Indices, PlanError, TrainingPlan
from clients.trunk import Features
from privacy.budget import LocalPrivacy
from privacy.ledger import Ledger
from privacy.per_example import HOOKS, LINEAR, choose
from tests.clients.jobs import job, update
from tests.device.tiny import LABELS

METHODS = ("lora", "ia3", "prompt", "prefix", "bottleneck")


@pytest.mark.parametrize("method", METHODS)
def test_the_announced_mode_is_the_one_that_the_model_gets(base: BaseRef, method: str) -> None:
    spec = adapter_spec(base, LABELS, rank=2, alpha=4.0, method=method)
    real, said = choose(attach(build(base, len(LABELS)), spec)), planned_mode(spec, Assignment())
    assert (said.name, said.rows_at_once) == (real.name, real.rows_at_once)
    assert said.name == (LINEAR if method == "lora" else HOOKS)
    assert said.reason.partition(";")[2] == real.reason.partition(";")[2]  # the same size


def test_it_is_so_for_what_each_recipe_trains(base: BaseRef) -> None:
    spec = adapter_spec(base, LABELS, rank=2, alpha=4.0)
    model = attach(build(base, len(LABELS)), spec)
    seen = set()
    for name, recipe in RECIPES.items():
        assignment = recipe.train.assignment(1)
        if assignment.trains in seen:
            continue
        seen.add(assignment.trains)
        start = recipe.start(initial_adapter(spec, 1)).adapter
        with attached(model, start, assignment):
            assert choose(model) == planned_mode(spec, assignment), name
    assert {"both", "B", "core"} <= seen


@pytest.mark.parametrize("privacy", [None, LocalPrivacy(noise_multiplier=0.5, delta=1e-3)])
def test_a_batch_in_small_parts_makes_the_step_of_the_whole_batch(
    base: BaseRef,
    examples: Examples,
    monkeypatch: pytest.MonkeyPatch,
    privacy: LocalPrivacy | None,
) -> None:
    parts: list[int] = []
    inputs = Features.inputs

    def counted(self: Features, indices: Indices) -> object:
        parts.append(len(indices))
        return inputs(self, indices)

    monkeypatch.setattr(Features, "inputs", counted)
    trainer = ResidentTrainer(base, threads=1)
    plan = TrainingPlan(sample_rate=0.5, steps=3, learning_rate=0.1, optimizer="sgd")
    found, sizes = [], []
    for bound in (None, 4):
        one = job(base, examples, plan=replace(plan, physical_batch=bound), privacy=privacy)
        found.append(update(trainer, one).adapter)
        sizes.append(tuple(parts))
        parts.clear()
    whole, split = sizes
    assert len(whole) == 3  # one part for each step
    assert max(split) == 4  # bounded
    assert sum(split) == sum(whole)  # and nothing left out
    assert len(split) > 15
    for key in found[0].tensors:
        start = one.adapter.tensors[key]
        first, second = (adapter.tensors[key] - start for adapter in found)
        # Sums of floats in another order: some units of the last of 24 bits.
        assert np.abs(first - second).max() <= 1e-5 * np.abs(first).max(), key


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (nn.BatchNorm1d(4), "norm is a batch normalisation, which mixes .* group normalisation"),
        (nn.Bilinear(2, 2, 2), "no gradient per example for Bilinear: adapt linear layers only"),
    ],
)
def test_a_model_that_cannot_be_private_spends_nothing(
    base: BaseRef, examples: Examples, tmp_path: Path, part: nn.Module, says: str
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    trainer = ResidentTrainer(base, ledger, threads=1)
    one = job(base, examples, privacy=LocalPrivacy(noise_multiplier=1.0, delta=1e-3))
    trainer.shelf.model(one.adapter.spec).add_module("norm", part)
    (result,) = trainer.train([one])
    assert isinstance(result, JobFailure)
    assert re.search(says, result.detail)
    assert ledger.head().count == 0


def test_the_bound_is_a_whole_number_and_left_out_of_plans_without_one() -> None:
    assert "physical_batch" not in TrainingPlan().to_mapping()
    plan = TrainingPlan(physical_batch=4)
    assert TrainingPlan.from_mapping(plan.to_mapping()) == plan
    for wrong in (0, -1, 2.5):
        with pytest.raises(PlanError, match="physical_batch"):
            TrainingPlan(physical_batch=wrong)  # type: ignore[arg-type]
