"""The disk is full at the 1st, 2nd, ... write of what a device does: it serves on, and recovers."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from aggregation import payload
from aggregation.adapter import Adapter
from clients.agent import Agent, AgentPolicy
from clients.connection import ConnectionLost
from clients.health import NoSpace, require_space
from clients.install import InstallPolicy
from clients.link import Backoff
from clients.runtime import Request
from clients.slots import Slots
from clients.telemetry import ReportQueue
from clients.trust import DeviceFacts, Trust
from clients.trust_state import read_state
from clients.watch import WatchPolicy
from federation.published import ReleaseRecord
from protos.messages import DeviceEvent, RejectReason, Report, decode_report
from protos.signed import Assignment, ReleaseStatement
from tests.device.small_engine import SmallEngine, small_adapter
from tests.full_disk import full_after
from tests.trust.fleet_of_one import Publisher
from tests.waiting import until

Event = DeviceEvent


class Shelf:
    """The repository's files, as a connection hands them out."""

    def __init__(self, publisher: Publisher) -> None:
        self._repository = publisher.repository
        self.heard: list[int] = []

    def fetch(self, path: str, offset: int) -> Iterator[bytes]:
        data = self._repository.read(path)[offset:]
        yield data[:300]
        yield data[300:]

    def report(self, reports: Any) -> int:
        self.heard += [decode_report(one.body).sequence for one in reports]
        return max(self.heard)


class Unit:
    """One start of a device's agent; nothing but what the test does happens."""

    def __init__(
        self,
        home: Path,
        runtime: Any,
        publisher: Publisher,
        queue: ReportQueue | None = None,
    ) -> None:
        rng = random.Random(3)  # noqa: S311
        self.home, self.runtime, self.publisher = home, runtime, publisher
        self.shelf = Shelf(publisher)
        self.queue = queue or ReportQueue(
            home, device_id="d-1", sign=lambda body: body, now_ms=lambda: 1
        )
        self.told: list[Report] = []
        watch = WatchPolicy(seconds=3600.0)
        self.agent = Agent(
            home,
            device=DeviceFacts(
                device_id="d-1", base_digest=runtime.base_digest, runtime=runtime.kind
            ),
            trust=Trust(home / "trust", publisher.repository.root()),
            slots=Slots(home),
            runtime=runtime,
            queue=self.queue,
            connect=lambda: pytest.fail("no link is needed"),
            held_out=None,
            policy=AgentPolicy(install=InstallPolicy(watch=watch), later=(0.0, 0.0)),
            now=lambda: publisher.now,
            backoff=lambda base, cap: Backoff(rng, base=0.0, cap=0.0),
            on_report=self.told.append,
        )

    def hear(self) -> None:
        """What happens when the newest metadata comes."""
        try:
            self.agent.consider(self.publisher.bundle(), self.shelf)  # type: ignore[arg-type]
        except ConnectionLost as error:
            pytest.fail(f"a full disk is no lost link: {error}")

    def say_the_rest(self) -> None:
        """Let the reporter's thread put on disk what the full disk kept in memory."""
        reporter = self.agent._reporter
        thread = threading.Thread(target=reporter.run)
        self.queue.arrived.set()
        thread.start()
        until(lambda: not reporter._unwritten and not self.queue.pending(), what="the rest")
        self.agent.stop()
        self.queue.arrived.set()
        thread.join(120)

    def events(self, release: str) -> list[tuple[DeviceEvent, RejectReason | None]]:
        return [(one.event, one.reason) for one in self.told if one.release == release]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing is counted and not done: nothing here is killed, and thousands take minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def runtime() -> SmallEngine:
    return SmallEngine()


@pytest.fixture(scope="module")
def adapters() -> list[Adapter]:
    return [small_adapter(seed) for seed in (1, 2)]


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "server", now=datetime.now(UTC))


def release(publisher: Publisher, adapter: Adapter, counter: int, **changes: Any) -> ReleaseRecord:
    found = payload.encode(adapter, dtype="f32")
    fields = {
        "adapter_digest": found.adapter_digest,
        "spec_digest": adapter.spec.digest,
        "base_digest": adapter.spec.base_digest,
        "plain_length": found.plain_length,
        **changes,
    }
    statement = ReleaseStatement(channel="stable", counter=counter, **fields)
    metadata = publisher.signed_adapters(statement, found.data)
    return publisher.repository.publish_release(metadata, found.data, now=publisher.now)


@pytest.fixture
def installed(tmp_path: Path, publisher: Publisher, runtime: Any, adapters: Any) -> Path:
    """A home where stable-1 is committed."""
    home = tmp_path / "home"
    runtime.publish(None)
    publisher.order(release(publisher, adapters[0], 1), rollout="r1")
    unit = Unit(home, runtime, publisher)
    unit.agent.start()
    unit.hear()
    assert runtime.pin().name == "stable-1"
    return home


def every_write(
    original: Path,
    scratch: Path,
    runtime: Any,
    publisher: Publisher,
    work: Callable[[Unit], None],
) -> Iterator[tuple[int, Unit]]:
    """The work on a fresh copy, with a disk that is full from the 1st, 2nd, ... write on."""
    for number in itertools.count():
        home = shutil.copytree(original, scratch / str(number))
        unit = Unit(home, runtime, publisher)
        runtime.publish(None)
        unit.agent.start()
        unit.told.clear()
        with full_after(number, home) as disk:
            work(unit)
            serves(unit)
        yield number, unit
        shutil.rmtree(home)
        if disk.refused == 0:
            assert number > 5, "the work never touched the disk"
            return


def serves(unit: Unit) -> None:
    version = unit.runtime.pin()
    (answer,) = unit.runtime.run([Request("how was it?", version)])
    assert answer.label in ("negative", "positive")


def on_disk(unit: Unit) -> str:
    active = Slots(unit.home).active()
    return active.release if active is not None else ""


def test_an_install(tmp_path, publisher, runtime, adapters, installed) -> None:
    publisher.order(release(publisher, adapters[1], 2), rollout="r2")
    full = 0
    for number, unit in every_write(
        installed, tmp_path / "full", runtime, publisher, lambda unit: unit.hear()
    ):
        assert on_disk(unit) in ("stable-1", "stable-2"), f"write {number}"
        unit.hear()
        assert runtime.pin().name == on_disk(unit) == "stable-2", f"write {number}"
        unit.say_the_rest()
        events = unit.events("stable-2")
        assert events.count((Event.COMMITTED, None)) == 1, f"write {number}: {events}"
        failed = [reason for event, reason in events if event is Event.FAILED]
        assert set(failed) <= {RejectReason.NO_SPACE}, f"write {number}: {events}"
        full += bool(failed)
        found = unit.shelf.heard
        assert found == list(range(1, len(found) + 1)), f"write {number}: a gap"
    assert full > 20


def test_a_release_that_is_refused(tmp_path, publisher, runtime, adapters, installed) -> None:
    """What must be remembered as bad, and cannot be, is asked about again."""
    publisher.order(release(publisher, adapters[1], 2, adapter_digest="sha256:" + "0" * 64))
    for number, unit in every_write(
        installed, tmp_path / "full", runtime, publisher, lambda unit: unit.hear()
    ):
        assert runtime.pin().name == on_disk(unit) == "stable-1", f"write {number}"
        unit.hear()
        unit.hear()
        unit.say_the_rest()
        assert runtime.pin().name == on_disk(unit) == "stable-1", f"write {number}"
        assert len(read_state(unit.home / "trust").bad) == 1, f"write {number}"
        events = unit.events("stable-2")
        assert (Event.REJECTED, RejectReason.PAYLOAD_MALFORMED) in events, f"write {number}"


def test_an_order_to_serve_the_base_alone(
    tmp_path, publisher, runtime, adapters, installed
) -> None:
    publisher.order(Assignment(10_000, "", ""), rollout="r2")
    for number, unit in every_write(
        installed, tmp_path / "full", runtime, publisher, lambda unit: unit.hear()
    ):
        unit.hear()
        assert (runtime.pin().digest, on_disk(unit)) == ("", ""), f"write {number}"
        unit.say_the_rest()
        committed = [one for one in unit.told if one.event is Event.COMMITTED]
        assert {one.rollout for one in committed if not one.release} == {"r2"}, f"write {number}"


def test_a_start(tmp_path, publisher, runtime, adapters, installed) -> None:
    """Serving does not wait for room, nor does what was left to tell get lost."""
    slots = Slots(installed)
    slots._write_state(replace(slots.state, untold={"release": "stable-1", "rollout": "r1"}))
    for number in itertools.count():
        home = shutil.copytree(installed, tmp_path / "full" / str(number))
        runtime.publish(None)
        with full_after(number, home) as disk:
            unit = Unit(home, runtime, publisher)
            unit.agent.start()
            assert runtime.pin().name == "stable-1", f"write {number}"
            serves(unit)
        unit.hear()
        unit.say_the_rest()
        events = unit.events("stable-1")
        assert (Event.STARTED, None) in events, f"write {number}: {events}"
        assert (Event.COMMITTED, None) in events, f"write {number}: {events}"
        if disk.refused == 0:
            assert number > 5
            return


def test_what_is_too_large_is_not_even_fetched(publisher, runtime, adapters, installed) -> None:
    publisher.order(release(publisher, adapters[1], 2), rollout="r2")
    unit = Unit(installed, runtime, publisher)
    unit.agent.start()
    unit.shelf.fetch = lambda path, offset: pytest.fail("a byte was asked for")  # type: ignore[method-assign]
    unit.agent._installer._stager._policy = InstallPolicy(max_payload_bytes=100)
    unit.hear()
    assert unit.events("stable-2") == [(Event.REJECTED, RejectReason.GUARD)]
    with pytest.raises(NoSpace, match=r"the install needs 9\d+ and leaves"):
        require_space(installed, 9 * 10**15)
    assert runtime.pin().name == "stable-1"
