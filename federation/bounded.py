"""Reading a file that somebody else has brought: an ordinary one, of at most so many bytes."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_bounded(path: Path, most: int) -> bytes:
    """A file's bytes; a pipe does not hold the reader, and a giant does not fill its memory.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        OSError: it can't be read, is no ordinary file, or has more bytes; ``strerror`` says which.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "it is not an ordinary file", str(path))
        data = stream.read(most + 1) if about.st_size <= most else b""
    if about.st_size > most or len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return data
