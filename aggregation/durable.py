"""Writes that are either wholly on the disk or not there at all.

The order is always the same: write beside the target, fsync the file, rename over the target,
fsync the folder (POSIX.1-2024, rename: atomic with respect to other openers). A kill between any
two steps leaves the old content or the new, plus at most one ``*.partial`` (and ``*.old`` for a
folder) that the next write removes.

A folder cannot be renamed over another. Where the kernel can exchange two names in one step
(Linux, ``renameat2``), readers see the old folder or the new one at every moment. Elsewhere the old
one is moved aside first; :func:`recover_folder` closes that gap after a kill, and every write calls
it. There must be one writer per path at a time.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from aggregation.errors import AggregationError

PARTIAL = ".partial"
OLD = ".old"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class StorageError(AggregationError):
    """A write that did not reach the disk; nothing at the target has changed."""


def write_bytes(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace one file, durably.

    Args:
        path: the target; its folder is made if it is missing.
        data: the whole content.
        mode: permission bits of a new file.

    Raises:
        StorageError: disk full, folder not writable, and the like; the old content is still there.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        make_folder(path.parent)
        _write(partial, data, mode)
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        _quietly(partial.unlink)
        raise storage_error(path, error) from error


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder with exactly these files appear at once; an old one is replaced.

    Args:
        path: the folder.
        files: content by file name; names may contain ``/`` for sub-folders.

    Raises:
        StorageError: as for :func:`write_bytes`.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        make_folder(path.parent)
        recover_folder(path)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        for name, data in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            _write(partial / name, data, 0o644)
        for folder, _, _ in os.walk(partial):
            sync_folder(Path(folder))
        sync_folder(path.parent)
        _swap_in(partial, path)
    except OSError as error:
        _quietly(lambda: recover_folder(path))
        shutil.rmtree(partial, ignore_errors=True)
        raise storage_error(path, error) from error


def recover_folder(path: Path) -> None:
    """Finish a replacement that a kill interrupted, so that ``path`` is the old or the new folder.

    Call it before reading a folder that :func:`write_folder` may have been writing; without an
    interrupted write it does nothing.
    """
    old, partial = path.with_name(path.name + OLD), path.with_name(path.name + PARTIAL)
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old)
        return
    # The old folder is moved aside only after the new one is wholly on the disk.
    (partial if partial.exists() else old).replace(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, with their names durable."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(path: Path, error: OSError) -> StorageError:
    """The error with its remedy, by errno."""
    remedy = {
        errno.ENOSPC: "the disk is full: free some space, then run the same command again",
        errno.EDQUOT: "the disk quota is used up: free some space, then run the same command again",
        errno.EFBIG: "the file is larger than this process may write: raise the limit (ulimit -f)",
        errno.EACCES: "the folder is not writable: change its permissions or choose another",
        errno.EPERM: "the folder is not writable: change its permissions or choose another",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.ENOTDIR: "a part of the path is a file: choose another folder",
        errno.EISDIR: "there is a folder where a file should be: remove it or choose another name",
    }.get(error.errno or 0, error.strerror or str(error))
    return StorageError(f"cannot write {path}: {remedy}")


def _swap_in(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.replace(path)
        sync_folder(path.parent)
        return
    if exchange(partial, path):
        sync_folder(path.parent)
        shutil.rmtree(partial, ignore_errors=True)
        return
    old = path.with_name(path.name + OLD)
    path.replace(old)
    partial.replace(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False, with nothing changed, where the system cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    return bool(
        rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0
    )


@functools.cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_uint,
    ]
    function.restype = ctypes.c_int
    return function


def _write(path: Path, data: bytes, mode: int) -> None:
    with os.fdopen(_made_anew(path, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _made_anew(path: Path, mode: int) -> int:
    """A new file, open for writing; what lies there under its name is never written to.

    That may be what a kill has left, with other permissions, or a link that somebody has put on a
    stick, or into a folder that was brought here, to have another file overwritten.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags, mode)
    except FileExistsError:
        path.unlink()
        return os.open(path, flags, mode)


def _quietly(action: Callable[[], object]) -> None:
    """Clean up after an error, whose own report matters more than the cleaning's."""
    try:
        action()
    except OSError:
        return
