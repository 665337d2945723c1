from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clients.telemetry import BatchRefused, ReportQueue, TelemetryError
from protos.errors import WireError
from protos.messages import DeviceEvent, Quality, RejectReason, decode_report


def queue(home: Path, **changes) -> ReportQueue:
    fields = {"device_id": "d-1", "sign": lambda body: b"s" + body[:4], "now_ms": lambda: 7}
    return ReportQueue(home, **{**fields, **changes})


class Server:
    """Takes every report once, like the real one."""

    def __init__(self) -> None:
        self.last, self.seen = 0, []

    def __call__(self, batch):
        for signed in batch:
            report = decode_report(signed.body)
            if report.sequence > self.last:
                self.last = report.sequence
                self.seen.append(report)
        return self.last


def test_reports_are_numbered_signed_delivered_and_deleted(home: Path):
    reports, server = queue(home), Server()
    reports.put(DeviceEvent.STARTED, release="a-1")
    reports.put(DeviceEvent.REJECTED, release="a-2", reason=RejectReason.GUARD, detail="x\0y")
    assert reports.arrived.is_set()
    assert reports.pending() == 2
    assert reports.deliver(server) == 2
    assert reports.pending() == 0
    assert [r.sequence for r in server.seen] == [1, 2]
    assert server.seen[1].reason is RejectReason.GUARD
    assert queue(home).put(DeviceEvent.HEALTH).sequence == 3, "no number is used twice"


def test_survives_a_kill_and_is_delivered_once(home: Path):
    script = (
        "import sys, os, signal; from pathlib import Path\n"
        "from tests.device.test_telemetry import queue, Server\n"
        "from protos.messages import DeviceEvent\n"
        "q = queue(Path(sys.argv[1]))\n"
        "for _ in range(5): q.put(DeviceEvent.COMMITTED, release='a-1')\n"
        "unlink = os.unlink\n"
        "def kill(*a, **k): os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.unlink = kill\n"  # confirmed, and killed before the first deletion
        "q.deliver(lambda batch: 3)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(home)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    server = Server()
    server.last = 3  # the server has these
    reports = queue(home)
    reports.deliver(server)
    assert [r.sequence for r in server.seen] == [4, 5]
    assert reports.pending() == 0
    assert reports.put(DeviceEvent.HEALTH).sequence == 6


def test_nothing_is_lost_while_the_server_does_not_answer(home: Path):
    reports, server = queue(home), Server()
    for _ in range(5):
        reports.put(DeviceEvent.HEALTH)

    def down(batch):
        raise ConnectionError

    with pytest.raises(ConnectionError):
        reports.deliver(down)
    assert reports.deliver(lambda batch: 0) == 0, "a server that confirms nothing ends the round"
    assert reports.pending() == 5
    assert reports.deliver(server, batch=2) == 5


def test_a_server_cannot_confirm_what_it_was_not_sent(home: Path):
    reports = queue(home)
    reports.put(DeviceEvent.STARTED)

    answers = [2**50, 0]

    def liar(batch):
        if len(answers) == 2:
            reports.put(DeviceEvent.REVERTED)  # meanwhile, another thread
        return answers.pop(0)

    assert reports.deliver(liar) == 1
    assert reports.pending() == 1, "the second one was never sent"
    assert reports.put(DeviceEvent.HEALTH).sequence == 3


def test_a_device_restored_from_a_copy_of_its_disk_is_heard_again(home: Path, tmp_path: Path):
    reports, server = queue(home), Server()
    for _ in range(3):
        reports.put(DeviceEvent.HEALTH)
    reports.deliver(server)
    copy = shutil.copytree(home, tmp_path / "copy")
    for _ in range(20):
        reports.put(DeviceEvent.HEALTH)
    reports.deliver(server)
    restored = queue(copy)
    restored.put(DeviceEvent.STARTED, release="a-1")
    restored.put(DeviceEvent.REVERTED, release="a-1", reason=RejectReason.SELF_TEST)
    assert restored.deliver(server) == 2
    assert [(r.event.value, r.sequence) for r in server.seen[23:]] == [
        ("started", 24),
        ("reverted", 25),
    ]
    assert queue(copy).put(DeviceEvent.HEALTH).sequence == 26


def test_a_server_that_always_knows_more_is_asked_twice_and_no_more(home: Path):
    reports, asked = queue(home), []
    reports.put(DeviceEvent.STARTED)

    def ahead(batch):
        asked.append(decode_report(batch[0].body).sequence)
        return asked[-1] + 1000

    assert reports.deliver(ahead) == 1
    assert asked == [1, 1002]


def test_one_report_that_the_server_never_takes_does_not_block_the_rest(home: Path):
    reports, server = queue(home), Server()
    for _ in range(5):
        reports.put(DeviceEvent.HEALTH)

    def picky(batch):
        if any(decode_report(s.body).sequence == 3 for s in batch):
            raise BatchRefused("malformed")
        return server(batch)

    reports.deliver(picky)
    assert [r.sequence for r in server.seen] == [1, 2, 4, 5]
    assert reports.pending() == 0


def test_offline_for_long_drops_health_before_anything_else(home: Path):
    reports = queue(home, limit=4)
    reports.put(DeviceEvent.COMMITTED, release="a-1")
    for _ in range(6):
        reports.put(DeviceEvent.HEALTH)
    reports.put(DeviceEvent.REVERTED, release="a-1", reason=RejectReason.SELF_TEST)
    server = Server()
    reports.deliver(server)
    assert server.seen[0].event is DeviceEvent.COMMITTED
    assert server.seen[-1].event is DeviceEvent.REVERTED
    assert len(server.seen) == 4


def test_what_a_server_would_refuse_is_refused_at_once(home: Path):
    reports = queue(home)
    with pytest.raises(WireError, match="accuracy_after"):
        reports.put(
            DeviceEvent.COMMITTED,
            quality=Quality(examples=1, accuracy_before=0.5, accuracy_after=float("nan")),
        )
    assert reports.put(DeviceEvent.STARTED).sequence == 1


def test_reports_of_an_earlier_name_are_not_sent_under_the_new_one(home: Path):
    queue(home).put(DeviceEvent.STARTED)
    server = Server()
    reports = queue(home, device_id="d-2")
    reports.put(DeviceEvent.STARTED)
    reports.deliver(server)
    assert [(r.device_id, r.sequence) for r in server.seen] == [("d-2", 2)]


def test_damage_is_an_error_with_a_remedy(home: Path):
    queue(home)
    (home / "telemetry" / "acked.json").write_text("{}")
    with pytest.raises(TelemetryError, match="enrol the device again"):
        queue(home)
    assert [path.name for path in (home / "telemetry").iterdir()] == ["acked.json"]
