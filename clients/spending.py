"""What a client's round costs in privacy, fixed and recorded before the first gradient.

>>> from privacy.budget import LocalPrivacy
>>> from clients.training import TrainingPlan
>>> plan = TrainingPlan(sample_rate=0.25, steps=4)
>>> private_event(plan, LocalPrivacy(noise_multiplier=1.0, delta=1e-5), 100).steps
4
"""

from __future__ import annotations

import math

from aggregation.spec import AdapterSpec
from aggregation.train import Assignment
from clients.training import ClientJob, PlanError, TrainingPlan
from privacy import calibration
from privacy.budget import Accountant, BudgetExceeded, LocalPrivacy
from privacy.events import SgdEvent
from privacy.ledger import Ledger

NOISE_DELTA = 1e-5  # for the epsilon that is reported: no budget names one for factor noise


def private_event(plan: TrainingPlan, privacy: LocalPrivacy, examples: int) -> SgdEvent:
    """What one private round of a client with so many examples will do, noise calibrated.

    Raises:
        PlanError: if a batch would be larger than the data.
        BudgetError: if delta is too large for so few examples.
        CalibrationError: if no noise reaches the epsilon.
    """
    sigma = privacy.noise_multiplier
    if sigma is None:
        assert privacy.epsilon is not None  # noqa: S101 - LocalPrivacy has checked it
        trial = plan.event(examples, privacy, 1.0)
        sigma = calibration.noise_multiplier(
            privacy.epsilon,
            privacy.delta,
            trial.sample_rate,
            trial.steps * privacy.rounds,
            privacy.accountant,
        )
    return plan.event(examples, privacy, sigma)


def noise_event(spec: AdapterSpec, assignment: Assignment) -> SgdEvent | None:
    """What clipping and noising the tensors of one update costs, or None if there is no noise.

    One Gaussian release: every example is in it, once. Each of the T tensors that are sent has
    norm C = ``clip`` at most, so whatever changes in the data, the update moves by at most
    ``2 sqrt(T) C``; the noise has deviation ``noise_multiplier C`` per number. That is a noise
    multiplier of ``noise_multiplier / (2 sqrt(T))``, for one example or all of a client's.

    DP-FedLoRA (2509.09097) counts each factor by itself; composed honestly, its usual noise gives
    an epsilon that protects nobody, which is what the ledger then says.
    """
    if not assignment.noise_multiplier:
        return None
    reach = 2.0 * math.sqrt(len(spec.shapes()))
    return SgdEvent(
        noise_multiplier=assignment.noise_multiplier / reach,
        sample_rate=1.0,
        steps=1,
        max_grad_norm=assignment.clip * reach,
    )


def refuse_unbounded(client: str, ledger: Ledger | None, what: str) -> None:
    """Refuse what tells of a client's rows without any noise, where its own ledger limits it.

    Args:
        client: whose rows.
        ledger: its own; None has no limit.
        what: what was asked of it, in words.

    Raises:
        BudgetExceeded: nothing was told.
    """
    limit = None if ledger is None else ledger.limit(client)
    if limit is not None:
        raise BudgetExceeded(
            f"{client}: its ledger limits it to epsilon {limit.epsilon}, and {what} has no bound: "
            "ask for training with privacy, or let the ledger's owner lift the limit (airpeft "
            "privacy limit --lift)"
        )


def spend(
    job: ClientJob, examples: int, ledger: Ledger | None, fingerprint: str
) -> tuple[SgdEvent | None, dict[str, float]]:
    """The event of a job, durable on return, and what may be told of it.

    Args:
        job: what is about to be done.
        examples: how many train.
        ledger: where it is recorded; None keeps no record.
        fingerprint: of everything that the training depends on.

    Returns:
        The event, None if nothing private is asked for; and metrics.

    Raises:
        PlanError: if two mechanisms are asked for at once.
        BudgetExceeded: if the client's budget would be passed, or what its own ledger allows
            whoever asks; nothing is recorded then.
    """
    privacy, released = job.privacy, noise_event(job.adapter.spec, job.assignment)
    if privacy is None and released is None:
        refuse_unbounded(job.client, ledger, "training without privacy")
        return None, {}
    if privacy is not None and released is not None:
        raise PlanError(
            "noise on the factors and DP-SGD are two mechanisms, and one event cannot tell of "
            "both: leave privacy out, or take a recipe without factor noise"
        )
    if privacy is not None:
        event = private_event(job.plan, privacy, examples)
        budget, accountant, delta = privacy.budget(), privacy.accountant, privacy.delta
    else:
        assert released is not None  # noqa: S101 - one of the two is there
        event, budget, accountant, delta = released, None, Accountant.RDP, NOISE_DELTA
    if ledger is None:
        epsilon = calibration.epsilon([event], delta, accountant)
    else:
        epsilon = ledger.spend(
            job.client,
            job.run,
            job.round,
            event,
            budget,
            accountant=accountant,
            delta=delta,
            inputs=fingerprint,
            model=job.adapter.spec.digest,
        ).epsilon
    return event, {"epsilon": epsilon, "noise_multiplier": event.noise_multiplier}
