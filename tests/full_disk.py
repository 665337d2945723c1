"""A disk that is full from the n-th write on, and has room again when it is left."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_NAMES = ("open", "fsync", "mkdir", "replace", "rename")


class Counter:
    """What happened while a disk was watched: writes that passed, and writes that were refused."""

    def __init__(self) -> None:
        self.passed, self.refused = 0, 0


@contextmanager
def full_after(writes: int, folder: Path) -> Iterator[Counter]:
    """Below ``folder`` so many writes pass, and every later one finds no space.

    A write is a file opened for writing, a file or folder synced, a folder made, a name replaced:
    the places where a program may be killed, too. What is read or taken away needs no space.
    """
    count = Counter()
    here = str(folder)

    def check(path: Any) -> None:
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        if not os.fspath(path).startswith(here):
            return
        if count.passed >= writes:
            count.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
        count.passed += 1

    before = {name: getattr(os, name) for name in _NAMES}
    files = io.open

    def guarded(name: str) -> Any:
        def call(path: Any, *rest: Any, **named: Any) -> Any:
            if name != "open" or (rest and rest[0] & _WRITING):
                check(path)
            return before[name](path, *rest, **named)

        return call

    def opened(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if not isinstance(file, int) and set(mode) & set("wax+"):
            check(file)
        return files(file, mode, *rest, **named)

    try:
        for name in _NAMES:
            setattr(os, name, guarded(name))
        io.open = opened
        yield count
    finally:
        for name in _NAMES:
            setattr(os, name, before[name])
        io.open = files
