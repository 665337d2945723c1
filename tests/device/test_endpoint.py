from __future__ import annotations

import itertools
import threading

import httpx
import pytest

from clients.endpoint import MAX_BODY, DeviceMetrics, Endpoint, EndpointError
from tests.device.tiny import LABELS, TEXTS, make_adapter
from tests.waiting import until


@pytest.fixture
def endpoint(runtime):
    running = Endpoint(runtime, status=lambda: {"online": False}, metrics=DeviceMetrics())
    running.start()
    yield running
    running.stop()


@pytest.fixture
def http(endpoint):
    with httpx.Client(base_url=f"http://127.0.0.1:{endpoint.port}", timeout=120) as client:
        yield client


def test_classifies_with_the_version_that_is_current(base, runtime, http):
    first = http.post("/v1/classify", json={"texts": list(TEXTS)}).json()
    assert (first["release"], first["adapter"]) == ("base", "")
    assert first["predictions"][0]["scores"] == {"negative": 0.5, "positive": 0.5}
    version = runtime.load(make_adapter(base, 1), name="stable-1")
    runtime.publish(version)
    second = http.post("/v1/classify", json={"texts": list(TEXTS)}).json()
    assert (second["release"], second["adapter"]) == ("stable-1", version.digest)
    assert len(second["predictions"]) == len(TEXTS)
    assert {p["label"] for p in second["predictions"]} <= set(LABELS)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[", "not JSON"),
        (b"[]", "list of 1 to"),
        (b'{"texts": []}', "list of 1 to"),
        (b'{"texts": ["ok", 3]}', r'"texts"[1]'),
        (b'{"texts": [" "]}', r'"texts"[0]'),
        (b"{" + b" " * MAX_BODY + b"}", "larger than"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_requests_say_what_is_wrong(http, body, words):
    answer = http.post("/v1/classify", content=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["detail"]


def test_status_metrics_health_and_foreign_names(http, runtime):
    http.post("/v1/classify", json={"texts": ["good"]})
    status = http.get("/v1/status").json()
    assert status["online"] is False
    assert status["base"] == runtime.base_digest
    assert http.get("/health").status_code == 200
    assert 'airpeft_device_requests_total{status="200"}' in http.get("/metrics").text
    assert http.get("/v1/status", headers={"host": "evil.example"}).status_code == 400


def test_no_request_fails_during_swaps(base, runtime, http, endpoint):
    versions = [runtime.load(make_adapter(base, seed), name=f"v-{seed}") for seed in (1, 2)]
    expected = {}
    for version in versions:
        runtime.publish(version)
        expected[version.digest] = http.post("/v1/classify", json={"texts": list(TEXTS)}).json()
    stop, problems, seen = threading.Event(), [], list[str]()

    def ask():
        with httpx.Client(base_url=f"http://127.0.0.1:{endpoint.port}", timeout=120) as client:
            while not stop.is_set():
                answer = client.post("/v1/classify", json={"texts": list(TEXTS)})
                if answer.status_code != 200 or answer.json() != expected[answer.json()["adapter"]]:
                    problems.append(answer.text)
                seen.append(answer.json()["adapter"])

    thread = threading.Thread(target=ask)
    thread.start()
    turns = itertools.cycle(versions)

    def swapped() -> bool:
        runtime.publish(next(turns))
        return len(seen) >= 40 and len(set(seen)) == 2

    try:
        until(swapped, every=0.002, what="forty answers, and of both versions")
    finally:
        stop.set()
        thread.join()
    assert not problems


def test_a_port_in_use_is_named(endpoint, runtime):
    with pytest.raises(EndpointError, match=str(endpoint.port)):
        Endpoint(runtime, status=dict, metrics=DeviceMetrics(), port=endpoint.port)
