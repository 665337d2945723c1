"""The server's noise on what clients send, as what an audit asks.

The sums are those of a run: the private piece opens them, the server's account gives the noise and
counts it, in a ledger that is thrown away. Only the clients are made up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.clipped_sum import ClippedSum, VectorSum
from aggregation.parcel_keys import sent_keys, sizes
from aggregation.reducing import Accumulator
from aggregation.state import initial_state
from privacy import audit_central
from privacy.audit import Audit, AuditError
from privacy.central import CentralPrivacy
from privacy.cohort_account import CohortAccount
from privacy.events import SgdEvent
from privacy.ledger import Ledger
from privacy.randomness import SEEDED, Stream, derive, seeded_key
from simulations.auditing import Progress, Question

OTHERS = 20  # clients beside the canaries, each with an update of its own


@dataclass(frozen=True, kw_only=True)
class CentralSubject:
    """Noise on the sum of what clients send.

    A clip that follows the updates stays where it begins, and the count that it follows is not
    read: what is measured is a lower bound all the same.

    Attributes:
        central: what is promised to every client.
        start: the global adapter.
        assignment: which of its tensors clients send.

    Raises:
        AuditError: if the mechanism is not ``gaussian``.
    """

    central: CentralPrivacy
    start: Adapter
    assignment: Assignment = field(default_factory=Assignment)

    def __post_init__(self) -> None:
        why = {
            "tree": "takes noise back in later rounds, and this audit reads every round by itself",
            "distributed": "has its noise added by the clients, and this audit adds the server's",
        }
        if self.central.mechanism != "gaussian":
            raise AuditError(
                f"mechanism={self.central.mechanism!r} {why[self.central.mechanism]}: audit "
                "mechanism='gaussian'"
            )

    @property
    def event(self) -> SgdEvent:
        """All rounds, with the noise that the vectors get."""
        return SgdEvent(
            noise_multiplier=self.central.piece().multiplier,
            sample_rate=self.central.sample_rate,
            steps=self.central.rounds,
            max_grad_norm=self.central.clip,
        )

    @property
    def parameters(self) -> int:
        """Length of what a client sends."""
        spec = self.start.spec
        return sum(sizes(sent_keys(spec, self.assignment), spec))

    @property
    def words(self) -> str:
        """What it is, for people."""
        return f"noise on the sum of what clients send, {OTHERS} clients beside the canaries"

    def audit(self, question: Question, progress: Progress = lambda _: None) -> Audit:
        """Run every round once with canaries among the clients; see ``auditing.Subject``."""
        central, key = self.central.calibrated(), seeded_key(question.seed)
        piece, state = central.piece(), initial_state(self.start)
        canaries = question.plant(self.event, self.parameters, progress)
        with tempfile.TemporaryDirectory() as folder:
            ledger = Ledger(Path(folder) / "ledger.sqlite")
            try:
                account = CohortAccount(
                    central, run="audit", ledger=ledger, key=key, randomness=SEEDED
                )
                audit_central.audit(
                    audit_central.NoisySums(
                        lambda number: _vectors(
                            piece.open(replace(state, round=number - 1), self.assignment, account)
                        )
                    ),
                    canaries,
                    size=self.parameters,
                    denominator=central.cohort,
                    others=self._others(Stream(derive(key, "others"))),
                )
            finally:
                ledger.close()
        return question.answer(canaries, "central")

    def _others(self, stream: Stream) -> Callable[[int], Iterator[audit_central.Vector]]:
        """The updates of the other clients that a round draws, three times as long as the clip."""
        long, rate = 3.0 * self.central.clip / np.sqrt(self.parameters), self.central.sample_rate

        def of_round(_: int) -> Iterator[audit_central.Vector]:
            for _ in range(int((stream.uniform(OTHERS) < rate).sum())):
                yield long * stream.normal(self.parameters)

        return of_round


def _vectors(opened: Accumulator) -> VectorSum:
    assert isinstance(opened, ClippedSum)  # noqa: S101 - of the only mechanism that is audited
    return opened.vectors
