"""From the options of ``airpeft privacy audit`` to what is audited, and against what claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aggregation.init import initial_adapter
from clients.adapter_specs import adapter_spec
from clients.base import find_base
from clients.data import Examples
from privacy.audit import CONFIDENCE
from privacy.audit_bound import AuditError
from privacy.budget import Accountant, LocalPrivacy
from privacy.central import CentralPrivacy
from privacy.events import SgdEvent
from privacy.planning import Plan
from privacy.randomness import Stream, derive, seeded_key
from simulations import datasets
from simulations.audited_run import of_run
from simulations.auditing import ALPHA, RANK, LocalSubject, Question, Subject, own_training
from simulations.auditing_central import OTHERS, CentralSubject

USUAL: Mapping[str, Any] = {
    "delta": 1e-5,
    "sample_rate": 0.08,
    "steps": 130,
    "rounds": 1,
    "max_grad_norm": 1.0,
    "accountant": "rdp",
    "base": "minilm",
    "text": "text",
    "label": "label",
    "rows": 400,
}
EPSILON = 4.0
_OF_DATA = ("data", "text", "label", "rows")


@dataclass(frozen=True)
class Task:
    """What is audited, against what claim, and who makes the claim."""

    subject: Subject
    question: Question
    source: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options as given.

    Attributes:
        mechanism: ``local`` or ``central``.
        given: the options that say what is audited, by name; only those that were given.
        run: folder of a finished simulation, instead of these.
        client: of the run.
        canaries: how many, or None.
        confidence: of the lower bound.
        seed: root of all randomness.
    """

    mechanism: str = "local"
    given: Mapping[str, Any] = field(default_factory=dict)
    run: Path | None = None
    client: str | None = None
    canaries: int | None = None
    confidence: float = CONFIDENCE
    seed: int = 0

    def task(self) -> Task:
        """What they mean.

        Raises:
            AuditError: if two options contradict each other.
            BudgetError: if a number is out of its bounds; the option is named.
            SimulationError: if the run or the rows are not usable.
            ClientError: if the base is not there.
        """
        if self.run is not None:
            return self._of_run(self.run)
        if self.client is not None:
            raise AuditError("--client names a client of a run: give its folder with --run")
        useless = [*_OF_DATA, "rounds"] if self.mechanism == "central" else []
        self._refuse(useless, "of no use to --mechanism central, which trains nothing")
        values = {**USUAL, **self.given}
        rows = self._rows(values) if self.mechanism == "local" else None
        plan = Plan(
            sample_rate=values["sample_rate"],
            steps=values["steps"],
            delta=values["delta"],
            rounds=values["rounds"],
            noise_multiplier=values.get("noise_multiplier"),
            epsilon=values.get("epsilon", None if "noise_multiplier" in values else EPSILON),
            examples=None if rows is None else len(rows),
            accountant=Accountant(values["accountant"]),
        )
        answer = plan.answer()
        both = plan.epsilon is not None and plan.noise_multiplier is not None
        event = SgdEvent(
            noise_multiplier=answer.noise_multiplier,
            sample_rate=plan.sample_rate,
            steps=plan.steps,
            max_grad_norm=values["max_grad_norm"],
        )
        return Task(
            self._subject(values, event, plan, rows),
            self._question(
                plan.epsilon if both and plan.epsilon is not None else answer.epsilon, plan.delta
            ),
            "--epsilon" if both else f"the {plan.accountant.value} accountant",
        )

    def _of_run(self, run: Path) -> Task:
        self._refuse([name for name in self.given if name != "delta"], "taken from the run")
        if self.client is not None and self.mechanism == "central":
            raise AuditError("--client is of no use to --mechanism central: leave it out")
        found = of_run(
            run, mechanism=self.mechanism, client=self.client, delta=self.given.get("delta")
        )
        return Task(found.subject, self._question(found.claimed, found.delta), found.source)

    def _question(self, claimed: float, delta: float) -> Question:
        return Question(
            claimed=claimed,
            delta=delta,
            canaries=self.canaries,
            confidence=self.confidence,
            seed=self.seed,
        )

    def _refuse(self, names: list[str], why: str) -> None:
        found = [name for name in names if name in self.given]
        if found:
            raise AuditError(f"--{found[0].replace('_', '-')} is {why}: leave it out")

    def _rows(self, values: Mapping[str, Any]) -> Examples:
        """Some of the rows, by the seed."""
        wanted = values["rows"]
        if wanted < 1:
            raise AuditError(f"--rows {wanted} must be at least 1")
        loaded = datasets.load(
            "sentiment", path=values.get("data"), text=values["text"], label=values["label"]
        ).examples
        order = Stream(derive(seeded_key(self.seed), "rows")).permutation(len(loaded))
        return loaded.rows(np.sort(order[:wanted]).tolist())

    def _subject(
        self, values: Mapping[str, Any], event: SgdEvent, plan: Plan, rows: Examples | None
    ) -> LocalSubject | CentralSubject:
        base = find_base(values["base"])
        if rows is None:
            spec = adapter_spec(base, ("negative", "positive"), RANK, ALPHA)
            central = CentralPrivacy(
                rounds=event.steps,
                clients=OTHERS,
                fraction=event.sample_rate,
                sampling="poisson",
                delta=plan.delta,
                noise_multiplier=event.noise_multiplier,
                clip=event.max_grad_norm,
            )
            return CentralSubject(central=central, start=initial_adapter(spec, self.seed))
        privacy = LocalPrivacy(
            delta=plan.delta,
            noise_multiplier=event.noise_multiplier,
            max_grad_norm=event.max_grad_norm,
        )
        return own_training(base, rows, privacy, event, rounds=plan.rounds, seed=self.seed)
