from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clients.health import NoSpace
from clients.partial import PayloadMismatch
from clients.slots import SlotDamaged, Slots
from tests.device.crashing import NEW, OLD, install, record


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_commit_and_revert(home: Path):
    slots = Slots(home)
    assert slots.active() is None
    slots.stage(record("one", OLD), OLD)
    assert slots.active() is None, "staged is not serving"
    assert slots.attempt() == 1
    slots.commit()
    assert slots.active().release == "one"
    slots.stage(record("two", NEW), NEW)
    slots.revert()
    assert slots.active().release == "one"
    assert slots.active_payload() == OLD
    assert Slots(home).state == slots.state


def test_going_back_needs_no_second_download(home: Path):
    install(home, "one", OLD)
    install(home, "two", NEW)
    slots = Slots(home)
    assert slots.holds(sha(OLD))
    slots.stage(record("one", OLD))
    slots.commit()
    assert slots.active_payload() == OLD
    slots.withdraw()
    assert slots.active() is None
    assert slots.holds(sha(OLD)), "what was withdrawn may come back"


@pytest.mark.parametrize("end", ["commit", "revert"])
def test_killed_before_every_change_to_the_disk(tmp_path: Path, end: str):
    """Always a whole committed release, and the same install completes afterwards."""
    command = [sys.executable, "-m", "tests.device.crashing", str(tmp_path), end]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["killed"] for row in rows] == [True] * (len(rows) - 1) + [False]
    assert len(rows) > 15
    assert all(row["whole"] and row["then_whole"] and row["trial"] is None for row in rows)
    if end == "commit":
        names = [row["active"] for row in rows]
        assert names == sorted(names, reverse=True), "old until one moment, new from then on"
        assert set(names) == {"old", "new"}
        assert {row["then"] for row in rows} == {"new"}
    else:
        assert {row["active"] for row in rows} | {row["then"] for row in rows} == {"old"}


def test_partial_download_survives_a_kill_and_goes_on_at_the_byte(home: Path):
    data = os.urandom(300_000)
    script = (
        "import sys, os, signal; from pathlib import Path; from clients.slots import Slots\n"
        "data = sys.stdin.buffer.read()\n"
        "partial = Slots(Path(sys.argv[1])).partial(sys.argv[2], len(data))\n"
        "partial.append(data[:65536]); partial.append(data[65536:123457])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", script, str(home), sha(data)]
    done = subprocess.run(command, input=data, timeout=120)
    assert done.returncode == -signal.SIGKILL
    partial = Slots(home).partial(sha(data), len(data))
    assert partial.offset == 123_457
    partial.append(data[partial.offset :])
    assert partial.finish() == data


def test_a_download_that_is_not_the_signed_one_is_deleted(home: Path):
    partial = Slots(home).partial(sha(OLD), len(OLD))
    partial.append(OLD[:-1])
    with pytest.raises(PayloadMismatch, match="signed are 3000 bytes"):
        partial.finish()
    assert partial.offset == 0
    partial.append(OLD[:-1] + b"!")
    with pytest.raises(PayloadMismatch):
        partial.finish()
    partial.append(OLD)
    with pytest.raises(PayloadMismatch, match="more than"):
        partial.append(b"1")
    assert partial.offset == 0, "a poisoned download must not be resumed"


def test_damage_is_noticed_and_the_release_before_is_there(home: Path):
    install(home, "one", OLD)
    install(home, "two", NEW)
    slots = Slots(home)
    (home / "slots" / slots.state.active / "payload").write_bytes(b"rot")
    with pytest.raises(SlotDamaged):
        slots.active_payload()
    assert slots.fall_back().release == "one"
    assert slots.active_payload() == OLD
    (home / "slots" / "state.json").write_bytes(b"{")
    assert Slots(home).active() is None


def test_disk_full_while_staging_leaves_the_active_slot(home: Path):
    install(home, "one", OLD)
    slots = Slots(home)
    big = os.urandom(200_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        partial = slots.partial(sha(big), len(big))
        with pytest.raises(NoSpace, match="free some space"):
            partial.append(big)
        assert partial.offset == 100_000, "what fitted stays for the next try"
        with pytest.raises(NoSpace):
            slots.stage(record("big", big), big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Slots(home).active_payload() == OLD
    assert Slots(home).state.trial is None
    partial.append(big[partial.offset :])
    assert partial.finish() == big
