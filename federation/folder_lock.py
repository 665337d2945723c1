"""One writer at a time in a folder: over the threads of a process, and over processes.

The kernel's lock (``flock``) lies where the files lie, and goes with the process that held it,
however that ends; a process that is only asleep keeps it, and so cannot wake up and write what is
out of date. On a network file system it is as good as that system's locks (NFS 4 has them).
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aggregation import durable

PATIENCE = 10.0  # seconds; what is done under such a lock takes milliseconds
_PAUSE = 0.005


class FolderLock:
    """A lock file; to be entered again by the thread that has it.

    Args:
        path: of the file, which stays there.
        patience: seconds to wait for another process.
    """

    def __init__(self, path: Path, patience: float = PATIENCE) -> None:
        self._path, self._patience = path, patience
        self._threads = threading.RLock()
        self._depth = 0

    @contextmanager
    def held(self, *, patience: float | None = None) -> Iterator[bool]:
        """While nobody else has it; says whether this is the outermost time.

        Raises:
            StorageError: another process does not let go of it, or the folder is not writable.
        """
        with self._threads:
            if self._depth:
                yield False
                return
            file = self._take(self._patience if patience is None else patience)
            self._depth += 1
            try:
                yield True
            finally:
                self._depth -= 1
                os.close(file)

    def _take(self, patience: float) -> int:
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise durable.storage_error(self._path, error) from error
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(_PAUSE)
                    continue
                os.close(file)
                raise durable.StorageError(
                    f"{self._path} has been held by another process for {patience:g} s: it writes"
                    " or hangs (fuser shows which it is); this is tried again"
                ) from None
            except OSError as error:
                os.close(file)
                raise durable.storage_error(self._path, error) from error
            return file
