"""A secure sum of 100 clients x 0.5 million values, against a plain sum and Flower's SecAgg+.

Run: ``python benchmarks/secure_sum.py``; a minute or two, nearly all of it Flower's. CPU seconds of
one process, clients and server apart. Both protocols run as a whole on the same arrays, with every
client a neighbour of every other, a threshold of two thirds, and a tenth of the clients dropping
out after they have shared their secrets. Flower's cost grows with the square of the clients, so
the two are compared on the first 30 arrays; ``--flower-clients 100`` takes all, in five minutes.

Flower's protocol exists for its legacy interface only: its own workflow and its own client mod run
here, with a grid between them that calls the one for the other. Ours signs keys and lists of
survivors, and checks the signatures, which Flower's does not.
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.compat.common import recorddict_compat as compat
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.server import LegacyContext, ServerConfig, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.supercore.task_identity import TaskIdentity

from aggregation.secret_ring import Ring
from aggregation.secure_pieces import counted_on
from privacy.discrete_gaussian import discrete_gaussian
from privacy.randomness import Stream
from privacy.secure_sum import MaskedVector, SecureClient, SecureServer, Session

Floats = npt.NDArray[np.float32]
Arrays = Mapping[str, Floats]


def cpu() -> float:
    """CPU seconds of this process so far."""
    return time.process_time()


class Split:
    """CPU seconds of the two sides, and of what carries messages between them."""

    def __init__(self) -> None:
        self.seconds = {"client": 0.0, "server": 0.0, "wire": 0.0}
        self._last = cpu()

    def to(self, side: str) -> None:
        """What was spent since the last call belongs to this side."""
        now = cpu()
        self.seconds[side] += now - self._last
        self._last = now


def ours(arrays: Arrays, dropped: set[str]) -> tuple[npt.NDArray[np.float64], Split, Session]:
    """The whole protocol; gives the mean of those who have sent."""
    identities = {name: ec.generate_private_key(ec.SECP256R1()) for name in arrays}

    def verify(name: str, message: bytes, signature: bytes) -> bool:
        try:
            identities[name].public_key().verify(signature, message, ec.ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True

    def signer(key: ec.EllipticCurvePrivateKey) -> Callable[[bytes], bytes]:
        return lambda message: key.sign(message, ec.ECDSA(SHA256()))

    ring = Ring(clip=1.0, clients=len(arrays), equal=True)
    length = next(iter(arrays.values())).size
    session = Session.of("benchmark", 1, tuple(arrays), length=length)
    split = Split()
    clients = {
        name: SecureClient(session, name, sign=signer(key), verify=verify)
        for name, key in identities.items()
    }
    advertised = [client.advertise() for client in clients.values()]
    split.to("client")
    server = SecureServer(session)
    keys = server.keys(advertised)
    split.to("server")
    sealed = [clients[name].share(keys[name]) for name in keys]
    split.to("client")
    pieces = server.pieces(sealed)
    split.to("server")
    for name in pieces.keys() - dropped:
        sent = ring.to_bytes(clients[name].mask(ring.numbers(arrays[name]), pieces[name]).values)
        split.to("client")
        server.add(MaskedVector(name, ring.from_bytes(sent, length)))
        split.to("server")
    survivors = server.survivors()
    split.to("server")
    said = [clients[name].confirm(survivors) for name in survivors]
    split.to("client")
    confirmed = server.confirmations(said)
    split.to("server")
    revealed = [clients[name].reveal(confirmed[name]) for name in survivors]
    split.to("client")
    mean = ring.sums(server.total(revealed), len(survivors)) / len(survivors)
    split.to("server")
    return mean, split, session


class Between:
    """A grid for Flower's workflow that calls Flower's mod; drop-outs send no vector."""

    def __init__(self, arrays: Arrays, dropped: set[str]) -> None:
        self.split = Split()
        self._arrays = list(arrays.values())
        self._lost = {n for n, name in enumerate(arrays, start=1) if name in dropped}
        self._contexts = {
            node: Context(1, node, {}, RecordDict(), {}) for node in range(1, len(arrays) + 1)
        }
        self._calls = 0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Each message through the mod of its client."""
        self.split.to("server")
        self._calls += 1
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            if self._calls >= 3 and node in self._lost:
                continue
            self.split.to("server")
            # What goes to several is one object, and the mod takes it apart.
            proto = message_to_proto(message).SerializeToString()
            copy = message_from_proto(ProtoMessage.FromString(proto))
            self.split.to("wire")
            replies.append(secaggplus_mod(copy, self._contexts[node], self._trained))
            self.split.to("client")
        return replies

    def _trained(self, message: Message, context: Context) -> Message:
        array = self._arrays[context.node_id - 1]
        parameters = ndarrays_to_parameters([array])
        result = FitRes(Status(Code.OK, ""), parameters, 1, {})
        return Message(compat.fitres_to_recorddict(result, False), reply_to=message)


class Everybody(FedAvg):  # type: ignore[misc]  # flwr is untyped here
    """FedAvg that draws all clients, and leaves the mean as the workflow gives it."""

    mean: npt.NDArray[np.float64]

    def configure_fit(self, server_round, parameters, client_manager):  # type: ignore[no-untyped-def]
        """Every client, in order."""
        known = client_manager.all()
        return [(known[key], FitIns(parameters, {})) for key in sorted(known, key=int)]

    def aggregate_fit(self, server_round, results, failures):  # type: ignore[no-untyped-def]
        """What was unmasked."""
        from flwr.common import parameters_to_ndarrays

        self.mean = parameters_to_ndarrays(results[0][1].parameters)[0]
        return None, {}


def flower(arrays: Arrays, dropped: set[str]) -> tuple[npt.NDArray[np.float64], Split]:
    """Flower's whole protocol; gives the mean of those who have sent."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 0, SUPERLINK_NODE_ID
    grid, manager, strategy = Between(arrays, dropped), SimpleClientManager(), Everybody()
    for node in range(1, len(arrays) + 1):
        manager.register(GridClientProxy(node, grid, 1))
    context = LegacyContext(
        Context(1, SUPERLINK_NODE_ID, {}, RecordDict(), {}), ServerConfig(), strategy, manager
    )
    context.state[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    context.state[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(
        Parameters([], "numpy.ndarray"), False
    )
    assert isinstance(context.state[MAIN_PARAMS_RECORD], ArrayRecord)
    workflow = SecAggPlusWorkflow(1.0, 2 / 3, max_weight=1.0, clipping_range=1.0)
    workflow(grid, context)
    grid.split.to("server")
    return strategy.mean, grid.split


def share_of_noise(count: int, length: int) -> float:
    """CPU seconds of one client's share of discrete Gaussian noise."""
    least, honest = counted_on(count, 0.3, 0.1)
    ring = Ring(1.001, count, equal=True, norm=1.0, noise=1.0, least=least, honest=honest)
    began = cpu()
    discrete_gaussian(Stream(bytes(32)), ring.share, length)
    return cpu() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--values", type=int, default=500_000)
    parser.add_argument("--flower-clients", type=int, default=30)
    asked = parser.parse_args()
    arrays = {
        f"client-{i:05d}": np.random.default_rng(i).uniform(-1, 1, asked.values).astype(np.float32)
        for i in range(asked.clients)
    }
    dropped, exact, bare = plain(arrays)
    print(f"{asked.clients} clients x {asked.values:,} values, {len(dropped)} drop out before "
          "sending; 4 bytes a value go up")  # fmt: skip
    print(f"plain sum    server {bare:8.3f} CPU s")
    mine = measured(arrays)
    print(f"against plain: server {mine['server'] / bare:.0f}x")
    noise = share_of_noise(asked.clients, asked.values)
    print(f"a share of discrete Gaussian noise: {noise:.3f} CPU s a client, "
          f"{noise / mine['client']:.0%} of its part in the sum", flush=True)  # fmt: skip
    few = dict(list(arrays.items())[: asked.flower_clients])
    dropped, exact, _ = plain(few)
    print(f"\n{len(few)} of the clients, {len(dropped)} drop out before sending")
    mine = measured(few)
    mean, split = flower(few, dropped)
    theirs = _print("Flower's", split, len(few), float(np.abs(mean - exact).max()))
    print(f"against Flower: server {theirs['server'] / mine['server']:.1f}x faster, "
          f"client {theirs['client'] / mine['client']:.1f}x faster")  # fmt: skip
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of the process, all arrays included: {megabytes:.0f} MB")


def plain(arrays: Arrays) -> tuple[set[str], npt.NDArray[np.float64], float]:
    """Who drops out, the mean of the others, and the CPU seconds that it took."""
    dropped = set(list(arrays)[len(arrays) - len(arrays) // 10 :])
    kept = [name for name in arrays if name not in dropped]
    began, exact = cpu(), np.zeros(next(iter(arrays.values())).size)
    for name in kept:
        exact += arrays[name]
    return dropped, exact / len(kept), cpu() - began


def measured(arrays: Arrays) -> dict[str, float]:
    """Our protocol: checked, and a line printed."""
    dropped, exact, _ = plain(arrays)
    mean, split, _ = ours(arrays, dropped)
    kept = len(arrays) - len(dropped)
    error = float(np.abs(mean - exact).max())
    bound = Ring(clip=1.0, clients=len(arrays), equal=True).bound(kept, float(kept))
    assert error <= bound, "the secure sum is not the sum"
    return _print("secure sum", split, len(arrays), error)


def _print(name: str, split: Split, count: int, error: float) -> dict[str, float]:
    """A line; gives the seconds of the server, and of one client."""
    one, server = split.seconds["client"] / count, split.seconds["server"]
    print(f"{name:12} server {server:8.3f} CPU s   one client {one:7.3f} CPU s   "
          f"largest error {error:.1e}")  # fmt: skip
    return {"client": one, "server": server}


if __name__ == "__main__":
    main()
