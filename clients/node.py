"""What a node's own configuration says of its client: the table in :mod:`clients.client_app`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Message

from aggregation.adapter import Adapter
from aggregation.secret_ring import Ring
from clients.data import DataSource
from clients.errors import ClientError
from clients.memory import ClientMemory
from clients.secure_identity import SecureIdentity, of_node
from privacy.secure_session import SecureSumError
from protos import flower
from protos.flower import ClientFault
from protos.tasks import client_memory

if TYPE_CHECKING:
    from clients.trainer import SecureTrainer

RESIDENT = "resident"

_trainers: dict[tuple[str, ...], Any] = {}
_lock = threading.Lock()


class Unanswerable(ClientError):  # noqa: N818 - says what the request is
    """A request that this client answers with a fault."""

    def __init__(self, fault: ClientFault, detail: str) -> None:
        super().__init__(detail)
        self.fault = fault


def client_of(node: Mapping[str, Any]) -> str:
    """The client's stable name.

    Raises:
        Unanswerable: the node has no name to go by.
    """
    if "client" in node:
        return str(node["client"])
    if "partition-id" not in node:
        raise Unanswerable(
            ClientFault.BAD_TASK, "node_config has neither 'client' nor 'partition-id'"
        )
    return flower.client_name(int(node["partition-id"]))


def data_of(node: Mapping[str, Any], data_folder: str) -> DataSource:
    """Where the client's examples are.

    Raises:
        Unanswerable: nothing says where, or the file is missing.
    """
    columns = str(node.get("text", "text")), str(node.get("label", "label"))
    if "data" in node:
        return DataSource(Path(str(node["data"])), *columns)
    if not data_folder or "partition-id" not in node:
        raise Unanswerable(
            ClientFault.NO_DATA, "node_config has no 'data', and the task names no data folder"
        )
    path = flower.client_data(data_folder, int(node["partition-id"]))
    if not path.is_file():
        raise Unanswerable(ClientFault.NO_DATA, f"{path} is missing")
    return DataSource(path, *columns)


def memory_of(node: Mapping[str, Any], data_folder: str) -> Path:
    """Where it keeps things between rounds."""
    if "memory" in node:
        return Path(str(node["memory"]))
    if "ledger" in node or "data" in node:
        return ledger_of(node, data_folder).with_name("memory")
    return client_memory(data_folder)


def finder_of(message: Message, node: Mapping[str, Any]) -> Callable[[str], Adapter | None]:
    """Finds an adapter that this client was handed before, by its digest."""
    fields = message.content.config_records.get(flower.TASK, {})
    run, data_folder = str(fields.get("run", "")), str(fields.get("data-folder", ""))
    folder, client = memory_of(node, data_folder), client_of(node)
    return lambda digest: ClientMemory(folder, run, client).find(digest)


def ledger_of(node: Mapping[str, Any], data_folder: str) -> Path:
    """Its ledger."""
    if "ledger" in node:
        return Path(str(node["ledger"]))
    if "data" in node:
        return Path(str(node["data"])).parent / "ledger.sqlite"
    return flower.client_ledger(data_folder)


def trainer_of(node: Mapping[str, Any], base: str, data_folder: str) -> SecureTrainer:
    """The trainer: a process of its own, or the one of this process."""
    if "trainer-socket" in node:
        from clients.trainer_process import TrainerClient

        return TrainerClient(str(node["trainer-socket"]))
    name, threads = str(node.get("base", base)), int(node.get("threads", 1))
    return resident(name, ledger_of(node, data_folder), "data" in node, threads)


def resident(name: str, ledger: Path, own: bool, threads: int) -> SecureTrainer:
    """The trainer of this process for a base and a ledger; the model is loaded once.

    Raises:
        Unanswerable: the base is not on this device.
    """
    from clients.base import KNOWN_BASES, find_base
    from clients.trainer import ResidentTrainer
    from privacy.ledger import Ledger
    from privacy.randomness import device_key

    if own and name not in KNOWN_BASES and not Path(name).is_dir():
        raise Unanswerable(ClientFault.WRONG_BASE, f"the base {name!r} is not on this device")
    key = (name, str(ledger.absolute()), str(own), str(threads))
    with _lock:
        if key not in _trainers:
            secret = device_key(ledger.with_name(ledger.name + ".key")) if own else None
            base = find_base(name)
            # One run after the other in a process needs the base, and its hidden states, once.
            shared = [one.shelf for one in _trainers.values() if one.shelf.base == base]
            _trainers[key] = ResidentTrainer(
                base, Ledger(ledger), threads, device_key=secret, shelf=next(iter(shared), None)
            )
        trainer: SecureTrainer = _trainers[key]
        return trainer


def identity_of(node: Mapping[str, Any], data_folder: str, seed: int) -> SecureIdentity:
    """Who this client is in a secure sum.

    Raises:
        Unanswerable: if the process that holds its secrets would not live until the sum is done.
        RosterError: if the device has no identity or no roster.
    """
    if "trainer-socket" not in node and node.get("process") != RESIDENT:
        raise Unanswerable(
            ClientFault.TRAINER_UNAVAILABLE,
            "a secure sum takes several messages, between which its secrets stay in memory, and "
            "this process may end after each: start a clients.trainer_process, and give its socket "
            "as trainer-socket in the node_config",
        )
    simulated = flower.client_roster(data_folder) if data_folder and "data" not in node else None
    return of_node(node, client_of(node), simulated, seed)


def insist_on_sum(node: Mapping[str, Any], secure: bool) -> None:
    """Refuse to send in the clear what the device's owner wants to be summed.

    Args:
        node: see :func:`insist`.
        secure: whether what is asked for enters a secure sum.

    Raises:
        SecureSumError: if it does not, and the node has pinned a cohort for that.
    """
    if node.get("roster-digest") and not secure:
        raise SecureSumError(
            "the task asks for an update in the clear, and this device has pinned a roster for "
            "secure sums: run it with private = 'secure-sum', or take roster-digest out of the "
            "node_config"
        )


def insist(node: Mapping[str, Any], secure: Mapping[str, Any]) -> None:
    """Refuse a task that hides this client's update less than the device's owner wants it hidden.

    A server could else ask for an update in the clear, and every mask would be for nothing.

    Args:
        node: ``roster-digest``: whoever has pinned a cohort takes part in secure sums only;
            ``least-noise``: of the clients' own noise on the sum, over the clip; none for any.
        secure: the ring of the round's secure sum, as the task has it; empty without one.

    Raises:
        SecureSumError: if there is no sum, or it would have less noise than that.
    """
    insist_on_sum(node, bool(secure))
    if "least-noise" not in node:
        return
    least, noise = float(node["least-noise"]), Ring.from_mapping(secure).noise if secure else 0.0
    if not noise >= least:
        raise SecureSumError(
            f"the task asks for noise of {noise:g} times the clip on the sum, added by its "
            f"clients, and this device takes part from least-noise={least:g} on: raise the run's "
            "noise ([client_privacy], mechanism = 'distributed'), or lower it in the node_config"
        )
