"""From the words of a scenario to the values of the packages below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from aggregation import durable
from clients.base import BaseRef
from clients.training import TrainingPlan
from federation.rounds import RoundsConfig
from privacy.budget import LocalPrivacy
from privacy.secure_roster import Roster, public_bytes, seeded_identity
from protos.tasks import client_name, client_roster
from simulations import datasets, partition
from simulations.scenario import Scenario


def quantised(base: BaseRef) -> bool:
    """Whether the base's own configuration says that its weights are stored in few bits."""
    config = json.loads((base.path / "config.json").read_text("utf-8"))
    return bool(config.get("quantization_config"))


def dataset(scenario: Scenario) -> datasets.Dataset:
    """The rows that a scenario names.

    Raises:
        DatasetError: if they are not there, or not as the scenario says.
    """
    data = scenario.data
    return datasets.load(
        data.dataset,
        path=Path(data.path) if data.path else None,
        text=data.text,
        label=data.label,
        label_names=data.labels or None,
    )


def split(scenario: Scenario, rows: datasets.Dataset) -> partition.Split:
    """Who has which of them.

    Raises:
        SimulationError: if there are too few.
    """
    part = scenario.partition
    schemes: dict[str, Any] = {
        "iid": partition.Iid,
        "dirichlet": lambda: partition.Dirichlet(part.alpha),
        "pathological": lambda: partition.Pathological(part.classes),
        "size-skewed": lambda: partition.SizeSkewed(part.exponent),
        "natural": lambda: partition.Natural(
            datasets.column(rows, part.column, text=scenario.data.text)
        ),
    }
    return partition.make_split(
        np.asarray(rows.labels),
        schemes[part.scheme](),
        clients=part.clients,
        heldout=scenario.data.heldout,
        minimum=part.min_examples,
        seed=scenario.seed,
        limit=scenario.data.rows,
    )


def plan(scenario: Scenario) -> TrainingPlan:
    """How each client trains in a round.

    Raises:
        PlanError: if two settings contradict each other.
    """
    train = scenario.train
    return TrainingPlan(
        learning_rate=train.learning_rate,
        head_learning_rate=train.head_learning_rate,
        epochs=train.epochs,
        steps=train.steps,
        batch_size=train.batch_size,
        sample_rate=train.sample_rate,
        optimizer=train.optimizer,
        max_length=train.max_length,
        physical_batch=train.physical_batch,
    )


def privacy(scenario: Scenario) -> LocalPrivacy | None:
    """The clients' privacy, or None.

    Raises:
        BudgetError: if a setting is out of its bounds.
    """
    if scenario.privacy is None:
        return None
    return LocalPrivacy.from_mapping(
        {**scenario.privacy.model_dump(exclude_none=True), "rounds": scenario.federation.rounds}
    )


def rounds(
    scenario: Scenario, training: TrainingPlan, private: LocalPrivacy | None, data_folder: Path
) -> RoundsConfig:
    """How the rounds go.

    Raises:
        RoundsError: if the recipe cannot run like this.
        PrivacyError: if no noise keeps what is promised to clients.
    """
    federation, promised = scenario.federation, scenario.central()
    return RoundsConfig(
        run=scenario.run,
        rounds=federation.rounds,
        base=scenario.base.name,
        plan=training.to_mapping(),
        privacy=private.to_mapping() if private else None,
        recipe=federation.recipe,
        pieces=federation.pieces,
        sampling=federation.sampling,
        fraction=federation.fraction,
        clients=scenario.partition.clients,
        min_updates=federation.min_updates,
        deadline_seconds=federation.deadline_seconds,
        step_share=federation.step_share,
        seed=scenario.seed,
        data_folder=str(data_folder),
        ranks=scenario.ranks,
        holdout=scenario.holdout,
        trusted=scenario.trusted,
        buffer=federation.buffer,
        max_staleness=federation.max_staleness,
        client_privacy=promised.calibrated() if promised else None,
    )


def write_roster(scenario: Scenario, data_folder: Path) -> None:
    """The identities of simulated clients, for a secure sum: made from the seed.

    Raises:
        StorageError: if the disk is full.
    """
    names = [client_name(number) for number in range(scenario.partition.clients)]
    keys = {name: public_bytes(seeded_identity(scenario.seed, name)) for name in names}
    durable.write_bytes(client_roster(str(data_folder)), Roster(keys).to_bytes())
