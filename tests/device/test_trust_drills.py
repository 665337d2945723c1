"""Drills on a live agent over gRPC: keys are replaced under it, its release is revoked."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from clients import identity
from clients.slots import Slots
from clients.trust import DeviceFacts, Trust
from federation import release
from federation.key_change import KeyChange
from protos.messages import DeviceEvent, RejectReason
from tests.device.tiny import make_adapter
from tests.device.world import Gateway, Running, enrolled
from tests.trust.ceremony import Ceremony
from tests.waiting import until

ROOTS = ("root-1", "root-2")


@pytest.fixture
def gateway(tmp_path: Path):
    running = Gateway(tmp_path / "server")
    running.start()
    yield running
    running.close()


@pytest.fixture
def device(gateway: Gateway, home: Path) -> Path:
    enrolled(gateway, home)
    return home


@pytest.fixture(scope="session")
def adapters(base):
    return [make_adapter(base, seed) for seed in (1, 2, 3)]


def revoke(gateway: Gateway, out: Path, name: str) -> None:
    publisher, now = gateway.publisher, datetime.now(UTC)
    publisher.now = now
    release.make_revocation(
        out, adapters=publisher.repository.adapters(), release=name, why="leaks names", now=now
    )
    for key in publisher.adapter_keys[:2]:
        release.sign(out, key)
    publisher.repository.publish_standing(release.assemble_revocation(out), now=now)
    gateway.changed()


def test_keys_are_replaced_under_a_connected_device(
    gateway: Gateway, device: Path, runtime: Any, adapters: Any, tmp_path: Path
) -> None:
    """Several roots, then the online key, then an adapter key; and a release after all of it."""
    people = Ceremony(gateway.publisher, tmp_path / "people")
    record = gateway.release(adapters[0], 1)
    gateway.order(record, rollout="r1")
    with Running(device, runtime) as running:
        running.serves("stable-1")
        for old, new, signing in (
            ("root-1", "root-4", ("root-1", "root-2", "root-4")),
            ("root-2", "root-5", ("root-2", "root-4", "root-5")),
        ):
            people.carry_out(people.swap("root", old, new), signing)
        roots = ("root-4", "root-5")
        people.carry_out(people.swap("online", "online", "online-2"), roots)
        change = people.swap("adapters", "adapters-1", "adapters-4")
        people.carry_out(change, (*roots, "adapters-2", "adapters-4"))
        gateway.publisher.adapter_keys = [people.known["adapters-4"], people.known["adapters-2"]]
        gateway.order(gateway.release(adapters[1], 2), rollout="r2")
        running.serves("stable-2")
        assert running.agent._trust.state.root == 5
        assert gateway.fleet is not None
    # And a device that enrols now begins at the newest root.
    enrolled(gateway, tmp_path / "late", "d-2")
    assert b'"version":5' in identity.load(tmp_path / "late").root.replace(b" ", b"")


def test_a_device_leaves_a_revoked_release_for_the_one_before(
    gateway: Gateway, device: Path, runtime: Any, adapters: Any, tmp_path: Path
) -> None:
    one = gateway.release(adapters[0], 1)
    gateway.order(one, rollout="r1")
    with Running(device, runtime) as running:
        running.serves("stable-1")
        gateway.order(gateway.release(adapters[1], 2), rollout="r2")
        running.serves("stable-2")
        revoke(gateway, tmp_path / "bad", "stable-2")
        running.serves("stable-1")
        report = gateway.heard(DeviceEvent.REVERTED, "stable-2")
        assert report.reason is RejectReason.KNOWN_BAD
        assert "leaks names" in report.detail
        gateway.heard(DeviceEvent.COMMITTED, "stable-1", rollout="r2")
        gateway.heard(DeviceEvent.REJECTED, "stable-2", reason=RejectReason.KNOWN_BAD)
    with Running(device, runtime) as running:
        running.serves("stable-1")
        gateway.order(gateway.release(adapters[2], 3), rollout="r3")
        running.serves("stable-3")


def test_with_nothing_before_it_the_base_serves(
    gateway: Gateway, device: Path, runtime: Any, adapters: Any, tmp_path: Path
) -> None:
    gateway.order(gateway.release(adapters[0], 1, floor=1), rollout="r1")
    with Running(device, runtime) as running:
        running.serves("stable-1")
        revoke(gateway, tmp_path / "bad", "stable-1")
        until(lambda: running.runtime.pin().digest == "", what="the base alone, below every floor")
        gateway.heard(DeviceEvent.COMMITTED, "", rollout="r1")
    with Running(device, runtime) as running:
        assert running.runtime.pin().digest == ""


def test_the_one_before_is_revoked_too(
    gateway: Gateway, device: Path, runtime: Any, adapters: Any, tmp_path: Path
) -> None:
    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    with Running(device, runtime) as running:
        running.serves("stable-1")
        gateway.order(gateway.release(adapters[1], 2), rollout="r2")
        running.serves("stable-2")
        revoke(gateway, tmp_path / "bad1", "stable-1")
        gateway.heard(DeviceEvent.COMMITTED, "stable-2")
        revoke(gateway, tmp_path / "bad2", "stable-2")
        until(lambda: running.runtime.pin().digest == "", what="the base alone")


def test_killed_between_hearing_of_it_and_leaving(
    gateway: Gateway, device: Path, runtime: Any, adapters: Any, tmp_path: Path
) -> None:
    """What trust has learnt is durable first, so that the next start leaves it, off line too."""
    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    with Running(device, runtime) as running:
        running.serves("stable-1")
    revoke(gateway, tmp_path / "bad", "stable-1")
    trust = Trust(device / "trust", identity.load(device).root)
    facts = DeviceFacts(device_id="d-1", base_digest=runtime.base_digest, runtime=runtime.kind)
    with pytest.raises(Exception, match="known-bad"):
        trust.accept(gateway.repository.bundle(), device=facts, now=datetime.now(UTC))
    assert Slots(device).active() is not None
    runtime.publish(None)
    gateway.stop()
    with Running(device, runtime) as running:
        assert running.runtime.pin().digest == ""
        assert Slots(device).active() is None
        assert running.agent.status.last_event in ("reverted", "committed", "started")


def test_a_full_disk_keeps_it_serving_until_there_is_room(
    gateway: Gateway, device: Path, runtime: Any, adapters: Any, tmp_path: Path
) -> None:
    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    with Running(device, runtime) as running:
        running.serves("stable-1")
        gateway.heard(DeviceEvent.COMMITTED, "stable-1")
        blocker = device / "slots" / "state.json.partial"
        blocker.mkdir()
        revoke(gateway, tmp_path / "bad", "stable-1")
        gateway.heard(DeviceEvent.FAILED)
        assert running.runtime.pin().name == "stable-1"
        blocker.rmdir()
        until(lambda: running.runtime.pin().digest == "", what="the base alone")


def test_a_full_disk_at_the_start_is_no_reason_to_serve_it(
    gateway: Gateway, device: Path, runtime: Any, adapters: Any, tmp_path: Path
) -> None:
    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    with Running(device, runtime) as running:
        running.serves("stable-1")
    revoke(gateway, tmp_path / "bad", "stable-1")
    trust = Trust(device / "trust", identity.load(device).root)
    facts = DeviceFacts(device_id="d-1", base_digest=runtime.base_digest, runtime=runtime.kind)
    with pytest.raises(Exception, match="known-bad"):
        trust.accept(gateway.repository.bundle(), device=facts, now=datetime.now(UTC))
    runtime.publish(None)
    blocker = device / "slots" / "state.json.partial"
    blocker.mkdir()
    gateway.stop()
    with Running(device, runtime) as running:
        assert running.runtime.pin().digest == "", "rather the base alone"
    blocker.rmdir()


def test_nobody_but_the_adapter_keys_can_make_a_device_leave(
    gateway: Gateway, device: Path, runtime: Any, adapters: Any, tmp_path: Path
) -> None:
    """The online key alone, and one adapter key with it, are not enough."""
    people = Ceremony(gateway.publisher, tmp_path / "people")
    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    with Running(device, runtime) as running:
        running.serves("stable-1")
        out, publisher = tmp_path / "bad", gateway.publisher
        publisher.now = datetime.now(UTC)
        release.make_revocation(
            out,
            adapters=publisher.repository.adapters(),
            release="stable-1",
            why="spite",
            now=publisher.now,
            above=publisher.repository.offline(),
        )
        for key in (publisher.adapter_keys[0], publisher.online):
            release.sign(out, key, roots=[publisher.repository.root()])
        forged = publisher.forged(adapters=release.assemble_revocation(out))
        gateway.source = lambda after: forged
        gateway.changed()
        until(lambda: "metadata-signature" in running.agent.status.link, what="doubt")
        assert running.runtime.pin().name == "stable-1"
        gateway.source = gateway.repository.bundle
        people.carry_out(KeyChange(thresholds={"root": 3}), (*ROOTS, "root-3"))
        gateway.changed()
        until(lambda: running.agent.status.link == "", what="trust again")
