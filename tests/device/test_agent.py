"""The agent end to end over real gRPC on loopback, with a tiny base model."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from aggregation.adapter import Adapter
from clients.connection import Connection, Denied
from clients.install import InstallPolicy
from clients.permission import Permission, Wait
from clients.probe import HeldOut
from clients.runtime import Request
from clients.slots import Slots
from clients.watch import WatchPolicy
from federation import chunks
from protos.messages import DeviceEvent, RejectReason
from protos.signed import Assignment
from tests.device.tiny import LABELS, WORDS, make_adapter
from tests.device.world import Gateway, Proxy, Running, enrolled
from tests.waiting import until

OPEN = (DeviceEvent.DOWNLOADED, DeviceEvent.STAGED)


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "CHUNK", 512)  # so that a tiny adapter has many
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
    """A good one, the same with its head the wrong way round, and a third."""
    good = make_adapter(base, 1)
    flipped = {k: (-v if "classifier" in k else v) for k, v in good.tensors.items()}
    return good, Adapter(good.spec, flipped), make_adapter(base, 2)


@pytest.fixture
def held_out(runtime, adapters) -> HeldOut:
    """Texts labelled by the good adapter, so that it scores 1 and the flipped one 0."""
    version = runtime.load(adapters[0], name="oracle")
    texts = [f"the {a} {b} was {c}" for a, b, c in itertools.product(WORDS[:3], WORDS[6:9], WORDS)]
    found = runtime.run([Request(text, version) for text in texts])
    picked = {
        label: [t for t, p in zip(texts, found, strict=True) if p.label == label][:12]
        for label in LABELS
    }
    rows = [(text, label) for label, some in picked.items() for text in some]
    assert len(rows) >= 12
    return HeldOut(tuple(t for t, _ in rows), tuple(label for _, label in rows))


def events(gateway: Gateway, release: str) -> list[DeviceEvent]:
    return [r.event for r in gateway.reports() if r.release == release]


def test_installs_probes_commits_and_says_so(gateway, device, runtime, adapters, held_out):
    record = gateway.release(adapters[0], 1)
    gateway.order(record, rollout="r1")
    with Running(device, runtime, held_out=held_out) as running:
        running.serves("stable-1")
        report = gateway.heard(DeviceEvent.COMMITTED, "stable-1", rollout="r1")
        assert report.quality.accuracy_before == 0.5, "the base alone scores as chance does"
        assert report.quality.accuracy_after == 1.0
        assert report.quality.examples == len(held_out.texts)
        assert report.quality.latency_ms_after > 0
        assert report.health.process_memory_bytes > 0
        assert report.payload_bytes == record.length
        done = [*OPEN, DeviceEvent.COMMITTED]
        assert events(gateway, "stable-1") == done
        assert running.runtime.pin().digest == adapters[0].digest
        until(lambda: running.queue.pending() == 0, what="everything to be delivered")
        gateway.order(record, rollout="r2")
        gateway.heard(DeviceEvent.COMMITTED, "stable-1", rollout="r2")
        assert events(gateway, "stable-1") == [*done, DeviceEvent.COMMITTED], "not installed twice"
    gateway.heard(DeviceEvent.STARTED)
    runtime.publish(None)
    with Running(device, runtime, held_out=held_out) as running:
        assert runtime.pin().name == "stable-1", "served before any connection"
        gateway.heard(DeviceEvent.STARTED, "stable-1")


def test_tampered_payload_is_refused_and_an_honest_one_taken(gateway, device, runtime, adapters):
    record = gateway.release(adapters[0], 1)
    file = gateway.payload_file(record)
    honest = file.read_bytes()
    file.write_bytes(honest[:-7] + bytes([honest[-7] ^ 1]) + honest[-6:])
    gateway.order(record, rollout="r1")
    with Running(device, runtime) as running:
        report = gateway.heard(DeviceEvent.REJECTED, "stable-1")
        assert report.reason is RejectReason.PAYLOAD_DIGEST
        assert runtime.pin().name == "base"
        file.write_bytes(honest)
        gateway.heard(DeviceEvent.COMMITTED, "stable-1")
        running.serves("stable-1")


@pytest.mark.parametrize("change", [lambda d: d[:-100], lambda d: d + b"x" * 100])
def test_truncated_and_longer_payloads_are_refused(gateway, device, runtime, adapters, change):
    record = gateway.release(adapters[0], 1)
    file = gateway.payload_file(record)
    file.write_bytes(change(file.read_bytes()))
    gateway.order(record, rollout="r1")
    with Running(device, runtime, later=(60.0, 60.0)):
        report = gateway.heard(DeviceEvent.REJECTED, "stable-1")
        assert report.reason is RejectReason.PAYLOAD_DIGEST
        assert Slots(device).partial(record.sha256, record.length).offset == 0


def test_a_regressing_adapter_is_reverted_and_remembered(
    gateway, device, runtime, adapters, held_out
):
    good, flipped, _ = adapters
    gateway.order(gateway.release(good, 1), rollout="r1")
    with Running(device, runtime, held_out=held_out) as running:
        gateway.heard(DeviceEvent.COMMITTED, "stable-1")
        bad = gateway.release(flipped, 2)
        gateway.order(bad, rollout="r2")
        report = gateway.heard(DeviceEvent.REVERTED, "stable-2", rollout="r2")
        assert report.reason is RejectReason.QUALITY_REGRESSED
        assert report.quality.accuracy_before == 1.0
        assert report.quality.accuracy_after == 0.0
        running.serves("stable-1")
        assert running.slots.active().release == "stable-1"
    with Running(device, runtime, held_out=held_out):
        report = gateway.heard(DeviceEvent.REJECTED, "stable-2")
        assert report.reason is RejectReason.KNOWN_BAD
        assert runtime.pin().name == "stable-1"


def test_rollback_is_not_vetoed_and_needs_no_download(gateway, device, runtime, adapters, held_out):
    good, flipped, _ = adapters
    old = gateway.release(flipped, 1)
    gateway.order(old, rollout="r1")
    lenient = InstallPolicy(quality_tolerance=1.0)
    with Running(device, runtime, held_out=held_out, policy=lenient):
        gateway.heard(DeviceEvent.COMMITTED, "stable-1")
    with Running(device, runtime, held_out=held_out):
        gateway.order(gateway.release(good, 2), rollout="r2")
        gateway.heard(DeviceEvent.COMMITTED, "stable-2")
        fetched = len(gateway.fetches)
        gateway.order(old, rollout="r3")
        report = gateway.heard(DeviceEvent.COMMITTED, "stable-1", rollout="r3")
        assert report.quality.accuracy_after == 0.0, "measured and told, not refused"
        assert report.payload_bytes == 0
        assert len(gateway.fetches) == fetched


def test_withdrawn_to_the_base_alone(gateway, device, runtime, adapters):
    record = gateway.release(adapters[0], 1)
    gateway.order(record, rollout="r1")
    with Running(device, runtime) as running:
        gateway.heard(DeviceEvent.COMMITTED, "stable-1")
        gateway.order(Assignment(10_000, "", ""), rollout="r1")
        running.serves("base")
        gateway.heard(DeviceEvent.COMMITTED, "", rollout="r1")
        assert Slots(device).active() is None
        gateway.order(record, rollout="r2")
        running.serves("stable-1")
        gateway.heard(DeviceEvent.COMMITTED, "stable-1", rollout="r2")


def test_server_gone_and_back(gateway, device, runtime, adapters):
    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    with Running(device, runtime) as running:
        gateway.heard(DeviceEvent.COMMITTED, "stable-1")
        gateway.stop()
        until(lambda: not running.agent.status.online, what="the loss to be noticed")
        gateway.order(gateway.release(adapters[2], 2), rollout="r2")
        assert runtime.pin().name == "stable-1"
        running.queue.put(DeviceEvent.HEALTH)
        gateway.start()
        running.serves("stable-2")
        gateway.heard(DeviceEvent.COMMITTED, "stable-2")
        gateway.heard(DeviceEvent.HEALTH)
        assert len(running.waits) >= running.connections - 1, "it backs off before each try"


def test_downloads_that_are_cut_go_on_at_the_byte(gateway, device, runtime, adapters):
    record = gateway.release(adapters[0], 1)
    gateway.stop()
    gateway.cut_after = 2
    gateway.start()
    gateway.order(record, rollout="r1")
    with Running(device, runtime):
        gateway.heard(DeviceEvent.COMMITTED, "stable-1")
    offsets = [offset for _, offset in gateway.fetches]
    assert offsets == list(range(0, record.length, 1024)), "no byte twice"


def test_a_half_open_link_is_noticed(gateway, device, runtime, adapters):
    proxy = Proxy(gateway.port)

    def connect(who):
        return Connection(dataclasses.replace(who, fleet=f"127.0.0.1:{proxy.port}"), silence=0.8)

    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    try:
        with Running(device, runtime, connect=connect) as running:
            gateway.heard(DeviceEvent.COMMITTED, "stable-1")
            proxy.silent.set()
            until(lambda: "silent" in running.agent.status.link, what="the silence to be noticed")
            assert runtime.pin().name == "stable-1"
            gateway.order(gateway.release(adapters[2], 2), rollout="r2")
            proxy.silent.clear()
            running.serves("stable-2")
    finally:
        proxy.close()


def test_an_impostor_is_refused_and_gets_no_reports(gateway, device, runtime, adapters, tmp_path):
    """Somebody with the server's keys and database answers with yesterday's metadata."""
    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    with Running(device, runtime) as running:
        gateway.heard(DeviceEvent.COMMITTED, "stable-1")
        old = gateway.repository.bundle()
        gateway.order(gateway.release(adapters[2], 2), rollout="r2")
        gateway.heard(DeviceEvent.COMMITTED, "stable-2")
        for _ in range(2):  # a second time it is news again
            count = len(gateway.reports())
            gateway.stop()
            gateway.source = lambda after: old
            gateway.start()
            until(lambda: "metadata-rollback" in running.agent.status.link, what="the refusal")
            assert runtime.pin().name == "stable-2"
            until(lambda: running.queue.pending() == 1, what="the report to be kept")
            assert running.agent.status.last_reason == "metadata-rollback"
            assert len(gateway.reports()) == count, "an impostor could swallow it"
            gateway.stop()
            gateway.source = gateway.repository.bundle
            gateway.start()
            until(lambda: running.queue.pending() == 0, what="the report to be delivered")
            assert gateway.reports()[-1].reason is RejectReason.METADATA_ROLLBACK


def test_wrong_base_and_runtime_are_refused(gateway, device, runtime, adapters):
    spec = dataclasses.replace(adapters[0].spec, base_digest="sha256:" + "7" * 64)
    other = Adapter(spec, adapters[0].tensors)
    gateway.order(gateway.release(other, 1), rollout="r1")
    with Running(device, runtime):
        assert gateway.heard(DeviceEvent.REJECTED).reason is RejectReason.WRONG_BASE
        gateway.order(gateway.release(adapters[0], 2, runtime=("llamacpp",)), rollout="r2")
        reason = RejectReason.UNSUPPORTED_RUNTIME
        gateway.heard(DeviceEvent.REJECTED, "stable-2", reason=reason)
        assert not gateway.fetches
        # The same bundle again says nothing new.
        gateway.publisher.refresh()
        gateway.changed()
        gateway.order(gateway.release(adapters[0], 3), rollout="r3")
        gateway.heard(DeviceEvent.COMMITTED, "stable-3")
        assert events(gateway, "stable-2") == [DeviceEvent.REJECTED]


def test_signed_but_not_sane(gateway, device, runtime, adapters):
    """What both roles have signed is still looked at: decoding, guard, load."""
    good = adapters[0]
    fields = {
        "adapter_digest": good.digest,
        "spec_digest": good.spec.digest,
        "base_digest": good.spec.base_digest,
        "plain_length": good.nbytes,
    }
    gateway.order(gateway.release_bytes(b"not a payload" * 50, 1, **fields), rollout="r1")
    huge = Adapter(good.spec, {k: np.full_like(v, 1e20) for k, v in good.tensors.items()})
    headless = make_adapter_without_head(good)
    with Running(device, runtime):
        reason = RejectReason.PAYLOAD_MALFORMED
        gateway.heard(DeviceEvent.REJECTED, "stable-1", reason=reason)
        gateway.order(gateway.release(huge, 2), rollout="r2")
        gateway.heard(DeviceEvent.REJECTED, "stable-2", reason=RejectReason.GUARD)
        gateway.order(gateway.release(headless, 3), rollout="r3")
        gateway.heard(DeviceEvent.REVERTED, "stable-3", reason=RejectReason.SELF_TEST)
        assert runtime.pin().name == "base"
        gateway.publisher.refresh()
        gateway.changed()
        gateway.heard(DeviceEvent.REJECTED, "stable-3", reason=RejectReason.KNOWN_BAD)


def make_adapter_without_head(adapter: Adapter) -> Adapter:
    spec = dataclasses.replace(adapter.spec, others=(), labels=(), task="feature")
    return Adapter(spec, {key: adapter.tensors[key] for key in spec.shapes()})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_release_that_kills_the_process_is_given_up(gateway, device, runtime, adapters):
    """The count of tries is durable: found by the next process, after the third death."""
    record = gateway.release(adapters[0], 1)
    gateway.order(record, rollout="r1")
    entered, go = threading.Event(), threading.Event()

    class Deadly:
        """An engine that takes its process with it: this thread never comes back from load."""

        kind, base_digest = runtime.kind, runtime.base_digest
        module_shapes, pin, publish = runtime.module_shapes, runtime.pin, runtime.publish

        def load(self, adapter, *, name):
            entered.set()
            go.wait(240)
            raise SystemExit

    deaths = []
    for _ in range(3):
        entered.clear()
        running = Running(device, Deadly())
        assert entered.wait(120)
        deaths.append(running)
    go.set()
    with Running(device, runtime):
        report = gateway.heard(DeviceEvent.REVERTED, "stable-1")
        assert report.reason is RejectReason.SELF_TEST
        assert "3 tries" in report.detail
        assert len(gateway.fetches) == 1, "what was staged is not fetched again"
    for running in deaths:
        running.agent.stop()


def test_damaged_slot_at_start_falls_back(gateway, device, runtime, adapters):
    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    with Running(device, runtime):
        gateway.heard(DeviceEvent.COMMITTED, "stable-1")
        gateway.order(gateway.release(adapters[2], 2), rollout="r2")
        gateway.heard(DeviceEvent.COMMITTED, "stable-2")
    slots = Slots(device)
    (device / "slots" / slots.state.active / "payload").write_bytes(b"rot")
    runtime.publish(None)
    gateway.stop()
    with Running(device, runtime):
        assert runtime.pin().name == "stable-1"
        gateway.start()
        gateway.heard(DeviceEvent.FAILED, "stable-2")
        gateway.heard(DeviceEvent.COMMITTED, "stable-2", rollout="r2", quality=None)


def test_a_revoked_device_serves_on_and_asks_rarely(gateway, device, runtime, adapters):
    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    with Running(device, runtime) as running:
        gateway.heard(DeviceEvent.COMMITTED, "stable-1")
        gateway.fleet.revoke("d-1", who="test", why="test")
        gateway.changed()
        until(lambda: "permission-denied" in running.agent.status.link, what="the refusal")
        assert runtime.pin().name == "stable-1"
        before = len(running.waits)
        until(lambda: len(running.waits) >= before + 2, what="two more refusals")
        assert min(running.waits[before:]) >= 0.3, "it asks rarely"
        assert not running.agent.status.online


def test_a_strangers_token_is_refused(gateway, home):
    gateway.enrolment.make_token(who="test", device_id="d-1")
    enrolled(gateway, home, "d-2")
    from clients import identity
    from clients.connection import enrol
    from protos.messages import EnrolRequest

    request = EnrolRequest(
        token="guessed",
        certificate_request=identity.certificate_request(identity.key_of(home)),
    )
    with pytest.raises(Denied, match="unknown-token"):
        enrol(f"127.0.0.1:{gateway.enrol_port}", gateway.authority.pem, request)


def test_what_is_locked_is_downloaded_and_loaded_when_the_lock_goes(
    gateway, device, runtime, adapters
):
    lock = device / "update.lock"
    lock.write_text("printing")
    permission = Permission(device, now=lambda: datetime.now(UTC), ask_again_seconds=0.05)
    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    with Running(device, runtime, permission=permission) as running:
        gateway.heard(DeviceEvent.STAGED, "stable-1")
        until(lambda: "update.lock" in running.agent.status.waiting, what="the lock's name")
        assert running.runtime.pin().digest == ""
        lock.unlink()
        running.serves("stable-1")
        gateway.heard(DeviceEvent.COMMITTED, "stable-1")
        assert events(gateway, "stable-1") == [*OPEN, DeviceEvent.COMMITTED]
        until(lambda: running.agent.status.waiting == "", what="nothing to wait for")


def test_what_waits_for_its_window_is_installed_though_the_link_is_gone(
    gateway, device, runtime, adapters
):
    opened = threading.Event()

    class ByHand(Permission):
        """A window that this test opens."""

        def wait(self, window):
            return None if opened.is_set() else Wait(0.05, "the window is closed")

    permission = ByHand(device, now=lambda: datetime.now(UTC))
    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    with Running(device, runtime, permission=permission) as running:
        gateway.heard(DeviceEvent.STAGED, "stable-1")
        gateway.stop()
        until(lambda: not running.agent.status.online, what="the loss of the link")
        opened.set()
        running.serves("stable-1")
        gateway.start()
        gateway.heard(DeviceEvent.COMMITTED, "stable-1")


# A machine that is busy with other things must not be taken for a release that is slow.
PATIENT = {"every": 0.02, "strikes": 2, "latency_slack_ms": 600_000.0}


def watching() -> InstallPolicy:
    return InstallPolicy(watch=WatchPolicy(seconds=600.0, **PATIENT))


def test_a_release_that_makes_the_device_worse_goes_back_by_itself(
    gateway, device, runtime, adapters
):
    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    with Running(device, runtime, policy=watching()) as running:
        running.serves("stable-1")
        gateway.order(gateway.release(adapters[2], 2), rollout="r2")
        running.serves("stable-2")
        assert running.agent._installer.watch.watched is not None
        # From now on no growth is small enough.
        policy = WatchPolicy(**PATIENT, memory_factor=0.1, memory_slack_bytes=0)
        running.agent._installer.watch._policy = policy
        report = gateway.heard(DeviceEvent.REVERTED, "stable-2")
        assert report.reason is RejectReason.HEALTH_REGRESSED
        assert "the process has" in report.detail
        running.serves("stable-1")
    assert not (device / "watch.json").exists()
    with Running(device, runtime, policy=watching()) as running:
        running.serves("stable-1")
        rejected = gateway.heard(DeviceEvent.REJECTED, "stable-2")
        assert rejected.reason is RejectReason.KNOWN_BAD


def test_a_release_that_stays_well_is_no_longer_watched_after_its_bake(
    gateway, device, runtime, adapters
):
    gateway.order(gateway.release(adapters[0], 1), rollout="r1")
    policy = InstallPolicy(watch=WatchPolicy(seconds=0.2, **PATIENT))
    with Running(device, runtime, policy=policy) as running:
        gateway.heard(DeviceEvent.COMMITTED, "stable-1")
        watch = running.agent._installer.watch
        until(lambda: watch.watched is None, what="the end of the bake")
        assert runtime.pin().name == "stable-1"
        assert events(gateway, "stable-1")[-1] is DeviceEvent.COMMITTED
