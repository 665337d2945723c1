"""The sequential test of quality: its error rate, its power, and what liars can do to either."""

from __future__ import annotations

import random
import statistics

import pytest

from federation.evidence import blind_band, fall_shown, no_fall_shown
from federation.judging import quality_fall, reason_to_halt, reason_to_hold
from federation.orders import Observation
from federation.policy import Policy
from protos.messages import DeviceEvent, Quality, RejectReason

CLIP, TOLERANCE, ALPHA = 0.1, 0.02, 0.05
EXAMPLES = 40  # held-out examples on each device


def chance(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311


def measured(rng: random.Random, fall: float) -> float:
    """The fall that one honest device measures, on examples of its own."""
    before = sum(rng.random() < 0.8 for _ in range(EXAMPLES))
    after = sum(rng.random() < 0.8 - fall for _ in range(EXAMPLES))
    return (before - after) / EXAMPLES


def ever_shown(falls: list[float], liars: int) -> int:
    """After how many reports the claim is made, looking after each of them; 0 for never."""
    for count in range(1, len(falls) + 1):
        if fall_shown(falls[:count], above=TOLERANCE, clip=CLIP, liars=liars, alpha=ALPHA).shown:
            return count
    return 0


@pytest.mark.parametrize("fall", [0.0, 0.02])
def test_a_good_release_is_halted_less_often_than_the_stated_rate(fall: float) -> None:
    """At the very edge of the tolerance, looking after each report: the worst there is."""
    rng = chance(5)
    wrong = 0
    for _ in range(200):
        # Clipping is part of the claim: what is tested is the mean of the clipped falls.
        falls = [max(-CLIP, min(CLIP, measured(rng, fall))) for _ in range(80)]
        wrong += bool(ever_shown(falls, liars=0))
    assert wrong / 200 <= ALPHA


def test_a_bad_release_is_found_and_how_soon() -> None:
    rng = chance(6)
    needed = [ever_shown([measured(rng, 0.15) for _ in range(80)], liars=0) for _ in range(30)]
    assert all(needed), "a fall of 15 points went unseen on 80 devices"
    assert statistics.median(needed) <= 30


def lies(honest: list[float], share: float, lie: float) -> list[float]:
    """The same number of reports, of which a share of liars speaks first, and all alike."""
    liars = int(share * len(honest))
    return [lie] * liars + honest[liars:]


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_liars_cannot_halt_a_good_release(share: float) -> None:
    """They rush to be the first to report, and all of them report a total loss."""
    rng, wrong = chance(7), 0
    for _ in range(100):
        reports = lies([measured(rng, 0.0) for _ in range(100)], share, lie=1.0)
        wrong += bool(ever_shown(reports, liars=int(share * 100)))
    assert wrong / 100 <= ALPHA


def test_without_the_trimming_they_could() -> None:
    rng = chance(8)
    reports = lies([measured(rng, 0.0) for _ in range(100)], 0.2, lie=1.0)
    assert ever_shown(reports, liars=0)


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_liars_cannot_hide_a_release_that_is_worse_beyond_the_band(share: float) -> None:
    rng = chance(9)
    count = 600
    fall = TOLERANCE + blind_band(CLIP, share) + 0.03
    for _ in range(10):
        honest = [rng.choice((fall - 0.01, fall + 0.01)) for _ in range(count)]
        reports = lies(honest, share, lie=-1.0)
        found = fall_shown(
            reports, above=TOLERANCE, clip=CLIP, liars=int(share * count), alpha=ALPHA
        )
        assert found.shown, found


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_liars_cannot_prove_a_bad_release_harmless(share: float) -> None:
    rng, wrong = chance(10), 0
    for _ in range(100):
        honest = [rng.choice((0.0, 0.1)) for _ in range(200)]  # a mean fall of 0.05, the margin
        reports = lies(honest, share, lie=-1.0)
        found = no_fall_shown(reports, below=0.05, clip=CLIP, liars=int(share * 200), alpha=ALPHA)
        wrong += found.shown
    assert wrong / 100 <= ALPHA


def test_a_harmless_release_is_shown_harmless_though_some_lie() -> None:
    reports = lies([0.0] * 100, 0.05, lie=1.0)
    assert no_fall_shown(reports, below=0.05, clip=CLIP, liars=5, alpha=ALPHA).shown


def test_the_order_of_the_reports_does_not_matter() -> None:
    rng = chance(12)
    falls = [rng.uniform(-0.2, 0.2) for _ in range(50)]
    first = fall_shown(falls, above=TOLERANCE, clip=CLIP, liars=3, alpha=ALPHA)
    rng.shuffle(falls)
    assert fall_shown(falls, above=TOLERANCE, clip=CLIP, liars=3, alpha=ALPHA) == first


def test_nothing_is_shown_by_nothing_nor_by_liars_alone() -> None:
    for falls in ([], [1.0] * 5):
        found = fall_shown(falls, above=TOLERANCE, clip=CLIP, liars=5, alpha=ALPHA)
        assert (found.shown, found.devices) == (False, 0)


def fleet(falls: list[float], failed: int = 0) -> list[Observation]:
    committed = [
        Observation(
            device_id=f"d-{number}",
            outcome=DeviceEvent.COMMITTED,
            quality=Quality(examples=40, accuracy_before=0.5, accuracy_after=0.5 - fall),
        )
        for number, fall in enumerate(falls)
    ]
    liars = [
        Observation(
            device_id=f"l-{number}",
            outcome=DeviceEvent.REVERTED,
            reason=RejectReason.QUALITY_REGRESSED,
        )
        for number in range(failed)
    ]
    return committed + liars


def test_a_share_of_liars_that_fail_on_purpose_is_allowed_for_by_the_share_of_failures() -> None:
    policy = Policy(liar_share=0.1, max_failure_share=0.1)
    assert reason_to_halt(policy, [fleet([0.0] * 90, failed=10)], [100]) == ""
    more = reason_to_halt(policy, [fleet([0.0] * 89, failed=11)], [100])
    assert more == "11 devices failed (quality-regressed), 10 allowed"


def test_the_number_of_liars_follows_the_devices_reached_and_not_those_that_spoke() -> None:
    policy = Policy(liar_share=0.1)
    early = fleet([0.5] * 10)  # of 100 reached: they may all be liars
    assert not quality_fall(policy, early, 100).shown
    assert quality_fall(Policy(liar_share=0.0), early, 100).shown


def test_each_arm_of_a_comparison_is_judged_alone() -> None:
    policy = Policy(liar_share=0.0)
    good, bad = fleet([0.0] * 40), fleet([0.4] * 40)
    assert reason_to_halt(policy, [good, good], [40, 40]) == ""
    assert "falls by" in reason_to_halt(policy, [good, bad], [40, 40])
    assert reason_to_hold(policy, [good, []]) == ""
    assert reason_to_hold(policy, [[], []]).startswith("no device is reached")
