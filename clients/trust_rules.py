"""From believed metadata to a verdict; pure rules, without files and without a clock.

A round is an order by the online key alone. It is followed only as far as the adapter keys have
signed the very same thing: a stolen online key can choose among signed releases above the floor,
and no more (the property of Uptane's two repositories, in one).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from datetime import datetime

from clients.trust_source import Refused
from clients.trust_state import MAX_CHANGES, TrustState
from clients.trust_verdict import (
    Believed,
    DeviceFacts,
    Install,
    Rejected,
    SignedRelease,
    Stay,
    Verdict,
    Withdraw,
)
from protos.messages import RejectReason
from protos.signed import (
    CURRENT_ROUND,
    ROUNDS_ROLE,
    STANDING,
    Assignment,
    ReleaseStatement,
    RoundDocument,
    Standing,
    StatementError,
    target_name,
)


def read_round(believed: Believed, state: TrustState) -> tuple[RoundDocument, TrustState]:
    """The round in force, and the state that knows it.

    Raises:
        Refused: malformed, older than the last one, or another one under the same sequence.
    """
    rounds = believed.delegated.get(ROUNDS_ROLE)
    target = rounds.targets.get(CURRENT_ROUND) if rounds is not None else None
    if target is None or believed.role_of(CURRENT_ROUND) != ROUNDS_ROLE:
        raise Refused(RejectReason.METADATA_MALFORMED, f"no {CURRENT_ROUND} by the rounds role")
    try:
        document = RoundDocument.from_custom(target.custom)
    except StatementError as error:
        raise Refused(RejectReason.METADATA_MALFORMED, str(error)) from None
    digest = hashlib.sha256(json.dumps(target.custom, sort_keys=True).encode()).hexdigest()
    if document.sequence < state.sequence:
        raise Refused(
            RejectReason.METADATA_ROLLBACK,
            f"round {document.sequence} is older than round {state.sequence}, seen before",
        )
    if document.sequence == state.sequence and state.round_digest not in ("", digest):
        raise Refused(
            RejectReason.METADATA_ROLLBACK,
            f"round {document.sequence} says something else than when it was seen before",
        )
    return document, state.seen_round(document.sequence, digest)


def read_standing(believed: Believed, state: TrustState) -> TrustState:
    """The state that knows what the adapter keys say of releases: floors and revocations.

    A role's word counts for the channels that it may sign, and for no other.

    Raises:
        Refused: what a role says is malformed.
    """
    floors: dict[str, int] = {}
    revoked: dict[str, str] = {}
    for role, content in believed.delegated.items():
        if role == ROUNDS_ROLE:
            continue
        for channel, floor in _floors(believed, role).items():
            floors[channel] = max(floors.get(channel, 0), floor)
        try:
            said = Standing.from_field(content.unrecognized_fields.get(STANDING))
        except StatementError as error:
            raise Refused(RejectReason.METADATA_MALFORMED, f"{role}: {error}") from None
        for channel, floor in said.floors.items():
            if believed.speaker(target_name(channel, 1)) == role:
                floors[channel] = max(floors.get(channel, 0), floor)
        for one in said.revoked:
            if believed.speaker(one.target) == role:
                revoked[one.sha256] = f"{one.release}: {one.why}"
    return state.seen_floors(floors).seen_revoked(revoked)


def _floors(believed: Believed, role: str) -> dict[str, int]:
    """The highest floor of each channel among a role's releases.

    A statement is read as a whole only where its floor would count: there may be many of them.
    """
    claims = []
    for path, target in believed.delegated[role].targets.items():
        floor = target.custom.get("floor") if isinstance(target.custom, dict) else None
        if type(floor) is int and floor > 0:
            claims.append((floor, path, target))
    floors: dict[str, int] = {}
    for floor, path, target in sorted(claims, key=lambda claim: -claim[0]):
        if floors.get(path.split("/")[1] if "/" in path else "", 0) >= floor:
            continue
        # A release of a later schema binds those who understand it.
        with contextlib.suppress(StatementError):
            statement = ReleaseStatement.from_custom(target.custom)
            if believed.role_of(path) == role:
                floors[statement.channel] = max(floors.get(statement.channel, 0), statement.floor)
    return floors


def decide(
    believed: Believed, document: RoundDocument, state: TrustState, device: DeviceFacts
) -> Verdict:
    """What a believed round means for this device.

    Raises:
        Rejected: the roles disagree, or the release is not for this device.
    """
    assignment = document.assignment_of(device.device_id)
    if assignment is None:
        return Stay(f"round {document.sequence} does not reach this device")
    try:
        if assignment.is_base:
            return _withdraw(document, state)
        release = _agreed(believed, assignment, document)
        _check_fit(release, state, device)
    except Refused as error:
        raise _about(error, assignment, document) from None
    return Install(release)


def limit_changes(
    verdict: Verdict, state: TrustState, moment: datetime
) -> tuple[Verdict, TrustState]:
    """The verdict, unless a device has been sent to and fro too often within a day.

    Args:
        verdict: what the round asks for.
        state: the marks.
        moment: the time as the device believes it.
    """
    if isinstance(verdict, Stay):
        return verdict, state
    sha256 = verdict.release.sha256 if isinstance(verdict, Install) else ""
    now = int(moment.timestamp())
    if not state.may_follow(sha256, now):
        return Stay(f"{MAX_CHANGES} changes within a day are enough; this one waits"), state
    return verdict, state.followed(sha256, now)


def _withdraw(document: RoundDocument, state: TrustState) -> Withdraw:
    if state.floors:
        raise Refused(
            RejectReason.DOWNGRADE,
            f"the base model alone lies below the signed floors {dict(state.floors)}",
        )
    return Withdraw(document.rollout, document.sequence, document.reason)


def _agreed(believed: Believed, assignment: Assignment, document: RoundDocument) -> SignedRelease:
    """The release that the round names, as the adapter keys signed it."""
    role = believed.role_of(assignment.target)
    target = believed.delegated[role].targets[assignment.target] if role else None
    if target is None or role == ROUNDS_ROLE:
        raise Refused(
            RejectReason.ROLES_DISAGREE,
            f"the round orders {assignment.target}, which the adapter keys have not signed",
        )
    if target.hashes.get("sha256") != assignment.sha256:
        raise Refused(
            RejectReason.ROLES_DISAGREE,
            f"the round and the adapter keys name different bytes for {assignment.target}",
        )
    try:
        statement = ReleaseStatement.from_custom(target.custom)
    except StatementError as error:
        raise Refused(RejectReason.METADATA_MALFORMED, str(error)) from None
    if statement.target != assignment.target:
        raise Refused(
            RejectReason.METADATA_MALFORMED,
            f"{assignment.target} carries the statement of {statement.target}",
        )
    return SignedRelease(
        statement=statement,
        sha256=assignment.sha256,
        length=target.length,
        rollout=document.rollout,
        sequence=document.sequence,
        window=document.window,
        bake_seconds=document.bake_seconds,
    )


def _check_fit(release: SignedRelease, state: TrustState, device: DeviceFacts) -> None:
    """Whether this release is for this device."""
    statement = release.statement
    if statement.base_digest != device.base_digest:
        raise Refused(
            RejectReason.WRONG_BASE,
            f"made for base {statement.base_digest[:19]}…, here is {device.base_digest[:19]}…",
        )
    if device.runtime not in statement.runtime:
        raise Refused(
            RejectReason.UNSUPPORTED_RUNTIME,
            f"needs one of {', '.join(statement.runtime)}; here is {device.runtime}",
        )
    lacking = statement.hardware.lacking(device.machine, device.memory_mib)
    if lacking:
        raise Refused(RejectReason.UNSUPPORTED_RUNTIME, lacking)
    floor = state.floors.get(statement.channel, 0)
    if statement.counter < floor:
        raise Refused(
            RejectReason.DOWNGRADE,
            f"counter {statement.counter} is below the signed floor {floor} of {statement.channel}",
        )
    if release.sha256 in state.revoked:
        raise Refused(
            RejectReason.KNOWN_BAD, f"the adapter keys have revoked {state.revoked[release.sha256]}"
        )
    if release.sha256 in state.bad:
        raise Refused(RejectReason.KNOWN_BAD, "this device has tried it before and reverted")


def _about(error: Refused, assignment: Assignment, document: RoundDocument) -> Rejected:
    """The refusal, with the names of what it is about."""
    name = assignment.target.removeprefix("adapters/").removesuffix(".airpeft").replace("/", "-")
    return Rejected(error.reason, error.detail, name, document.rollout, document.sequence)
