"""The newest metadata, serialised once for all, and how thousands of streams wait for newer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from protos.messages import MetadataBundle, to_wire


class Feed:
    """The newest metadata, and a way to wait for newer. For one event loop.

    Args:
        bundle: reads the newest, given the highest root that a device trusts.
    """

    def __init__(self, bundle: Callable[[int], MetadataBundle]) -> None:
        self._bundle = bundle
        self._ready: dict[int, bytes] = {}
        self.turn = 0  # counts the calls of wake
        self._waiting: set[asyncio.Future[None]] = set()
        self.closed = False
        self.version = 0  # of the timestamp in what was read last

    def current(self, root_version: int) -> bytes:
        """The serialised event; equal versions share one object."""
        files = self._ready.get(root_version)
        if files is None:
            if len(self._ready) >= 64:  # a device may claim any number
                self._ready.clear()
            bundle = self._bundle(root_version)
            self.version = _version_of(bundle)
            files = to_wire(bundle).SerializeToString()
            self._ready[root_version] = files
        return files

    def wake(self) -> None:
        """Something may have changed: let every waiting stream look."""
        self._ready.clear()
        self.turn += 1
        waiting, self._waiting = self._waiting, set()
        for one in waiting:
            _end(one)

    def close(self) -> None:
        """The server is about to stop: let every stream end."""
        self.closed = True
        self.wake()

    async def wait(self, turn: int, timeout: float) -> None:
        """Until the :meth:`wake` after ``turn`` was current, or for ``timeout`` seconds.

        Whoever takes :attr:`turn` before reading what is current misses nothing, however long the
        writing of it takes. Thousands wait here for hours: each holds one future and one timer.
        """
        if turn != self.turn:
            return
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(timeout, _end, waiter)
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiting.discard(waiter)


def _end(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _version_of(bundle: MetadataBundle) -> int:
    try:
        return int(json.loads(bundle.files["timestamp.json"])["signed"]["version"])
    except (KeyError, TypeError, ValueError):
        return 0
