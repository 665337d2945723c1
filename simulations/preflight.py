"""Everything about a scenario that can be wrong, found before a folder or a process exists.

A :class:`Draft` is a scenario with its base found, its rows read and dealt, and its privacy held
against every client's number of rows. What is refused here would else be refused by each client for
itself, in a run that goes on without them and learns nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from aggregation.errors import AggregationError
from aggregation.spec import AdapterSpec
from clients.base import BaseRef, find_base
from clients.data import held_out
from clients.errors import ClientError
from clients.gradients import planned_mode
from clients.model import adapter_spec
from clients.spending import private_event
from clients.training import TrainingPlan
from federation.rounds import RoundsConfig
from privacy.budget import LocalPrivacy
from privacy.errors import PrivacyError
from privacy.per_example import Mode
from protos.tasks import client_name
from simulations import datasets, from_scenario
from simulations.partition import Split
from simulations.scenario import Scenario, ScenarioError


@dataclass(frozen=True)
class Draft:
    """A scenario that can be run.

    Attributes:
        scenario: what it is.
        dataset: its rows.
        split: who has which of them.
        base: the base model.
        spec: of the adapter.
        privacy: the clients' privacy, or None.
        mode: how clients form gradients per example, and why; None without privacy. A client
            decides for itself by the model in its memory, and decides the same.
    """

    scenario: Scenario
    dataset: datasets.Dataset = field(repr=False)
    split: Split = field(repr=False)
    base: BaseRef
    spec: AdapterSpec
    privacy: LocalPrivacy | None
    mode: Mode | None
    _config: RoundsConfig = field(repr=False)

    def config(self, data_folder: Path) -> RoundsConfig:
        """How the rounds go, with the clients' rows in this folder."""
        return replace(self._config, data_folder=str(data_folder))


def draft(scenario: Scenario) -> Draft:
    """Check a scenario against its base and its rows. Nothing is written, nothing is started.

    Args:
        scenario: what to run.

    Raises:
        ScenarioError: if the base is not usable, two settings contradict each other, or the
            privacy that is asked for cannot be had with these rows; names the client.
        DatasetError: if the rows are not there, or not as the scenario says.
        RoundsError: if the recipe cannot run like this.
    """
    rows = from_scenario.dataset(scenario)
    try:
        base = find_base(scenario.base.name)
        spec = _spec(scenario, base, rows)
        plan, privacy = from_scenario.plan(scenario), from_scenario.privacy(scenario)
        split = from_scenario.split(scenario, rows)
        if privacy is not None:
            _check_privacy(scenario, plan, privacy, _rows_that_train(scenario, rows, split))
        config = from_scenario.rounds(scenario, plan, privacy, Path())
    except (ClientError, PrivacyError, AggregationError) as error:
        raise ScenarioError(f"scenario {scenario.name}: {error}") from error
    assignment = scenario.chosen().train.assignment(1)
    mode = None if privacy is None else planned_mode(spec, assignment)
    return Draft(scenario, rows, split, base, spec, privacy, mode, config)


def _spec(scenario: Scenario, base: BaseRef, rows: datasets.Dataset) -> AdapterSpec:
    train, chosen = scenario.train, scenario.chosen()
    spec = adapter_spec(
        base,
        rows.examples.label_names,
        train.rank,
        train.alpha,
        train.targets,
        tuple(range(max(0, base.layers - train.layers), base.layers)),
        train.rslora,
        method=train.method,
        virtual_tokens=train.virtual_tokens,
        bottleneck=train.bottleneck,
    )
    chosen.check_spec(spec)
    chosen.check_base(from_scenario.quantised(base))
    return spec


def _rows_that_train(scenario: Scenario, rows: datasets.Dataset, split: Split) -> Mapping[str, int]:
    """How many rows of each client train: all, but for those that it keeps out to measure on."""
    found = {}
    for number, own in enumerate(split.clients):
        name, count = client_name(number), len(own)
        if scenario.holdout:
            count = len(held_out(rows.examples.rows(own.tolist()), name, scenario.holdout)[0])
        if count:  # one that has nothing to train on says so by itself, and spends nothing
            found[name] = count
    return found


def _check_privacy(
    scenario: Scenario, plan: TrainingPlan, privacy: LocalPrivacy, rows: Mapping[str, int]
) -> None:
    """Hold the promise against the clients that have most and least.

    Delta is bounded by the largest number of rows, a batch by the smallest; and the smallest client
    needs the most noise.
    """
    if not rows:
        return
    for name in {max(rows, key=lambda n: rows[n]), min(rows, key=lambda n: rows[n])}:
        try:
            plan.event(rows[name], privacy, 1.0)
        except (ClientError, PrivacyError) as error:
            raise ScenarioError(f"scenario {scenario.name}: {name}: {error}") from error
    private_event(plan, privacy, min(rows.values()))
