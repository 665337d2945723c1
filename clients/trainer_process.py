r"""The resident trainer as a process of its own, on a Unix socket.

    python -m clients.trainer_process --socket /run/user/1000/trainer.sock --base minilm \
        --ledger ledger.sqlite --threads 1

Flower starts a fresh process for every message, and loading torch and a base model takes seconds;
this process loads them once. It answers one request per connection, one after the other, on its
main thread, so its results are those of a :class:`clients.trainer.ResidentTrainer` to the last bit.
The socket appears when the model is loaded and is open to its owner only. All randomness comes from
a secret beside the ledger; only with ``--simulated`` does it come from the seed of each job, which
whoever sent the job knows.

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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from aggregation.adapter import Adapter
    from aggregation.update import Update
    from clients.data import DataSource, Examples
    from clients.faults import JobFailure
    from clients.secure_desk import SecureRequest
    from clients.trainer import Evaluation, ResidentTrainer
    from clients.trainer_wire import Frame
    from clients.training import ClientJob, Owner

REQUEST_SECONDS = 30.0  # for a request to arrive whole; training itself takes what it takes
# Which of these it was is for the log of that process.
_SECURE_SUM_ERRORS = ("SecureSumError", "SecureSumAborted", "RosterError", "IdentityError")
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
        from clients import trainer_headers as headers

        return headers.results_from(self._ask(headers.jobs_frame(jobs)))

    def evaluate(
        self,
        adapter: Adapter,
        data: Examples | DataSource,
        *,
        max_length: int = 32,
        beside: Sequence[Adapter] = (),
        owner: Owner | None = None,
    ) -> Evaluation:
        """Measure an adapter there; arguments as in ``Trainer``.

        Raises:
            DataError, BaseMismatch, BudgetExceeded: as in ``Trainer``.
            TrainerError: if the process cannot be reached or ended meanwhile.
        """
        from clients import trainer_headers as headers
        from clients.trainer import Evaluation

        frame = headers.evaluation_frame(adapter, data, max_length, beside, owner)
        answer = self._ask(frame).header
        return Evaluation(answer["accuracy"], answer["loss"], answer["examples"])

    def secure(self, request: SecureRequest) -> dict[str, bytes]:
        """One step of a secure sum there; as in ``SecureTrainer``.

        Raises:
            SecureSumError: as in ``SecureTrainer``.
            TrainerError: if the process cannot be reached or ended meanwhile.
        """
        from clients import trainer_headers as headers

        return headers.named_from(self._ask(headers.secure_frame(request)))

    def wait_ready(self, seconds: float, alive: Callable[[], bool] = lambda: True) -> None:
        """Wait until the process has loaded its model.

        Args:
            seconds: how long at most.
            alive: whether the process still runs; asked between two tries.

        Raises:
            TrainerError: if it is not ready in time, or ended.
        """
        from clients.trainer_wire import Frame, TrainerError

        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(TrainerError):
                self._ask(Frame({"verb": "ping"}))
                return
            if not alive():
                raise TrainerError(f"{self.path}: the trainer process ended before it was ready")
            if time.monotonic() > deadline:
                raise TrainerError(f"{self.path}: the trainer was not ready within {seconds:.0f} s")
            time.sleep(0.05)

    def _ask(self, frame: Frame) -> Frame:
        from clients import trainer_wire as wire
        from clients.base import BaseMismatch
        from clients.data import DataError
        from privacy.budget import BudgetExceeded
        from privacy.secure_session import SecureSumError

        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self._timeout)
                connection.connect(str(self.path))
                wire.send(connection, frame)
                answer = wire.receive(connection)
        except OSError as error:
            raise wire.TrainerError(
                f"{self.path}: no trainer answers ({error}); is the process running?"
            ) from error
        if "error" in answer.header:
            kinds: dict[str, type[Exception]] = {
                "DataError": DataError,
                "BaseMismatch": BaseMismatch,
                "BudgetExceeded": BudgetExceeded,
            }
            kinds |= dict.fromkeys(_SECURE_SUM_ERRORS, SecureSumError)
            kind = kinds.get(answer.header["kind"], wire.TrainerError)
            raise kind(answer.header["error"])
        return answer


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
    from clients import trainer_headers as headers
    from clients import trainer_wire as wire
    from clients.errors import ClientError
    from privacy.errors import PrivacyError

    try:
        frame = wire.receive(connection)
        verb = frame.header.get("verb")
        if verb == "ping":
            answer = wire.Frame({})
        elif verb == "train":
            answer = headers.results_frame(trainer.train(headers.jobs_from(frame)))
        elif verb == "evaluate":
            adapter, data, length, beside, owner = headers.evaluation_from(frame)
            found = trainer.evaluate(adapter, data, max_length=length, beside=beside, owner=owner)
            answer = wire.Frame(asdict(found))
        elif verb == "secure":
            answer = headers.named_frame(trainer.secure(headers.secure_from(frame)))
        else:
            answer = wire.Frame({"error": f"unknown verb {verb!r}", "kind": "TrainerError"})
    except (ClientError, PrivacyError, AggregationError) as error:
        answer = wire.Frame({"error": str(error), "kind": type(error).__name__})
    except (KeyError, TypeError, ValueError, IndexError) as error:
        what = f"a malformed request: {error!r}"
        answer = wire.Frame({"error": what, "kind": "TrainerError"})
    wire.send(connection, answer)


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


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ``device_key`` is None for simulations only, and never for want of asking."""
    parser = argparse.ArgumentParser(
        prog="python -m clients.trainer_process",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--socket", type=Path, required=True, help="path of the Unix socket")
    parser.add_argument("--base", default="minilm", help="name or folder of the base model")
    parser.add_argument("--ledger", type=Path, help="the privacy ledger; needed by real devices")
    parser.add_argument("--threads", type=int, default=1, help="threads of the matrix kernels")
    randomness = parser.add_mutually_exclusive_group()
    randomness.add_argument(
        "--device-key", type=Path, help="file of the device's secret; else it is beside the ledger"
    )
    randomness.add_argument(
        "--simulated",
        action="store_true",
        help="randomness from each job's seed: it can be repeated, and protects nobody",
    )
    parser.add_argument("--parent", type=int, help="end when the process with this id ends")
    options = parser.parse_args(arguments)
    if not (options.ledger or options.simulated):
        parser.error(
            "--ledger is missing: what a device spends has to be recorded, and its secret lies "
            "beside it; or give --simulated"
        )
    if not (options.device_key or options.simulated):
        options.device_key = options.ledger.with_name(options.ledger.name + ".key")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a trainer process until it is ended; returns an exit status."""
    options = parsed(arguments)
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
