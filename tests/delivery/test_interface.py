"""The operator's interface as a program sees it: documented answers, one shape of errors."""

from __future__ import annotations

from typing import Any

import pytest

from federation.operators import Role
from protos.messages import DeviceEvent
from tests.delivery.test_operators import Interface
from tests.delivery.test_ticker import House

SHAPE = {"$ref": "#/components/schemas/ErrorAnswer"}
CLI = {  # every verb of the command line that asks the server, and its address
    "rollout plan": ("post", "/v1/rollouts/plan"),
    "rollout start": ("post", "/v1/rollouts"),
    "rollout status": ("get", "/v1/rollouts"),
    "rollout watch": ("get", "/v1/rollouts/{rollout_id}"),
    "rollout pause, resume, approve, abort, rollback": (
        "post",
        "/v1/rollouts/{rollout_id}/{verb}",
    ),
    "fleet list, lagging": ("get", "/v1/devices"),
    "fleet show": ("get", "/v1/devices/{device_id}"),
    "fleet tag": ("post", "/v1/devices/{device_id}/tags"),
    "fleet revoke": ("post", "/v1/devices/{device_id}/revoke"),
}


@pytest.fixture(scope="module")
def interface(tmp_path_factory: pytest.TempPathFactory) -> Interface:
    house = House(tmp_path_factory.mktemp("house"))
    house.enrol("d-0", "d-1", "d-2")
    house.publish(1)
    house.publish(2)
    return Interface(house)


def test_every_answer_and_every_error_is_described(interface: Interface) -> None:
    document = interface.http.get("/openapi.json").json()
    for method, path in CLI.values():
        assert method in document["paths"][path], path
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            name = f"{method} {path}"
            assert route.get("description"), f"{name} has no words"
            good = next(answer for code, answer in route["responses"].items() if code < "300")
            content = good["content"]["application/json"]
            assert path == "/metrics" or content["schema"].keys() & {"$ref", "items"}, name
            for code, answer in route["responses"].items():
                if code >= "300":
                    assert answer["content"]["application/json"]["schema"] == SHAPE, (name, code)
    assert "HTTPValidationError" not in document["components"]["schemas"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "words"),
    [
        ("GET", "/v1/nowhere", None, 404, "not-found", "/openapi.json"),
        ("DELETE", "/v1/rollouts", None, 405, "method", "DELETE /v1/rollouts"),
        ("GET", "/v1/rollouts/r-9", None, 404, "norollout", "r-9"),
        ("POST", "/v1/rollouts", {"release": 7}, 422, "invalid", "release:"),
        ("POST", "/v1/rollouts", {"release": "x", "wave": []}, 422, "invalid", "wave:"),
        ("POST", "/v1/rollouts", None, 422, "invalid", "body"),
        ("POST", "/v1/rollouts/r-1/dance", {}, 422, "invalid", "verb:"),
        ("GET", "/v1/rollouts?state=asleep", None, 422, "invalid", "state"),
        ("GET", "/v1/repository/adapters?channel=no/such", None, 404, "notfound", "no/such"),
        ("GET", "/v1/audit/verify?head=zz", None, 422, "invalid", "head"),
        ("POST", "/v1/rollouts", {"release": "x", "waves": ["1.2.3x2"]}, 409, "rollout", "1.2.3x2"),
        ("GET", "/v1/devices?where=tag.x", None, 400, "filter", "tag.x"),
        ("GET", "/v1/devices?silent_hours=-1", None, 422, "invalid", "silent_hours"),
        (
            "POST",
            "/v1/rollouts",
            {"release": "stable-1", "policy": {"rate": {"per_minute": 0}}},
            409,
            "rollout",
            "rate.per_minute",
        ),
    ],
)
def test_every_refusal_has_the_same_shape(
    interface: Interface, method: str, path: str, body: Any, status: int, code: str, words: str
) -> None:
    answer = interface.call(Role.ADMIN, method, path, body)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    assert answer.json()["error"].keys() == {"code", "message"}
    assert answer.json()["error"]["code"] == code
    assert words in answer.json()["error"]["message"]
    unknown = interface.http.get("/v1/rollouts")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (401, "unauthorised")


def test_a_rollout_at_a_rate_is_shown_with_pace_progress_and_concerns(
    interface: Interface,
) -> None:
    house = interface.house
    policy = {
        "rate": {"per_minute": 6, "factor": 2.0, "every": 1, "counting": "succeeded"},
        "max_celsius": 85,
    }
    body = {"release": "stable-1", "waves": ["100%"], "policy": policy}
    plan = interface.ok(Role.VIEWER, "POST", "/v1/rollouts/plan", body)
    assert plan["waves"][0]["telling_seconds"] > 0
    assert plan["at_most_seconds"] == plan["at_least_seconds"] + 3600.0
    assert "6 devices a minute, times 2 for every 1 succeeded" in plan["rate"]
    one = interface.ok(Role.OPERATOR, "POST", "/v1/rollouts", body)
    assert one["pace"] == {
        "per_minute": 6,
        "rate": plan["rate"],
        "notified": 1,
        "waiting": 2,
        "seconds_left": 10.0,
    }
    assert one["policy"]["rate"]["max_per_minute"] == 1000
    assert one["progress"]["reached"] == 1
    assert [(c["kind"], c["reason"], c["devices"]) for c in one["concerns"]] == [
        ("no answer yet", "silent", 1)
    ]
    (told,) = [device["device_id"] for device in one["devices"] if device["in_wave"]]
    for event in (DeviceEvent.DOWNLOADED, DeviceEvent.STAGED):
        house.say(told, event, release="stable-1", rollout=one["id"])
    status = interface.ok(Role.VIEWER, "GET", f"/v1/rollouts/{one['id']}")
    assert [c["reason"] for c in status["concerns"]] == ["staged"], "waits, and is not silent"
    assert {d["device_id"]: d["phase"] for d in status["devices"]}[told] == "staged"
    house.obey(house.ticker.record(one["id"]).rollout)
    status = interface.ok(Role.VIEWER, "GET", f"/v1/rollouts/{one['id']}")
    assert status["pace"]["per_minute"] == 12
    assert (status["progress"]["running"], status["concerns"]) == (1, [])
    path = f"/v1/rollouts/{one['id']}"
    few = interface.ok(Role.VIEWER, "GET", path + '?where=id == "d-1"')
    assert [device["device_id"] for device in few["devices"]] == ["d-1"]
    assert few["progress"] == status["progress"], "a filter lists, it does not count"
    assert interface.ok(Role.VIEWER, "GET", path + "?troubled=true")["devices"] == []
    for query, found in (("?state=running", 1), ("?state=done", 0), ("?release=stable-2", 0)):
        assert len(interface.ok(Role.VIEWER, "GET", f"/v1/rollouts{query}")) == found


def test_devices_that_lag_are_those_not_seen_for_so_long(interface: Interface) -> None:
    house = interface.house
    house.now[0] += 3 * 3600.0
    late = interface.ok(Role.VIEWER, "GET", "/v1/devices?silent_hours=2")["devices"]
    assert [one["id"] for one in late] == ["d-0", "d-1", "d-2"]
    assert interface.ok(Role.VIEWER, "GET", "/v1/devices?silent_hours=4")["devices"] != late
