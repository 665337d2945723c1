"""Secure sums of made-up members, without a wire: clients, a server, and who drops out."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.secure_sum import SecureClient, SecureServer, Session

LENGTH = 8
IDENTITIES = {f"c{i:02d}": Ed25519PrivateKey.generate() for i in range(60)}


def verify(member: str, message: bytes, signature: bytes) -> bool:
    if member not in IDENTITIES:
        return False
    try:
        IDENTITIES[member].public_key().verify(signature, message)
    except InvalidSignature:
        return False
    return True


def member_of(session: Session, name: str) -> SecureClient:
    return SecureClient(session, name, sign=IDENTITIES[name].sign, verify=verify)


def session_of(count: int, length: int = LENGTH, number: int = 1) -> Session:
    return Session.of("run", number, sorted(IDENTITIES)[:count], length=length)


def vectors_of(session: Session, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        name: draw.integers(0, 1 << 32, session.length, dtype=np.uint32) for name in session.members
    }


def sum_of(vectors: Iterable[np.ndarray]) -> np.ndarray:
    return np.asarray(np.sum(np.stack(list(vectors)), axis=0, dtype=np.uint32))


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    return list(np.random.default_rng(seed).permutation(sorted(names)))


def run(
    session: Session, vectors: dict[str, np.ndarray], dropped: dict[int, set[str]]
) -> tuple[np.ndarray, set[str]]:
    """The whole protocol; ``dropped[s]`` answer no more from step s on. Sum and who is in it."""
    clients = {name: member_of(session, name) for name in session.members}
    server = SecureServer(session)
    gone: set[str] = set()

    def alive(step: int, names: Iterable[str]) -> list[str]:
        gone.update(dropped.get(step, set()))
        return [name for name in names if name not in gone]

    keys = server.keys([clients[n].advertise() for n in alive(0, clients)])
    pieces = server.pieces([clients[n].share(keys[n]) for n in alive(1, keys)])
    for name in alive(2, pieces):
        server.add(clients[name].mask(vectors[name], pieces[name]))
    survivors = server.survivors()
    confirmed = server.confirmations([clients[n].confirm(survivors) for n in alive(3, survivors)])
    revealed = [clients[n].reveal(confirmed[n]) for n in alive(4, confirmed)]
    return server.total(revealed), set(survivors)


def confirmed_up_to(session: Session) -> tuple[dict[str, SecureClient], SecureServer]:
    clients = {name: member_of(session, name) for name in session.members}
    server = SecureServer(session)
    keys = server.keys([c.advertise() for c in clients.values()])
    pieces = server.pieces([clients[n].share(keys[n]) for n in keys])
    for name in session.members:
        server.add(clients[name].mask(vectors_of(session)[name], pieces[name]))
    return clients, server
