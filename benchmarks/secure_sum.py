"""A secure sum of 100 clients x 0.5 million values, against a plain sum and Flower's SecAgg+.

Run: ``python benchmarks/secure_sum.py``. CPU seconds of one process, clients and server apart.
Flower's protocol exists for its legacy interface only; here its own functions do the same work on
the same arrays: quantise, one pseudo-random mask for each of 99 neighbours and one of its own, and
the sum (key agreement and sharing are left out, in its favour; measured on three clients). The
protocol of this package runs as a whole, drop-outs included.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from privacy.secure_sum import SecureClient, SecureServer, Session

CLIENTS, LENGTH, DROPPED = 100, 500_000, 10
RING = 1 << 32


def cpu() -> float:
    """CPU seconds of this process so far."""
    return time.process_time()


class Split:
    """CPU seconds of the two sides."""

    def __init__(self) -> None:
        self.seconds = {"client": 0.0, "server": 0.0}
        self._last = cpu()

    def to(self, side: str) -> None:
        """What was spent since the last call belongs to this side."""
        now = cpu()
        self.seconds[side] += now - self._last
        self._last = now


def ours(vectors: dict[str, np.ndarray]) -> tuple[np.ndarray, Split, Session]:
    """The whole protocol; the last ``DROPPED`` members vanish before they send their vectors."""
    identities = {name: ec.generate_private_key(ec.SECP256R1()) for name in vectors}

    def verify(name: str, message: bytes, signature: bytes) -> bool:
        try:
            identities[name].public_key().verify(signature, message, ec.ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True

    def signer(key: ec.EllipticCurvePrivateKey) -> Callable[[bytes], bytes]:
        return lambda message: key.sign(message, ec.ECDSA(SHA256()))

    session = Session.of("benchmark", 1, tuple(vectors), length=LENGTH)
    clients = {
        name: SecureClient(session, name, sign=signer(key), verify=verify)
        for name, key in identities.items()
    }
    server, split = SecureServer(session), Split()
    advertised = [client.advertise() for client in clients.values()]
    split.to("client")
    keys = server.keys(advertised)
    split.to("server")
    sealed = [clients[name].share(keys[name]) for name in keys]
    split.to("client")
    pieces = server.pieces(sealed)
    split.to("server")
    for name in list(pieces)[: CLIENTS - DROPPED]:
        masked = clients[name].mask(vectors[name], pieces[name])
        split.to("client")
        server.add(masked)
        split.to("server")
    survivors = server.survivors()
    split.to("server")
    said = [clients[name].confirm(survivors) for name in survivors]
    split.to("client")
    confirmed = server.confirmations(said)
    split.to("server")
    revealed = [clients[name].reveal(confirmed[name]) for name in survivors]
    split.to("client")
    total = server.total(revealed)
    split.to("server")
    return total, split, session


def flower(sample: int) -> tuple[float, float]:
    """CPU seconds of (one client, the server for all) with Flower's functions."""
    values = np.random.default_rng(0).standard_normal(LENGTH).astype(np.float32)
    began = cpu()
    for number in range(sample):
        vector = quantize([values], 8.0, 1 << 22)[0]
        for neighbour in range(CLIENTS):  # 99 neighbours and itself
            mask = pseudo_rand_gen(bytes([number, neighbour]) * 16, RING, [(LENGTH,)])[0]
            vector = (vector + mask) % RING
    client = (cpu() - began) / sample
    began = cpu()
    total = np.zeros(LENGTH, np.int64)
    for number in range(sample):
        mask = pseudo_rand_gen(bytes([number, 1]) * 16, RING, [(LENGTH,)])[0]
        total = (total - mask + vector) % RING
    one = (cpu() - began) / sample
    # One own mask for each survivor, and one for each neighbour of each one that dropped out.
    return client, one * (CLIENTS - DROPPED) * (1 + DROPPED)


def main() -> None:
    """Measure and print."""
    draw = np.random.default_rng(1)
    vectors = {
        f"client-{i:05d}": draw.integers(0, 1 << 20, LENGTH, dtype=np.uint32)
        for i in range(CLIENTS)
    }
    kept = list(vectors)[: CLIENTS - DROPPED]
    began = cpu()
    plain = np.zeros(LENGTH, np.uint32)
    for name in kept:
        plain += vectors[name]
    bare = cpu() - began
    total, split, session = ours(vectors)
    assert np.array_equal(total, plain), "the secure sum is not the sum"
    client = split.seconds["client"] / CLIENTS
    server = split.seconds["server"]
    theirs_client, theirs_server = flower(sample=3)
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{CLIENTS} clients x {LENGTH:,} values, {DROPPED} drop out before sending")
    print(f"degree {session.degree}, threshold {session.threshold}; 4 bytes a value go up")
    print(f"plain sum           server {bare:7.3f} CPU s")
    print(f"secure sum          server {server:7.3f} CPU s   one client {client:7.3f} CPU s")
    row = f"server {theirs_server:7.3f} CPU s   one client {theirs_client:7.3f} CPU s"
    print(f"Flower's functions  {row}")
    print(f"against plain:  server {server / bare:.0f}x")
    print(f"against Flower: server {theirs_server / server:.1f}x faster, "
          f"client {theirs_client / client:.1f}x faster")  # fmt: skip
    print(f"peak memory of the process, all vectors included: {megabytes:.0f} MB")


if __name__ == "__main__":
    main()
