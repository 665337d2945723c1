"""The way back: from an aborted rollout, past what devices refuse, and where there is none."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from federation import release
from federation.keys import KeyFolder
from federation.operators import Role
from federation.orders import BASE
from federation.policy import OnSuccess, Policy
from federation.published import PublishError
from federation.rollout import Rollout, State, Verb
from federation.rollout_shown import effect
from federation.waves import RolloutError, Wave
from protos.messages import DeviceEvent
from tests.delivery.test_operators import Interface
from tests.delivery.test_ticker import FOUR, WAVES, House, count, roll_out, run_to_end


@pytest.fixture
def house(tmp_path: Path) -> House:
    made = House(tmp_path)
    made.enrol(*FOUR)
    return made


def revoke(house: House, name: str, *, also_older: bool = False) -> None:
    """The adapter keys say that a release is bad."""
    out, now = house.home / f"revoke-{name}", datetime.now(UTC)
    release.make_revocation(
        out,
        adapters=house.repository.adapters(),
        release=name,
        why="answers with names",
        also_older=also_older,
        now=now,
    )
    for signer in KeyFolder(house.home / "offline-keys").signers("adapters-")[:2]:
        release.sign(out, signer)
    house.repository.publish_standing(release.assemble_revocation(out), now=now)


def state_of(house: House, rollout: Rollout) -> State:
    return house.ticker.record(rollout.id).rollout.state


def fail_canary(house: House, rollout: Rollout) -> None:
    canary = next(name for name in FOUR if house.told(name) == rollout.release.release)
    bad = rollout.release.release
    house.say(canary, DeviceEvent.REVERTED, release=bad, rollout=rollout.id)
    house.ticker.tick()


def test_what_was_aborted_in_the_middle_can_still_be_taken_back(house: House) -> None:
    assert run_to_end(house, roll_out(house, house.publish(1))) is State.DONE
    rollout = roll_out(house, house.publish(2), on_success=OnSuccess.PAUSE)
    house.obey(rollout)
    house.ticker.tick()
    house.ticker.act(rollout.id, Verb.ABORT, who="ann")
    assert [house.told(name) for name in FOUR] == [None] * 4
    told = house.ticker.preview(house.publish(3), WAVES, Policy()).warnings
    assert not any("no way back" in words for words in told)
    assert any("take stable-1 at the start; 1 of them" in words for words in told)
    house.ticker.act(rollout.id, Verb.ROLLBACK, who="ann", why="after all")
    assert count(house, "stable-1") == 4
    house.obey(rollout)
    house.ticker.tick()
    assert state_of(house, rollout) is State.ROLLED_BACK
    assert any("back to stable-1" in line["why"] for line in house.store.audit())


def test_what_never_began_cannot_be_taken_back(house: House) -> None:
    draft = house.ticker.create(house.publish(1), WAVES, Policy(), who="ann")
    house.ticker.act(draft.id, Verb.ABORT, who="ann")
    with pytest.raises(RolloutError, match="it is aborted, and it never began"):
        house.ticker.act(draft.id, Verb.ROLLBACK, who="ann")


def test_a_release_that_was_revoked_is_no_way_back(house: House) -> None:
    for counter in (1, 2):
        assert run_to_end(house, roll_out(house, house.publish(counter))) is State.DONE
    third = house.publish(3)
    revoke(house, "stable-2")
    again = house.ticker.create("stable-1", WAVES, Policy(), who="ann")
    assert again.previous == BASE, "those that left stable-2 may lack it"
    rollout = roll_out(house, third)
    assert rollout.previous.release == "stable-1"
    assert count(house, "stable-1") == 3, "told to take what they refuse"
    fail_canary(house, rollout)
    assert count(house, "stable-1") == 4


def test_revoked_after_the_start_it_is_no_way_back_either(house: House) -> None:
    for counter in (1, 2):
        assert run_to_end(house, roll_out(house, house.publish(counter))) is State.DONE
    rollout = roll_out(house, house.publish(3))
    assert rollout.previous.release == "stable-2"
    revoke(house, "stable-2")
    house.ticker.act(rollout.id, Verb.ROLLBACK, who="ann")
    assert count(house, "stable-1") == 4


def test_below_the_floor_nobody_is_sent_back_and_it_is_said(house: House) -> None:
    assert run_to_end(house, roll_out(house, house.publish(1))) is State.DONE
    rollout = roll_out(house, house.publish(2))
    third = house.publish(3)
    revoke(house, "stable-1", also_older=True)
    told = house.ticker.preview(third, WAVES, Policy()).warnings
    assert any(words.startswith("there is no way back from it: stable-1") for words in told)
    with pytest.raises(RolloutError, match=r"stable-1 is revoked .* newer release; until"):
        house.ticker.act(rollout.id, Verb.ROLLBACK, who="ann")
    shown = Interface(house).ok(Role.VIEWER, "GET", f"/v1/rollouts/{rollout.id}")
    assert "stable-1 is revoked" in shown["no_way_back"]
    assert effect(Verb.ROLLBACK, shown, allowed=False).startswith("cannot rollback r-2: stable-1")
    fail_canary(house, rollout)
    ended = house.ticker.record(rollout.id).rollout
    assert ended.state is State.ABORTED, "it must not be said to be rolled back"
    assert "no way back: stable-1 is revoked" in ended.why
    assert [house.told(name) for name in FOUR] == [None] * 4, "devices stay as they are"
    assert run_to_end(house, roll_out(house, third)) is State.DONE


def test_a_draft_begins_with_what_is_so_by_then(house: House) -> None:
    one, two = house.publish(1), house.publish(2)
    draft = house.ticker.create(one, (Wave(percent=100),), Policy(), who="ann")
    assert run_to_end(house, roll_out(house, two)) is State.DONE
    began = house.ticker.act(draft.id, Verb.START, who="ann")
    assert began.previous.release == "stable-2"
    house.obey(began)
    house.ticker.tick()
    assert house.ticker.records()[0].rollout.id == draft.id, "the one that began last is the newest"
    with pytest.raises(RolloutError, match="the fleet already has stable-1"):
        roll_out(house, one)
    house.ticker.act(draft.id, Verb.ROLLBACK, who="ann")
    assert count(house, "stable-2") == 4
    with pytest.raises(
        RolloutError, match=r"is rolling_back: wait for it, or stop it with: .* abort"
    ):
        roll_out(house, house.publish(3))
    house.ticker.act(draft.id, Verb.ABORT, who="ann", why="one is away for weeks")
    assert state_of(house, draft) is State.ROLLED_BACK
    assert count(house, "stable-2") == 4, "the round stays in force for those that are away"
    late = house.ticker.create("stable-3", WAVES, Policy(), who="ann")
    revoke(house, "stable-3")
    with pytest.raises(PublishError, match="stable-3 is revoked"):
        house.ticker.act(late.id, Verb.START, who="ann")
