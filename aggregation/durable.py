"""Writes that are either wholly on the disk or not there at all.

The order is always the same: write beside the target, fsync the file, rename over the target,
fsync the folder (POSIX.1-2024, rename: atomic with respect to other openers). A kill between any
two steps leaves the old content, plus at most one ``*.partial`` that the next write replaces.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from aggregation.errors import AggregationError

PARTIAL = ".partial"


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
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(partial, data, mode)
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise storage_error(path, error) from error


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder with these files appear at once.

    A folder already at ``path`` is replaced; a kill between removing the old one and renaming the
    new one leaves the new one complete under ``<name>.partial``.

    Args:
        path: the folder.
        files: content by file name; names may contain ``/`` for sub-folders.

    Raises:
        StorageError: as for :func:`write_bytes`.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        for name, data in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            _write(partial / name, data, 0o644)
        for folder, _, _ in os.walk(partial):
            sync_folder(Path(folder))
        if path.exists():
            shutil.rmtree(path)
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise storage_error(path, error) from error


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
        errno.EACCES: "the folder is not writable: change its permissions or choose another",
        errno.EPERM: "the folder is not writable: change its permissions or choose another",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.ENOTDIR: "a part of the path is a file: choose another folder",
    }.get(error.errno or 0, error.strerror or str(error))
    return StorageError(f"cannot write {path}: {remedy}")


def _write(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
