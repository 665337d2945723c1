"""Resident trainers as child processes: one for each lane of the local grid.

A worker ends with the process that started it, even if that one is killed: it watches its parent.
A worker that died, or in which a client is stuck, is started anew before it is next used.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from clients.errors import ClientError
from clients.trainer_process import TrainerClient
from simulations.grid import GridError

if TYPE_CHECKING:
    from aggregation.adapter import Adapter
    from aggregation.update import Update
    from clients.data import DataSource, Examples
    from clients.faults import JobFailure
    from clients.trainer import Evaluation
    from clients.training import ClientJob, Owner

READY_SECONDS = 180.0
STOP_SECONDS = 5.0
THREADS = 1  # in each worker: several fight over the cores, and the last bit depends on it

_log = logging.getLogger("airpeft.simulations.workers")


class TrainerWorker:
    """One trainer process.

    Args:
        number: which one, for its log.
        base: name of the base model.
        ledger: the ledger that the simulated clients share.
        sockets: folder for its socket; short, for a Unix socket's path may have 107 bytes.
        logs: folder for its output.
    """

    def __init__(self, number: int, base: str, ledger: Path, sockets: Path, logs: Path) -> None:
        self.socket = sockets / f"{number}.sock"
        self._log_file = logs / f"worker-{number}.log"
        self._command = [
            *(sys.executable, "-m", "clients.trainer_process"),
            *("--socket", str(self.socket), "--base", base, "--ledger", str(ledger)),
            *("--threads", str(THREADS), "--parent", str(os.getpid()), "--simulated"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def node_config(self) -> Mapping[str, str]:
        """Tells the ClientApp where its trainer listens."""
        return {"trainer-socket": str(self.socket)}

    def start(self) -> None:
        """Start the process; :meth:`ensure` waits until it is ready."""
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)  # of a process that was killed
        with self._log_file.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
                # Ctrl-C reaches a terminal's whole group; workers are stopped by us, in our order.
                start_new_session=True,
            )

    def ensure(self) -> None:
        """Start it if it does not run, and wait until it answers.

        Raises:
            GridError: if it cannot be started; the message ends with what it said.
        """
        if self._process is not None and self._process.poll() is None and self.socket.exists():
            return
        if self._process is None or self._process.poll() is not None:
            self.start()
        process = self._process
        assert process is not None  # noqa: S101 - start() has set it
        try:
            TrainerClient(self.socket).wait_ready(
                READY_SECONDS, alive=lambda: process.poll() is None
            )
        except ClientError as error:
            said = self._log_file.read_text(errors="replace").splitlines()[-4:]
            raise GridError("\n".join([str(error), *said])) from error

    def abandon(self) -> None:
        """Kill it: a client is stuck in it."""
        _log.warning("%s is killed: a client in it did not come back in time", self.socket.name)
        self.stop(grace=0.0)

    def stop(self, grace: float = STOP_SECONDS) -> None:
        """End it; asked first, killed after ``grace`` seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        if grace:
            process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self.socket.unlink(missing_ok=True)


class WorkerTrainer:
    """A ``Trainer`` that has its work done by a worker, which is started anew if it has died."""

    def __init__(self, worker: TrainerWorker) -> None:
        self._worker = worker
        self._client = TrainerClient(worker.socket)

    def train(self, jobs: Sequence[ClientJob]) -> list[Update | JobFailure]:
        """Train jobs there."""
        self._worker.ensure()
        return self._client.train(jobs)

    def evaluate(
        self,
        adapter: Adapter,
        data: Examples | DataSource,
        *,
        max_length: int = 32,
        beside: Sequence[Adapter] = (),
        owner: Owner | None = None,
    ) -> Evaluation:
        """Measure an adapter there."""
        self._worker.ensure()
        return self._client.evaluate(
            adapter, data, max_length=max_length, beside=beside, owner=owner
        )


@contextmanager
def pool(count: int, base: str, ledger: Path, logs: Path) -> Iterator[list[TrainerWorker]]:
    """Workers that are started together and stopped together, whatever happens between.

    Args:
        count: how many.
        base: name of the base model.
        ledger: the ledger that the simulated clients share.
        logs: folder for their output.
    """
    with tempfile.TemporaryDirectory(prefix="airpeft-") as sockets:
        workers = [TrainerWorker(i, base, ledger, Path(sockets), logs) for i in range(count)]
        try:
            for worker in workers:
                worker.start()
            yield workers
        finally:
            for worker in workers:
                worker.stop()
