"""Roles over REST, the chain of the audit log, tags and filters, plans, comparisons, approval."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from fastapi import HTTPException
from typer.testing import CliRunner

import airpeft
from federation import operators_cli, tables
from federation.api import BodyLimit, make_app
from federation.audit import GENESIS
from federation.comparison import compare
from federation.desk import Desk
from federation.facts import TagError, changed_tags
from federation.metadata_age import Dates
from federation.metrics import Metrics
from federation.migrations.versions import r0001_fleet, r0002_rollouts
from federation.online_keys import online_signer
from federation.operators import (
    RIGHTS,
    OperatorsError,
    Right,
    Role,
    add_operator,
    operator_of,
    revoke_operator,
)
from federation.policy import Policy
from federation.rollout import Rollout, State, Verb
from federation.store import Store
from federation.ticker import Ticker
from federation.waves import RolloutError, Wave
from federation.wrap_shelf import WrapShelf
from protos.messages import DeviceEvent, Health, Quality
from tests.delivery.rig import DIGEST
from tests.delivery.test_ticker import WAVES, House

NAMES = tuple(f"d-{number}" for number in range(8))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


class Interface:
    """The interface in this process, as one operator calls it."""

    def __init__(self, house: House) -> None:
        desk = Desk(
            store=house.store,
            fleet=house.fleet,
            enrolment=None,  # type: ignore[arg-type]  # no test here enrols over it
            ticker=house.ticker,
            repository=house.repository,
            metrics=Metrics(),
            dates=Dates(house.store),
            endpoints=lambda: {},
            wake=lambda: None,
            online_key=lambda keyid: online_signer(house.home, keyid, None),
            wraps=WrapShelf(house.repository.folder),
        )
        from starlette.testclient import TestClient

        self.http = TestClient(make_app(desk))
        self.house = house
        self.tokens = {
            role: add_operator(house.store, f"the-{role}", role, who="test") for role in Role
        }

    def call(self, role: Role, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.tokens[role]}"}
        return self.http.request(method, path, json=body, headers=headers)

    def ok(self, role: Role, method: str, path: str, body: Any = None) -> Any:
        answer = self.call(role, method, path, body)
        assert answer.is_success, answer.text
        return answer.json()


@pytest.fixture
def interface(house: House) -> Interface:
    house.enrol(*NAMES)
    return Interface(house)


CALLS: list[tuple[str, str, Any, Right]] = [
    ("GET", "/v1/devices", None, Right.LOOK),
    ("GET", "/v1/devices/d-0", None, Right.LOOK),
    ("GET", "/v1/releases", None, Right.LOOK),
    ("GET", "/v1/rollouts", None, Right.LOOK),
    ("GET", "/v1/audit", None, Right.LOOK),
    ("GET", "/v1/audit/verify", None, Right.LOOK),
    ("POST", "/v1/rollouts/plan", {"release": "stable-1"}, Right.LOOK),
    ("POST", "/v1/rollouts", {"release": "stable-1"}, Right.OPERATE),
    ("POST", "/v1/rollouts/r-1/resume", {}, Right.OPERATE),
    ("POST", "/v1/rollouts/r-1/approve", {}, Right.APPROVE),
    ("POST", "/v1/rollouts/r-1/pause", {}, Right.STOP),
    ("POST", "/v1/rollouts/r-1/abort", {}, Right.STOP),
    ("POST", "/v1/rollouts/r-1/rollback", {}, Right.STOP),
    ("POST", "/v1/devices/d-0/tags", {"tags": {}}, Right.OPERATE),
    ("POST", "/v1/devices/d-7/revoke", {}, Right.OPERATE),
    ("POST", "/v1/releases", {"metadata": "", "payload": ""}, Right.OPERATE),
    ("GET", "/v1/operators", None, Right.ADMINISTER),
    ("POST", "/v1/operators", {"name": "x", "role": "viewer"}, Right.ADMINISTER),
    ("POST", "/v1/operators/x/revoke", {}, Right.ADMINISTER),
]


@pytest.mark.parametrize("role", list(Role))
def test_a_role_may_do_what_it_says_and_nothing_else(interface: Interface, role: Role) -> None:
    interface.house.publish(1)
    for method, path, body, right in CALLS:
        status = interface.call(role, method, path, body).status_code
        assert (status != 403) == (right in RIGHTS[role]), f"{role} {method} {path}: {status}"
    told = interface.ok(Role.VIEWER, "GET", "/openapi.json")["paths"]
    assert {"/v1/rollouts/plan", "/v1/devices/{device_id}/tags", "/v1/audit/verify"} <= set(told)


def test_a_body_that_does_not_come_ends_the_request_and_refusals_are_counted(house: House) -> None:
    interface = Interface(house)
    assert interface.call(Role.VIEWER, "POST", "/v1/enrolment-tokens", {}).status_code == 403
    assert interface.call(Role.ADMIN, "POST", "/v1/enrolment-tokens", {"x": 1}).status_code == 422
    said = interface.http.get("/metrics").text
    for status in (403, 422):
        assert f'airpeft_operator_requests_refused_total{{status="{status}"}} 1.0' in said

    async def never() -> dict[str, Any]:
        await asyncio.sleep(3600)
        return {}

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def nobody(message: Any) -> None:
        pytest.fail("nothing is sent")

    limit = BodyLimit(reads, seconds=0.01)
    with pytest.raises(HTTPException, match="no more of it came"):
        asyncio.run(limit({"type": "http"}, never, nobody))


def test_a_token_is_shown_once_and_dies_when_it_is_revoked(house: House) -> None:
    token = add_operator(house.store, "ben", Role.APPROVER, who="ann", why="holidays")
    for file in house.home.glob("fleet.sqlite*"):
        assert token.encode() not in file.read_bytes()
    found = operator_of(house.store, token)
    assert found is not None
    assert (found.name, found.role) == ("ben", Role.APPROVER)
    revoke_operator(house.store, "ben", who="ann", why="back again")
    assert operator_of(house.store, token) is None
    for name, message in (("ben", "is or was"), ("Ben!", "1 to 63 lower-case")):
        with pytest.raises(OperatorsError, match=message):
            add_operator(house.store, name, Role.VIEWER, who="ann")
    for name, message in (("ben", "no operator"), ("admin", "new-admin-token"), ("ann", "another")):
        with pytest.raises(OperatorsError, match=message):
            revoke_operator(house.store, name, who="ann")
    lines = [(one["who"], one["action"], one["why"]) for one in house.store.audit()]
    assert lines == [
        ("ann", "operator-revoke", "back again"),
        ("ann", "operator-add", "approver; holidays"),
    ]


def test_two_people_take_a_release_beyond_the_canary(interface: Interface) -> None:
    house = interface.house
    house.publish(1)
    body = {"release": "stable-1", "waves": ["1", "100%"], "policy": {"two_person": True}}
    rollout = interface.ok(Role.OPERATOR, "POST", "/v1/rollouts", body)
    assert rollout["started_by"] == "the-operator"
    house.obey(house.ticker.record("r-1").rollout)
    house.ticker.tick()
    status = interface.ok(Role.VIEWER, "GET", "/v1/rollouts/r-1")
    assert (status["state"], status["needs_approval"]) == ("awaiting_approval", True)
    house.start_again()  # the wait survives a restart
    house.ticker.tick()
    with pytest.raises(RolloutError, match="another operator must approve"):
        house.ticker.act("r-1", Verb.APPROVE, who="the-operator")
    approved = house.ticker.act("r-1", Verb.APPROVE, who="the-approver", why="looks good")
    assert approved.state is State.RUNNING
    house.ticker.tick()
    house.obey(approved)
    house.ticker.tick()
    assert house.ticker.record("r-1").rollout.state is State.DONE
    assert any(
        line["who"] == "the-approver" and "approved by the-approver: looks good" in line["why"]
        for line in house.store.audit()
    )


def test_a_server_can_ask_for_a_second_operator_of_everybody(interface: Interface) -> None:
    """Else a thief of a token just leaves --two-person out, or calls the fleet a canary."""
    house = interface.house
    house.enrol(*(f"d-{number}" for number in range(40, 46)))
    fleet, name = len(house.fleet.devices()), house.publish(1)
    strict = Ticker(house.store, house.fleet, house.repository, alone_share=0.25)
    two = Policy(two_person=True)
    most = f"at most {fleet // 4} of {fleet} devices"
    for ask in (strict.start, strict.create):
        with pytest.raises(RolloutError, match=rf"{most}: add --two-person"):
            ask(name, WAVES, Policy(), who="thief")
        with pytest.raises(RolloutError, match=rf"{most}, and wave 99% reaches {fleet}: begin"):
            ask(name, (Wave(percent=99), Wave(percent=100)), two, who="thief")
    with pytest.raises(RolloutError, match=most):
        strict.preview(name, WAVES, Policy())
    draft = house.ticker.create(name, WAVES, Policy(), who="thief")  # before the bound was set
    with pytest.raises(RolloutError, match=most):
        strict.act(draft.id, Verb.START, who="thief")
    assert strict.start(name, WAVES, two, who="ann").state is State.RUNNING


def test_an_admin_who_started_cannot_approve_and_another_can(interface: Interface) -> None:
    house = interface.house
    house.publish(1)
    body = {"release": "stable-1", "policy": {"two_person": True}}
    interface.ok(Role.ADMIN, "POST", "/v1/rollouts", body)
    house.obey(house.ticker.record("r-1").rollout)
    house.ticker.tick()
    refused = interface.call(Role.ADMIN, "POST", "/v1/rollouts/r-1/approve", {})
    assert refused.status_code == 409
    assert "started by the-admin: another operator" in refused.json()["error"]["message"]
    assert interface.ok(Role.APPROVER, "POST", "/v1/rollouts/r-1/approve", {})["approved_by"]


def test_tags_and_filters_over_the_interface(interface: Interface) -> None:
    for name in NAMES[:3]:
        path = f"/v1/devices/{name}/tags"
        interface.ok(Role.OPERATOR, "POST", path, {"tags": {"site": "north", "spare": "1"}})
        interface.ok(Role.OPERATOR, "POST", path, {"tags": {"spare": None}, "why": "in use"})
    with interface.house.fleet.connected(NAMES[0], 7):
        path = f"/v1/devices/{NAMES[0]}/tags"
        told = interface.ok(Role.OPERATOR, "POST", path, {"tags": {"site": "north"}})
    assert (told["connected"], told["metadata_hours"]) == (True, 0.0), "as the list shows it"
    where = {"where": 'tag.site == "north" and revoked == false'}
    found = interface.ok(Role.VIEWER, "GET", f"/v1/devices?{httpx.QueryParams(where)}")
    assert [one["id"] for one in found["devices"]] == list(NAMES[:3])
    assert found["devices"][0]["tags"] == {"site": "north"}
    bad = interface.call(Role.VIEWER, "GET", "/v1/devices?where=colour")
    assert bad.status_code == 400
    assert "unknown field 'colour'" in bad.json()["error"]["message"]
    for tags in ({"": "x"}, {"a": 'quo"te'}, {"a": "x" * 201}, {f"t{n}": "" for n in range(40)}):
        assert interface.call(
            Role.OPERATOR, "POST", "/v1/devices/d-0/tags", {"tags": tags}
        ).status_code in (400, 422)
    with pytest.raises(TagError, match="at most 32 tags"):
        changed_tags({}, {f"t{n}": "" for n in range(33)})


def test_a_plan_says_what_would_happen_and_nothing_does(interface: Interface) -> None:
    house = interface.house
    name = house.publish(1)
    for device in NAMES[:3]:
        house.fleet.tag(device, {"site": "north"}, who="test")
    waves = ['where tag.site == "north"', "2x2"]
    body = {"release": name, "waves": waves, "policy": {"quality_margin": 0.05}}
    before = house.store.audit()
    plan = interface.ok(Role.VIEWER, "POST", "/v1/rollouts/plan", body)
    assert house.ticker.records() == []
    assert house.store.audit() == before
    assert house.repository.round().sequence == 0
    assert plan["fleet"] == 8
    assert plan["waves"][0]["devices"] == list(NAMES[:3])
    assert sum(plan["waves"][0]["added"]) == 3
    assert plan["waves"][-1]["reached"] == 8
    assert plan["waves"][0]["download_bytes"] == 3 * len(b"payload")
    assert any("quality_margin 0.05 needs" in line for line in plan["warnings"])
    rollout = interface.ok(Role.OPERATOR, "POST", "/v1/rollouts", body)
    started = house.ticker.record(rollout["id"]).rollout
    inside = [device for device in NAMES if started.includes(device)]
    assert inside == list(NAMES[:3]), "a start does what the plan said"
    assert [house.told(device) == name for device in NAMES] == [True] * 3 + [False] * 5


def test_a_plan_names_devices_that_cannot_or_will_not(interface: Interface) -> None:
    house = interface.house
    name = house.publish(1)
    with house.store.write() as connection:
        other = {"base_digest": "sha256:" + "1" * 64, "runtime": "torch"}
        mine = {"base_digest": DIGEST, "runtime": "llamacpp"}
        for device, inventory in (("d-1", other), ("d-2", mine)):
            update = tables.devices.update().where(tables.devices.c.id == device)
            connection.execute(update.values(inventory=inventory))
        update = tables.devices.update().where(tables.devices.c.id == "d-3")
        connection.execute(update.values(last_seen=house.now[0] - 3 * 86400))
    house.now[0] += 1.0
    plan = interface.ok(
        Role.VIEWER, "POST", "/v1/rollouts/plan", {"release": name, "waves": ["100%"]}
    )
    assert (plan["waves"][0]["unfit"], plan["waves"][0]["silent"]) == (2, 1)
    assert [line.partition(": ")[2] for line in plan["warnings"]] == [
        "2 devices have another base model or engine",
        "1 devices have been silent for a day",
    ]


def test_a_comparison_from_start_to_verdict(interface: Interface) -> None:
    house = interface.house
    house.publish(1)
    house.publish(2)
    body = {"release": "stable-1", "other": "stable-2", "waves": ["4", "100%"]}
    interface.ok(Role.OPERATOR, "POST", "/v1/rollouts", body)
    rng = random.Random(3)  # noqa: S311

    def obey() -> None:
        for device in NAMES:
            wanted = house.told(device)
            if wanted:
                gain = 0.05 if wanted == "stable-2" else 0.0
                after = 0.8 + gain + rng.uniform(-0.01, 0.01)
                house.say(
                    device,
                    DeviceEvent.COMMITTED,
                    release=wanted,
                    rollout="r-1",
                    quality=Quality(examples=50, accuracy_before=0.8, accuracy_after=after),
                )

    sides = []
    for _ in range(2):
        sides.append({device: house.told(device) for device in NAMES})
        obey()
        house.ticker.tick()
        house.start_again()
    assert sorted(filter(None, sides[0].values())) == ["stable-1"] * 2 + ["stable-2"] * 2
    assert sorted(map(str, sides[1].values())) == ["stable-1"] * 4 + ["stable-2"] * 4
    assert all(sides[1][device] == release for device, release in sides[0].items() if release)
    rollout = house.ticker.record("r-1").rollout
    assert rollout.state is State.DONE
    arms: list[list[float]] = [[], []]
    for one in house.fleet.observations(rollout):
        assert one.quality is not None
        change = one.quality.accuracy_after - one.quality.accuracy_before
        arms[rollout.arm(one.device_id)].append(change)
    found = compare(*arms, clip=rollout.policy.clip)
    assert found.better == "", "four devices a side show nothing at this error rate"
    assert found.difference == pytest.approx(0.05, abs=0.02)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.05 < found.high
    # the fleet's release is still the one before: the winner gets a rollout of its own
    winner = house.ticker.start("stable-2", rollout.waves, rollout.policy, who="ann")
    assert winner.previous == rollout.previous
    back = house.ticker.act("r-2", Verb.ROLLBACK, who="ann")
    assert back.state is State.ROLLING_BACK


def test_the_status_of_a_comparison_shows_both_sides(interface: Interface) -> None:
    house = interface.house
    house.publish(1)
    house.publish(2)
    body = {"release": "stable-1", "other": "stable-2", "waves": ["100%"]}
    started = interface.ok(Role.OPERATOR, "POST", "/v1/rollouts", body)
    assert started["comparison"]["devices_a"] == 0
    for device in NAMES:
        wanted = house.told(device)
        gain = 0.1 if wanted == "stable-1" else 0.0
        quality = Quality(examples=9, accuracy_before=0.5, accuracy_after=0.5 + gain)
        house.say(device, DeviceEvent.COMMITTED, release=wanted, rollout="r-1", quality=quality)
    status = interface.ok(Role.VIEWER, "GET", "/v1/rollouts/r-1")
    assert status["comparison"]["difference"] == pytest.approx(-0.1)
    assert status["comparison"]["low"] < -0.1 < status["comparison"]["high"]
    assert (status["comparison"]["confidence"], status["comparison"]["clip"]) == (0.95, 0.1)
    assert [one["devices"] for one in status["evidence"]] == [4, 4]
    for words, message in (
        ({"other": "stable-1"}, "two different releases"),
        ({"other": "stable-9"}, "no release"),
    ):
        interface.call(Role.OPERATOR, "POST", "/v1/rollouts/r-1/abort", {})
        refused = interface.call(Role.OPERATOR, "POST", "/v1/rollouts", {**body, **words})
        assert message in refused.json()["error"]["message"]


def test_health_before_and_after_and_attempts_are_kept(house: House) -> None:
    house.enrol("d-a")
    house.publish(1)
    rollout = house.ticker.start("stable-1", _all(), _policy(), who="ann")
    lean = Health(
        memory_available_bytes=9, process_memory_bytes=10**8, disk_free_bytes=9, load_1min=0.1
    )
    fat = Health(
        memory_available_bytes=9, process_memory_bytes=10**9, disk_free_bytes=9, load_1min=0.1
    )
    house.say("d-a", DeviceEvent.HEALTH, health=lean)
    for attempts in (1, 2):
        house.say("d-a", DeviceEvent.FAILED, release="stable-1", rollout="r-1")
        (one,) = house.fleet.observations(rollout)
        assert one.attempts == attempts
        house.ticker.tick()
        assert house.ticker.record("r-1").rollout.state is State.RUNNING, "it may try again"
    house.say("d-a", DeviceEvent.COMMITTED, release="stable-1", rollout="r-1", health=lean)
    house.say("d-a", DeviceEvent.HEALTH, health=fat)
    (one,) = house.fleet.observations(rollout)
    assert (one.health_before, one.health_after) == (lean, fat)
    house.ticker.tick()
    assert "1 devices are worse off (memory), 0 allowed" in house.ticker.record("r-1").rollout.why


def _all() -> tuple[Any, ...]:
    from federation.waves import Wave

    return (Wave(percent=100),)


def _policy() -> Any:
    from federation.policy import Policy

    return Policy(max_unhealthy=0, bake_seconds=60.0)


@pytest.mark.parametrize(
    ("tamper", "broken_at"),
    [
        ("UPDATE audit SET why = 'nothing' WHERE number = 3", 3),
        ("UPDATE audit SET who = 'ann', at = 1.0 WHERE number = 1", 1),
        ("DELETE FROM audit WHERE number = 4", 5),
        ("DELETE FROM audit WHERE number = 1", 2),
    ],
)
def test_a_changed_log_is_found(house: House, tamper: str, broken_at: int) -> None:
    house.enrol(*NAMES[:3])
    whole = house.store.verify_audit()
    assert (whole.sound, whole.lines) == (True, 6)
    with house.store.write() as connection:
        for verb in ("update", "delete"):
            connection.exec_driver_sql(f"DROP TRIGGER audit_no_{verb}")
        connection.exec_driver_sql(tamper)
    found = house.store.verify_audit()
    assert (found.sound, found.broken_at) == (False, broken_at)


def test_a_log_whose_end_was_cut_off_is_found_by_a_head_that_was_noted(house: House) -> None:
    house.enrol(*NAMES[:3])
    head = house.store.verify_audit().head
    house.enrol("d-9")
    assert house.store.verify_audit(head).sound, "a log that has grown still has it"
    with house.store.write() as connection:
        connection.exec_driver_sql("DROP TRIGGER audit_no_delete")
        connection.exec_driver_sql("DELETE FROM audit WHERE number >= 5")
    cut = house.store.verify_audit(head)
    assert (cut.sound, cut.broken_at, cut.lines) == (False, None, 4)
    assert house.store.verify_audit(GENESIS).sound


def test_an_older_database_gets_its_chain_and_its_roles(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'fleet.sqlite'}")
    with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
        r0001_fleet.upgrade()
        for number in (1, 2, 3):
            connection.exec_driver_sql(
                "INSERT INTO audit (at, who, action, subject, why) VALUES (?, ?, ?, ?, ?)",
                (number + 0.5, "ann", "test", "x", f"line {number}"),
            )
        connection.exec_driver_sql(
            "INSERT INTO operators (name, digest, created) VALUES ('admin', 'x', 1.0)"
        )
        old = "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"
        connection.exec_driver_sql(old)
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('0001')")
    engine.dispose()
    assert r0002_rollouts.down_revision == r0001_fleet.revision
    store = Store.open(tmp_path / "fleet.sqlite")
    assert (store.verify_audit().sound, store.verify_audit().lines) == (True, 3)
    with store.write() as connection:
        store.log(connection, "ann", "test", "x", "line 4")
    assert store.verify_audit().lines == 4
    with store.read() as connection:
        assert connection.execute(sa.select(tables.operators.c.role)).scalar() == "admin"
    with pytest.raises(sa.exc.IntegrityError, match="only grows"), store.write() as connection:
        connection.execute(tables.audit.update().values(why="nothing"))
    store.close()


def test_a_rollout_of_an_older_version_is_still_read() -> None:
    old = {
        "id": "r-1",
        "release": {"release": "s-1", "path": "adapters/s/1.airpeft", "sha256": "11" * 32},
        "previous": {"release": "", "path": "", "sha256": ""},
        "waves": ["1", "100%"],
        "policy": {"max_failures": 2, "quality_tolerance": 0.05},
        "salt": "r-1-0",
        "state": "running",
        "wave": 0,
        "basis_points": 700,
        "wave_began": 5.0,
        "settled_at": None,
        "why": "spring",
    }
    found = Rollout.from_mapping(json.loads(json.dumps(old)))
    assert (found.policy.max_failures, found.other, found.members) == (2, None, ())
    assert Rollout.from_mapping(json.loads(json.dumps(found.to_mapping()))) == found


@pytest.mark.parametrize("name", ["operators", "audit"])
def test_the_commands_have_help_with_examples_and_exit_codes(name: str) -> None:
    result = CliRunner().invoke(getattr(operators_cli, name), ["--help"])
    assert "Example: airpeft" in result.stdout
    assert name in airpeft.COMMANDS
