"""How far one operator reaches alone, whatever whoever starts a rollout has asked for.

``--two-person`` is the wish of the one who starts a rollout; a thief of a token leaves it out, or
calls nine tenths of the fleet a canary. So the one who runs the server may set a share of the
fleet, at least one device: beyond it every rollout needs a second operator. A roll-back needs none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from federation.orders import Observation
from federation.rollout import widen
from federation.rollout_nouns import Rollout
from federation.waves import RolloutError, choose_salt


def check_alone(rollout: Rollout, observations: Sequence[Observation], share: float) -> None:
    """Refuse a draft by which one operator would reach more devices than that.

    Args:
        rollout: not started.
        observations: one for each active device.
        share: of the fleet, 0 to 1.

    Raises:
        RolloutError: no second operator is asked for, or the first wave is too large.
    """
    fleet = len(observations)
    allowed = max(1, math.floor(share * fleet))
    rule = (
        f"rollout {rollout.id}: on this server one operator alone reaches at most"
        f" {allowed} of {fleet} devices"
    )
    if not rollout.policy.two_person:
        raise RolloutError(f"{rule}: add --two-person, so that another one approves the rest")
    names = [one.device_id for one in observations]
    at = rollout.halves[0] if rollout.other is not None else None
    salt = choose_salt(rollout.id, rollout.waves, names, balanced_at=at)
    first = widen(replace(rollout, salt=salt), observations)
    reached = sum(first.includes(name) for name in names)
    if reached > allowed:
        raise RolloutError(
            f"{rule}, and wave {rollout.waves[0]} reaches {reached}: begin with a smaller one"
        )
