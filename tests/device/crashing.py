"""Runs a scenario of the slots again and again, killed with SIGKILL before its 1st, 2nd, ...
change to the disk, and prints what a fresh start finds after each kill (JSON lines)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from clients.slots import SlotRecord, Slots

STEPS = ("fsync", "replace", "unlink", "rmdir", "mkdir", "rename")


def record(name: str, data: bytes) -> SlotRecord:
    return SlotRecord(
        release=name,
        channel="stable",
        counter=1,
        target=f"adapters/stable/{name}.airpeft",
        sha256=hashlib.sha256(data).hexdigest(),
        length=len(data),
        plain_length=len(data),
        adapter_digest="sha256:" + "1" * 64,
        spec_digest="sha256:" + "2" * 64,
        base_digest="sha256:" + "3" * 64,
        rollout="r",
        round_sequence=1,
    )


OLD, NEW = b"old" * 1000, b"new" * 2000


def install(home: Path, name: str, data: bytes, *, keep: bool = True) -> None:
    slots = Slots(home)
    one = record(name, data)
    if not slots.holds(one.sha256):
        partial = slots.partial(one.sha256, one.length)
        while partial.offset < one.length:
            partial.append(data[partial.offset : partial.offset + 2500])
        slots.stage(one, partial.finish())
    else:
        slots.stage(one)
    slots.attempt()
    if keep:
        slots.commit({"release": name})
        slots.told()
    else:
        slots.revert()


def kill_before(step: int) -> None:
    left = [step]

    def counted(function):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))


def main(folder: Path, keep: bool) -> None:
    install(folder / "start", "older", b"x" * 10)
    install(folder / "start", "old", OLD)
    for step in range(1, 200):
        home = shutil.copytree(folder / "start", folder / str(step))
        child = os.fork()
        if child == 0:
            kill_before(step)
            install(home, "new", NEW, keep=keep)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        slots = Slots(home)
        active = slots.active()
        found = {"step": step, "killed": killed, "active": active.release if active else ""}
        found["whole"] = hashlib.sha256(slots.active_payload()).hexdigest() == active.sha256
        install(home, "new", NEW, keep=keep)
        again = Slots(home)
        found["then"] = again.active().release
        found["then_whole"] = again.active_payload() == (NEW if keep else OLD)
        found["trial"] = again.state.trial
        print(json.dumps(found), flush=True)
        shutil.rmtree(home)
        if not killed:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "commit")
