"""Starts the real programs of the product as child processes, and leaves none behind.

Every child asks the kernel for SIGTERM when its parent dies (prctl(2), PR_SET_PDEATHSIG), so that
even a kill -9 of the parent stops it; that request is bound to the *thread* that started the
child, which is why :meth:`Children.start` refuses to run outside the main thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from simulations.errors import SimulationError

T = TypeVar("T")

_log = logging.getLogger("airpeft.simulations.processes")
_LAUNCH = (
    "import ctypes, os, signal, sys\n"
    "parent = int(sys.argv[1])\n"
    "ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))\n"
    "if os.getppid() != parent: sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class ProcessError(SimulationError):
    """A child that did not start, or ended when it should run; names its log."""


@dataclass
class Child:
    """One running program.

    Attributes:
        name: what people call it.
        process: the handle.
        log: file with its output.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def tail(self, lines: int = 8) -> str:
        """The last lines of its log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def kill(self) -> None:
        """End it at once, as a power cut would (SIGKILL)."""
        self.process.kill()
        self.process.wait()


@dataclass
class Children:
    """The programs that one run has started; a context manager that stops them all.

    Args:
        logs: folder for their output.
        environment: variables added to this process's own.
    """

    logs: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    _all: list[Child] = field(default_factory=list)

    def start(self, name: str, arguments: Sequence[str]) -> Child:
        """Start ``airpeft ARGUMENTS`` under this interpreter.

        Raises:
            ProcessError: outside the main thread, or if the program cannot be started.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ProcessError("children are started from the main thread only")
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{name}.log"
        command = [sys.executable, "-c", _LAUNCH, str(os.getpid())]
        command += [sys.executable, "-m", "airpeft", *arguments]
        with log.open("ab") as output:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self.environment},
                    # Ctrl-C reaches the terminal's whole group; we stop children in our order.
                    start_new_session=True,
                )
            except OSError as error:
                raise ProcessError(f"{name}: cannot be started: {error.strerror}") from error
        child = Child(name, process, log)
        self._all.append(child)
        return child

    def check(self) -> None:
        """Raises ProcessError if a child has ended by itself with an error."""
        for child in self._all:
            code = child.process.poll()
            if code not in (None, 0, -signal.SIGKILL, -signal.SIGTERM):
                raise ProcessError(
                    f"{child.name} ended with status {code}; {child.log} ends:\n{child.tail()}"
                )

    def stop(self, grace: float = 5.0) -> None:
        """Ask every child to end, wait up to ``grace`` seconds, then end it."""
        for child in reversed(self._all):
            if child.running:
                with contextlib.suppress(ProcessLookupError):
                    child.process.terminate()
        deadline = time.monotonic() + grace
        for child in reversed(self._all):
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.warning("%s did not end in %.0f s and was killed", child.name, grace)
                child.kill()
        self._all.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def wait_for(
    what: str,
    probe: Callable[[], T | None],
    *,
    seconds: float = 180.0,
    every: float = 0.05,
    check: Callable[[], None] = lambda: None,
) -> T:
    """Call ``probe`` until it gives something.

    Args:
        what: named in the error.
        probe: returns None as long as there is nothing yet.
        seconds: deadline.
        every: pause between two probes, in seconds.
        check: called between probes; may raise to end the wait early.

    Raises:
        ProcessError: at the deadline.
    """
    deadline = time.monotonic() + seconds
    while (found := probe()) is None:
        check()
        if time.monotonic() > deadline:
            raise ProcessError(f"waited {seconds:.0f} s for {what}, in vain")
        time.sleep(every)
    return found


PORTS = ("fleet", "enrol", "api")  # of a server, as its endpoints.json calls them


def hold_port(port: int) -> socket.socket:
    """Keep a port of a server that has ended for the one that takes its place.

    The kernel hands out free ports to whoever asks for any, and a client would find a stranger
    there. Bound and not listening, the port is nobody's: connections are refused, and a server
    that asks for this very port, as all do that set ``SO_REUSEADDR``, gets it.

    Returns:
        what holds it; closed, it is free.
    """
    holder = socket.socket()
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", port))
    except OSError:
        holder.close()
        raise
    return holder


def read_json(path: Path) -> Any | None:
    """Content of a JSON file that another process writes; None as long as it is absent."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
