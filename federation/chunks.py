"""Files of the repository as ready-made messages.

What costs a Python server is the message, not the byte; so each file is cut and serialised once,
and every download sends the same objects. Files never change under their name (consistent
snapshots), and the cache is keyed by modification time and size as well, so that a file which did
change on the disk is served as it now is: a device that gets it refuses it, and its refusal is the
alarm. Hiding or repairing it here would hide an attack; it is logged and counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from protos.generated import fleet_pb2 as pb

CHUNK = 224 * 1024  # bytes; each costs the server a turn, and a cut link or a stalled reader one
CACHE = 64 * 1024 * 1024  # bytes of all cached files
_HASHED = re.compile(r"([0-9a-f]{64})\.", re.ASCII)

log = logging.getLogger("airpeft.federation.chunks")


@dataclass(frozen=True)
class FileChunks:
    """One file, serialised: ``messages[i]`` carries the bytes from ``i * CHUNK`` on."""

    length: int
    messages: tuple[bytes, ...]

    def after(self, offset: int) -> Iterator[bytes]:
        """The messages from a byte on; the first one is cut to fit.

        >>> file = cut(b"x" * CHUNK + b"yz")
        >>> [pb.Chunk.FromString(message).data for message in file.after(CHUNK + 1)]
        [b'z']
        """
        if offset >= self.length:
            return
        index, skip = divmod(offset, CHUNK)
        if skip:
            data = pb.Chunk.FromString(self.messages[index]).data
            yield pb.Chunk(data=data[skip:]).SerializeToString()
            index += 1
        yield from self.messages[index:]


def cut(data: bytes) -> FileChunks:
    """Serialise a file's content."""
    view = memoryview(data)
    messages = (
        pb.Chunk(data=bytes(view[start : start + CHUNK])).SerializeToString()
        for start in range(0, len(data), CHUNK)
    )
    return FileChunks(len(data), tuple(messages))


class ChunkCache:
    """The most recently used files, up to a number of bytes.

    Args:
        locate: from an opaque path to the file, or the repository's not-found error.
        altered: told once per load of a payload whose content is not what its name says.
        limit: bytes; one file beyond it is still served, and dropped after the next.
    """

    def __init__(
        self, locate: Callable[[str], Path], altered: Callable[[], None], limit: int = CACHE
    ) -> None:
        self._locate = locate
        self._altered = altered
        self._limit = limit
        self._files: OrderedDict[tuple[str, int, int], FileChunks] = OrderedDict()
        self._loading = asyncio.Lock()

    async def get(self, path: str) -> FileChunks:
        """A file of the repository.

        Raises:
            NotFoundError: the repository offers no such file.
            OSError: the disk refused.
        """
        file = self._locate(path)
        stat = file.stat()
        key = (path, stat.st_mtime_ns, stat.st_size)
        if key not in self._files:
            async with self._loading:  # a new release is asked for by everybody at once
                if key not in self._files:
                    self._keep(key, await asyncio.to_thread(self._load, file))
        self._files.move_to_end(key)
        return self._files[key]

    def _load(self, file: Path) -> FileChunks:
        data = file.read_bytes()
        named = _HASHED.match(file.name)
        if named and hashlib.sha256(data).hexdigest() != named[1]:
            log.error("%s is not what its name says; devices will refuse it", file)
            self._altered()
        return cut(data)

    def _keep(self, key: tuple[str, int, int], chunks: FileChunks) -> None:
        self._files[key] = chunks
        total = sum(file.length for file in self._files.values())
        while total > self._limit and len(self._files) > 1:
            _, dropped = self._files.popitem(last=False)
            total -= dropped.length
