r"""The resident trainer as a process of its own, on a Unix socket.

    python -m clients.trainer_process --socket /run/user/1000/trainer.sock --base minilm \
        --ledger ledger.sqlite --threads 1

Flower starts a fresh process for every message, and loading torch and a base model takes seconds;
this process loads them once. It answers one request per connection, one after the other, on its
main thread, so its results are those of a :class:`clients.trainer.ResidentTrainer` to the last bit.
The socket appears when the model is loaded and is open to its owner only.

:class:`TrainerClient` is the other side; it implements ``clients.trainer.Trainer``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from aggregation.adapter import Adapter
    from aggregation.update import Update
    from clients.data import DataSource, Examples
    from clients.faults import JobFailure
    from clients.trainer import Evaluation, ResidentTrainer
    from clients.training import ClientJob

REQUEST_SECONDS = 30.0  # for a request to arrive whole; training itself takes what it takes
MAX_SOCKET_PATH = 107  # sockaddr_un.sun_path, unix(7)

log = logging.getLogger("airpeft.clients.trainer_process")


class TrainerClient:
    """Speaks to a trainer process; a ``Trainer`` like any other.

    Args:
        path: the socket.
        timeout: seconds to wait for an answer; None for as long as it takes.
    """

    def __init__(self, path: Path | str, timeout: float | None = None) -> None:
        self.path = Path(path)
        self._timeout = timeout

    def train(self, jobs: Sequence[ClientJob]) -> list[Update | JobFailure]:
        """Train every job there.

        Raises:
            TrainerError: if the process cannot be reached or ended meanwhile.
        """
        from clients import trainer_wire as wire

        header = {"verb": "train", "jobs": [wire.job_header(job) for job in jobs]}
        answer, adapters = self._ask(header, [job.adapter for job in jobs])
        return wire.results_from(answer["results"], adapters)

    def evaluate(
        self, adapter: Adapter, data: Examples | DataSource, *, max_length: int = 32
    ) -> Evaluation:
        """Measure an adapter there.

        Raises:
            DataError, BaseMismatch: as in ``Trainer``.
            TrainerError: if the process cannot be reached or ended meanwhile.
        """
        from clients import trainer_wire as wire
        from clients.trainer import Evaluation

        header = {
            "verb": "evaluate",
            "data": wire.data_header(data),
            "max_length": max_length,
        }
        answer, _ = self._ask(header, [adapter])
        return Evaluation(answer["accuracy"], answer["loss"], answer["examples"])

    def wait_ready(self, seconds: float, alive: Callable[[], bool] = lambda: True) -> None:
        """Wait until the process has loaded its model.

        Args:
            seconds: how long at most.
            alive: whether the process still runs; asked between two tries.

        Raises:
            TrainerError: if it is not ready in time, or ended.
        """
        from clients.trainer_wire import TrainerError

        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(TrainerError):
                self._ask({"verb": "ping"}, [])
                return
            if not alive():
                raise TrainerError(f"{self.path}: the trainer process ended before it was ready")
            if time.monotonic() > deadline:
                raise TrainerError(f"{self.path}: the trainer was not ready within {seconds:.0f} s")
            time.sleep(0.05)

    def _ask(
        self, header: Mapping[str, Any], adapters: Sequence[Adapter]
    ) -> tuple[dict[str, Any], list[Adapter]]:
        from clients import trainer_wire as wire
        from clients.base import BaseMismatch
        from clients.data import DataError

        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self._timeout)
                connection.connect(str(self.path))
                wire.send(connection, header, adapters)
                answer, values = wire.receive(connection)
        except OSError as error:
            raise wire.TrainerError(
                f"{self.path}: no trainer answers ({error}); is the process running?"
            ) from error
        if "error" in answer:
            kinds = {"DataError": DataError, "BaseMismatch": BaseMismatch}
            raise kinds.get(answer["kind"], wire.TrainerError)(answer["error"])
        return answer, values


def serve(listener: socket.socket, trainer: ResidentTrainer) -> NoReturn:
    """Answer requests for ever, one at a time."""
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(REQUEST_SECONDS)
            try:
                _answer(connection, trainer)
            except OSError as error:
                # The other side went away; whatever was spent for it stays spent.
                log.warning("a request was lost: %s", error)


def _answer(connection: socket.socket, trainer: ResidentTrainer) -> None:
    from aggregation.errors import AggregationError
    from aggregation.update import Update
    from clients import trainer_wire as wire
    from clients.errors import ClientError
    from privacy.errors import PrivacyError

    try:
        header, adapters = wire.receive(connection)
        verb, out = header.get("verb"), list[Any]()
        if verb == "ping":
            answer: dict[str, Any] = {}
        elif verb == "train":
            pairs = zip(header["jobs"], adapters, strict=True)
            results = trainer.train([wire.job_from(h, a) for h, a in pairs])
            answer = {"results": [wire.result_header(r) for r in results]}
            out = [r.adapter for r in results if isinstance(r, Update)]
        elif verb == "evaluate":
            data = wire.data_from(header["data"])
            found = trainer.evaluate(adapters[0], data, max_length=int(header["max_length"]))
            answer = asdict(found)
        else:
            answer = {"error": f"unknown verb {verb!r}", "kind": "TrainerError"}
    except (ClientError, PrivacyError, AggregationError) as error:
        answer, out = {"error": str(error), "kind": type(error).__name__}, []
    except (KeyError, TypeError, ValueError, IndexError) as error:
        answer, out = {"error": f"a malformed request: {error!r}", "kind": "TrainerError"}, []
    wire.send(connection, answer, out)


def listen(path: Path) -> socket.socket:
    """A listening socket that only its owner may use; one left by a dead process is replaced.

    Raises:
        TrainerError: if another trainer listens there, or the path is too long or not writable.
    """
    from clients.trainer_wire import TrainerError

    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise TrainerError(
            f"{path}: a Unix socket's path may have {MAX_SOCKET_PATH} bytes; choose a shorter one"
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            raise TrainerError(f"{path}: another trainer already listens there")
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise TrainerError(f"{path}: cannot listen there: {error.strerror or error}") from error
    return listener


def end_with(parent: int) -> None:
    """End this process when another one ends, however it ends.

    Args:
        parent: its process id.
    """

    def watch(descriptor: int) -> None:
        select.select([descriptor], [], [])
        os._exit(0)  # the ledger needs no farewell: every spend is already durable

    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(0)
    threading.Thread(target=watch, args=(descriptor,), daemon=True, name="parent-watch").start()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a trainer process until it is ended; returns an exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m clients.trainer_process",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--socket", type=Path, required=True, help="path of the Unix socket")
    parser.add_argument("--base", default="minilm", help="name or folder of the base model")
    parser.add_argument("--ledger", type=Path, help="the privacy ledger; none: no record is kept")
    parser.add_argument("--threads", type=int, default=1, help="threads of the matrix kernels")
    parser.add_argument(
        "--device-key",
        type=Path,
        help="file of the device's secret; without it randomness comes from each job's seed",
    )
    parser.add_argument("--parent", type=int, help="end when the process with this id ends")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if options.parent is not None:
        end_with(options.parent)
    # Read by the libraries when they are imported below: no network, and no second thread pool.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    from aggregation.errors import AggregationError
    from clients.base import find_base
    from clients.errors import ClientError
    from clients.trainer import ResidentTrainer
    from privacy.errors import PrivacyError
    from privacy.ledger import Ledger
    from privacy.randomness import device_key

    try:
        trainer = ResidentTrainer(
            find_base(options.base),
            Ledger(options.ledger) if options.ledger else None,
            options.threads,
            device_key=device_key(options.device_key) if options.device_key else None,
        )
        listener = listen(options.socket)
    except (ClientError, PrivacyError, AggregationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    log.info("ready: base %s on %s", trainer.base.name, options.socket)
    try:
        with listener:
            serve(listener, trainer)
    except KeyboardInterrupt:
        return 130
    finally:
        options.socket.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
