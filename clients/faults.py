"""What may be told to others about a job that failed: a word of a closed list, never a message."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum

from aggregation.errors import RecipeError
from aggregation.ring import RingError
from aggregation.secret_ring import SecretError
from clients.base import BaseMismatch
from clients.data import DataError
from clients.training import ClientJob, PlanError
from privacy.budget import BudgetError, BudgetExceeded
from privacy.calibration import CalibrationError
from privacy.ledger import LedgerError
from privacy.secure_session import SecureSumError

log = logging.getLogger("airpeft.clients.trainer")


class JobFault(StrEnum):
    """Why a job has no update: all that may be told to others."""

    WRONG_BASE = "wrong-base"
    BAD_DATA = "bad-data"
    BAD_PLAN = "bad-plan"
    BUDGET_EXCEEDED = "budget-exceeded"
    LEDGER = "ledger"
    OUT_OF_RANGE = "out-of-range"
    SECURE_SUM = "secure-sum"
    TRAINING_FAILED = "training-failed"


@dataclass(frozen=True)
class JobFailure:
    """A job that has no update.

    Attributes:
        client: the job's client.
        round: the job's round.
        fault: why; this may leave the device.
        detail: the error's message, for the device's own log; it must not leave the device.
    """

    client: str
    round: int
    fault: JobFault
    detail: str = ""


_FAULTS: tuple[tuple[type[Exception], JobFault], ...] = (
    (BaseMismatch, JobFault.WRONG_BASE),
    (DataError, JobFault.BAD_DATA),
    (PlanError, JobFault.BAD_PLAN),
    (BudgetExceeded, JobFault.BUDGET_EXCEEDED),
    (BudgetError, JobFault.BAD_PLAN),
    (CalibrationError, JobFault.BAD_PLAN),
    (RecipeError, JobFault.BAD_PLAN),
    (RingError, JobFault.OUT_OF_RANGE),
    (SecretError, JobFault.BAD_PLAN),
    (SecureSumError, JobFault.SECURE_SUM),
    (LedgerError, JobFault.LEDGER),
)


def fault_for(error: Exception) -> JobFault:
    """The word for an error, from the closed list."""
    for kind, fault in _FAULTS:
        if isinstance(error, kind):
            return fault
    return JobFault.TRAINING_FAILED


def failure(job: ClientJob, fault: JobFault, error: Exception) -> JobFailure:
    """The failure of a job, its message kept in this device's log."""
    log.warning("%s has no update in round %d: %s: %s", job.client, job.round, fault, error)
    return JobFailure(job.client, job.round, fault, str(error))
