"""REST for rollouts: plan, start, look, and the operator's verbs."""

# No "from __future__ import annotations" here: FastAPI reads the annotations of functions that
# live inside another function.

from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query

from federation.api_answers import RolloutAnswer, RolloutStatus
from federation.api_bodies import RolloutRequest, WhyRequest
from federation.api_wraps import lacking_key
from federation.desk import Desk
from federation.filters import Filter
from federation.operators import Right
from federation.planning import Preview
from federation.policy import Policy
from federation.rollout import ACTIVE, State, Verb
from federation.rollout_book import RolloutRecord
from federation.standing import standing
from federation.waves import Wave, parse_plan

NEEDS = {
    Verb.APPROVE: Right.APPROVE,
    Verb.PAUSE: Right.STOP,
    Verb.ABORT: Right.STOP,
    Verb.ROLLBACK: Right.STOP,
}  # whoever may act at all may stop; the other verbs need Right.OPERATE


def add_rollout_routes(app: FastAPI, desk: Desk, look: Any, operate: Any, known: Any) -> None:
    """Add the routes.

    Args:
        app: the application.
        desk: what it speaks to.
        look: annotation of the name of an operator who may look.
        operate: likewise, of one who may start a rollout.
        known: likewise, of the operator, who may do what the role says.
    """

    def plan_of(body: RolloutRequest) -> tuple[tuple[Wave, ...], Policy]:
        active = sum(device["revoked"] is None for device in desk.fleet.devices())
        return parse_plan(body.waves, active), Policy.from_mapping(body.policy.model_dump())

    @app.post("/v1/rollouts/plan", tags=["rollouts"])
    def plan_rollout(body: RolloutRequest, operator: look) -> Preview:
        """What would happen to how many devices; nothing does."""
        waves, policy = plan_of(body)
        return desk.ticker.preview(
            body.release,
            waves,
            policy,
            other=body.other,
            unreadable=lambda record: lacking_key(desk, record),
        )

    @app.post("/v1/rollouts", status_code=201, response_model=RolloutStatus, tags=["rollouts"])
    def start_rollout(body: RolloutRequest, operator: operate) -> dict[str, Any]:
        """Start a rollout, or a comparison of two releases; or only draft it."""
        waves, policy = plan_of(body)
        begin = desk.ticker.create if body.draft else desk.ticker.start
        rollout = begin(body.release, waves, policy, who=operator, why=body.why, other=body.other)
        return _status(desk, rollout.id)

    @app.get("/v1/rollouts", response_model=list[RolloutAnswer], tags=["rollouts"])
    def list_rollouts(
        operator: look,
        state: Annotated[list[State] | None, Query()] = None,
        release: Annotated[str, Query(max_length=200)] = "",
    ) -> list[dict[str, Any]]:
        """All rollouts, newest first; or those in these states, or of this release."""
        return [
            _rollout(record)
            for record in desk.ticker.records()
            if (not state or record.rollout.state in state)
            and (not release or release in [one.release for one in record.rollout.targets])
        ]

    @app.get("/v1/rollouts/{rollout_id}", response_model=RolloutStatus, tags=["rollouts"])
    def show_rollout(
        rollout_id: str,
        operator: look,
        where: Annotated[str, Query(max_length=1000)] = "",
        troubled: bool = False,
    ) -> dict[str, Any]:
        """One rollout with what each device said.

        ``where`` and ``troubled`` choose the devices that are listed, not those that are counted.
        """
        return _status(desk, rollout_id, Filter.parse(where) if where.strip() else None, troubled)

    @app.post("/v1/rollouts/{rollout_id}/{verb}", response_model=RolloutStatus, tags=["rollouts"])
    def act_on_rollout(
        rollout_id: str, verb: Verb, body: WhyRequest, operator: known
    ) -> dict[str, Any]:
        """Start a draft, approve, pause, resume, abort or roll back."""
        right = NEEDS.get(verb, Right.OPERATE)
        if not operator.may(right):
            raise HTTPException(
                403, f"{operator.name} has the role {operator.role}, which may not {right}"
            )
        desk.ticker.act(rollout_id, verb, who=operator.name, why=body.why)
        return _status(desk, rollout_id)


def _status(
    desk: Desk, rollout_id: str, where: Filter | None = None, troubled: bool = False
) -> dict[str, Any]:
    record = desk.ticker.record(rollout_id)
    observations = desk.fleet.observations(record.rollout)
    words = {(one["device_id"], one["release"]): one for one in desk.fleet.outcomes(rollout_id)}
    phases = desk.fleet.phases(rollout_id)
    back, stuck = desk.ticker.way_back(record.rollout)
    return {
        **_rollout(record),
        "back_to": back.previous.release,
        "no_way_back": stuck,
        "trouble": desk.ticker.trouble if record.rollout.state in ACTIVE else "",
        **standing(
            record.rollout, observations, words, where=where, troubled=troubled, phases=phases
        ),
    }


def _rollout(record: RolloutRecord) -> dict[str, Any]:
    plain = record.rollout.to_mapping()
    approval = record.rollout.state is State.AWAITING_APPROVAL
    return {
        **plain,
        "needs_approval": approval,
        "created": record.created,
        "updated": record.updated,
    }
