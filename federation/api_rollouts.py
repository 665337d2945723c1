"""REST for rollouts: plan, start, look, and the operator's verbs."""

# No "from __future__ import annotations" here: FastAPI reads the annotations of functions that
# live inside another function.

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, HTTPException

from federation.api_bodies import RolloutRequest, WhyRequest
from federation.comparison import compare
from federation.desk import Desk
from federation.judging import falls, quality_fall
from federation.operators import Right
from federation.orders import Observation
from federation.policy import Policy
from federation.rollout import Rollout, State, Verb
from federation.rollout_book import RolloutRecord
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

    @app.post("/v1/rollouts/plan")
    def plan(body: RolloutRequest, operator: look) -> dict[str, Any]:
        """What would happen to how many devices; nothing does."""
        waves, policy = plan_of(body)
        return asdict(desk.ticker.preview(body.release, waves, policy, other=body.other))

    @app.post("/v1/rollouts", status_code=201)
    def start(body: RolloutRequest, operator: operate) -> dict[str, Any]:
        waves, policy = plan_of(body)
        begin = desk.ticker.create if body.draft else desk.ticker.start
        rollout = begin(body.release, waves, policy, who=operator, why=body.why, other=body.other)
        return status(rollout.id, operator)

    @app.get("/v1/rollouts")
    def rollouts(operator: look) -> list[dict[str, Any]]:
        return [_rollout(record) for record in desk.ticker.records()]

    @app.get("/v1/rollouts/{rollout_id}")
    def status(rollout_id: str, operator: look) -> dict[str, Any]:
        record = desk.ticker.record(rollout_id)
        return {**_rollout(record), **_standing(desk, record.rollout)}

    @app.post("/v1/rollouts/{rollout_id}/{verb}")
    def act(rollout_id: str, verb: Verb, body: WhyRequest, operator: known) -> dict[str, Any]:
        right = NEEDS.get(verb, Right.OPERATE)
        if not operator.may(right):
            raise HTTPException(
                403, f"{operator.name} has the role {operator.role}, which may not {right}"
            )
        desk.ticker.act(rollout_id, verb, who=operator.name, why=body.why)
        return status(rollout_id, operator.name)


def _standing(desk: Desk, rollout: Rollout) -> dict[str, Any]:
    """Each device, the evidence about quality, and the comparison where there is one."""
    observations = desk.fleet.observations(rollout)
    words = {(one["device_id"], one["release"]): one for one in desk.fleet.outcomes(rollout.id)}
    started = rollout.wave >= 0
    arms: list[list[Observation]] = [[] for _ in rollout.targets]
    rows = []
    for one in observations:
        side = rollout.arm(one.device_id)
        arms[side].append(one)
        release = rollout.targets[side].release
        word = words.get((one.device_id, release), {})
        rows.append(
            {
                "device_id": one.device_id,
                "in_wave": started and rollout.includes(one.device_id),
                "release": release,
                "running": one.running,
                "outcome": one.outcome,
                "reason": one.reason,
                "attempts": one.attempts if one.failed else 0,
                "quality": asdict(one.quality) if one.quality else None,
                "detail": word.get("detail", ""),
                "payload_bytes": word.get("payload_bytes", 0),
            }
        )
    evidence = []
    for target, arm in zip(rollout.targets, arms, strict=True):
        reached = sum(started and rollout.includes(one.device_id) for one in arm)
        found = quality_fall(rollout.policy, arm, reached, arms=len(arms))
        shown = {"release": target.release, "shown": found.shown, "reached": reached}
        evidence.append({**shown, **asdict(found)})
    return {
        "devices": rows,
        "evidence": evidence,
        "comparison": _comparison(rollout.policy, arms) if rollout.other is not None else None,
    }


def _comparison(policy: Policy, arms: list[list[Observation]]) -> dict[str, Any]:
    a, b = ([-fall for fall in falls(arm)] for arm in arms)
    return asdict(compare(a, b, clip=policy.clip, alpha=policy.quality_alpha))


def _rollout(record: RolloutRecord) -> dict[str, Any]:
    plain = record.rollout.to_mapping()
    approval = record.rollout.state is State.AWAITING_APPROVAL
    return {
        **plain,
        "needs_approval": approval,
        "created": record.created,
        "updated": record.updated,
    }
