"""The lanes of the local grid: each handles one message at a time, with a worker of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message


class Worker(Protocol):
    """What a lane's clients train with, such as a process; started and stopped by its owner."""

    def node_config(self) -> Mapping[str, str]:
        """What each client on the lane finds in its ``Context.node_config``."""

    def ensure(self) -> None:
        """Start it if it is not running; called before each use, from the grid's own thread."""

    def abandon(self) -> None:
        """A client is stuck in it: end it at once."""


class InProcess:
    """No worker: the ClientApp trains in this process."""

    def node_config(self) -> Mapping[str, str]:
        """That the process lives on between two messages."""
        return {"process": "resident"}

    def ensure(self) -> None:
        """Always running."""

    def abandon(self) -> None:
        """A thread can't be ended; it is left to itself."""


@dataclass
class Lane:
    """A thread that handles one message at a time.

    Attributes:
        worker: what its clients train with.
        handle: answers a message, with the worker's ``node_config``.
    """

    worker: Worker
    handle: Callable[[Message, Mapping[str, str]], Message]
    _jobs: queue.SimpleQueue[tuple[Future[Message], Message] | None] = field(
        default_factory=queue.SimpleQueue
    )
    _closed: bool = False

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._work, name="airpeft-lane", daemon=True)
        self._thread.start()

    def submit(self, request: Message) -> Future[Message]:
        """Put a message in the queue; the reply comes as the future's result."""
        self.worker.ensure()
        future: Future[Message] = Future()
        self._jobs.put((future, request))
        return future

    def close(self, seconds: float = 0.0) -> None:
        """Do nothing more; wait so long for the client that is at work."""
        self._closed = True
        self._jobs.put(None)
        if seconds:
            self._thread.join(seconds)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, request = job
            if self._closed:
                future.cancel()
            if future.set_running_or_notify_cancel():
                future.set_result(self.handle(request, self.worker.node_config()))
