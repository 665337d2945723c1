"""A child that is killed at one step of writing to the disk, with what was not synced lost.

The child does the work; at its n-th fsync or rename it first loses, as a power cut would, the
content of every file that was written since the start and not fsynced, and then kills itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

STEPS = ("fsync", "replace", "rename")


def cut(work: Callable[[], object], folder: Path, step: int, *, before: bool) -> bool:
    """Run ``work`` in a child and kill it at a step, before or after it is done.

    Returns:
        Whether the child was killed; False if it got to the end with fewer steps.
    """
    child = os.fork()
    if child == 0:  # pragma: no cover  # another process
        status = 1
        try:
            _arm(folder, step, before)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert os.WEXITSTATUS(status) == 0, "the work failed before it was killed"
    return False


def every_step(
    prepare: Callable[[], Path], work: Callable[[Path], Callable[[], object]]
) -> Iterator[tuple[str, Path]]:
    """Each way to be killed, in a world of its own: its name, and the folder as it was left.

    Args:
        prepare: makes a fresh folder.
        work: given that folder, what the child does.
    """
    step = 0
    while True:
        for before in (True, False):
            folder = prepare()
            if not cut(work(folder), folder, step, before=before):
                assert step > 0, "the work never touched the disk"
                return
            yield f"{'before' if before else 'after'} step {step}", folder
        step += 1


def _arm(folder: Path, step: int, before: bool) -> None:
    known = {_identity(path) for path in _files(folder)}
    synced: set[tuple[int, int]] = set()
    left = [step]

    def lose_and_die() -> None:
        for path in _files(folder):
            if _identity(path) not in known | synced:
                os.truncate(path, 0)
        os.kill(os.getpid(), signal.SIGKILL)

    def guarded(name: str) -> Callable[..., object]:
        original = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            fatal = left[0] == 0
            left[0] -= 1
            if fatal and before:
                lose_and_die()
            result = original(*args, **kwargs)
            if name == "fsync":
                status = os.fstat(args[0])  # type: ignore[arg-type]
                synced.add((status.st_dev, status.st_ino))
            if fatal:
                lose_and_die()
            return result

        return call

    for name in STEPS:
        setattr(os, name, guarded(name))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
