"""What a server can make of all that it was sent, and of lies about who dropped out: nothing."""

from __future__ import annotations

import contextlib
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.secure_messages import Confirmation, survivors_statement
from privacy.secure_sum import SecureServer, SecureSumAborted, Session
from tests.privacy.secure import IDENTITIES, confirmed_up_to, member_of, session_of


def transcript(session: Session, vector: np.ndarray) -> dict[str, bytes]:
    """All that one member sends in a session, the others' vectors being fixed."""
    clients = {name: member_of(session, name) for name in session.members}
    server, sent = SecureServer(session), {}
    mine = clients["c00"]
    keys = server.keys([client.advertise() for client in clients.values()])
    own = next(k for k in keys["c01"] if k.member == "c00")
    sent["keys"] = own.sealing + own.masking + own.signature
    sealed = {name: clients[name].share(keys[name]) for name in keys}
    sent["pieces"] = b"".join(sealed["c00"].sealed.values())
    pieces = server.pieces(list(sealed.values()))
    masked = mine.mask(vector, pieces["c00"])
    sent["masked"] = masked.values.tobytes()
    server.add(masked)
    for name in session.members[1:]:
        server.add(clients[name].mask(np.zeros(session.length, np.uint32), pieces[name]))
    said = [clients[name].confirm(server.survivors()) for name in session.members]
    sent["confirm"] = said[0].signature
    revealed = mine.reveal(said)
    sent["reveal"] = b"".join(revealed.own.values())
    return sent


def test_a_transcript_looks_the_same_whatever_the_vector_is() -> None:
    """Chi-square, of each kind of message: against another vector's, and against noise."""
    counts: dict[tuple[str, int], np.ndarray] = {}
    for number in range(12):
        session = session_of(4, length=1500, number=number + 1)
        for value in (0, 7):
            vector = np.full(session.length, value, np.uint32)
            for kind, sent in transcript(session, vector).items():
                # Half bytes, since the shorter messages have few bytes in all; at every place of
                # a word, so that nothing is averaged away.
                halves = np.frombuffer(sent, np.uint8)[:, None] >> np.array([0, 4], np.uint8) & 15
                place = 16 * (np.arange(halves.size) % 8)
                found = np.bincount(halves.ravel() + place, minlength=128)
                counts[kind, value] = counts.get((kind, value), 0) + found
    assert np.array_equal(counts["confirm", 0], counts["confirm", 7])  # signs names alone
    for kind in ("keys", "pieces", "masked", "reveal"):
        one, other = counts[kind, 0].astype(float), counts[kind, 7].astype(float)
        both = np.maximum(one + other, 1.0)
        assert one.sum() == other.sum()
        statistic = float(((one - other) ** 2 / both).sum())
        assert statistic < 220  # 120 degrees of freedom at most: 1e-6
        if kind in ("pieces", "masked"):
            for seen in (one, other):
                expected = seen.sum() / 128
                assert 50 < float(((seen - expected) ** 2 / expected).sum()) < 220


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_whatever_lists_a_server_tells_it_never_has_both_kinds_of_pieces(
    data: st.DataObject,
) -> None:
    """It has two members of seven in its league, and tells every other one a list of its choice."""
    session = session_of(7, length=1)
    clients, server = confirmed_up_to(session)
    everybody = server.survivors()
    victims = st.sets(st.sampled_from(everybody[2:]), max_size=2)
    lists = [everybody] + [
        tuple(name for name in everybody if name not in data.draw(victims)) for _ in range(2)
    ]
    said: list[Confirmation] = []
    for name in everybody[2:]:
        with contextlib.suppress(SecureSumAborted):  # a list that leaves it out
            said.append(clients[name].confirm(data.draw(st.sampled_from(lists))))
    for name in everybody[:2]:  # they sign whatever helps
        sign = IDENTITIES[name].sign
        said += [Confirmation(name, sign(survivors_statement(session, one))) for one in lists]
    own, masking = Counter[str](), Counter[str]()
    for name in {one.member for one in said} - set(everybody[:2]):
        with contextlib.suppress(SecureSumAborted):
            revealed = clients[name].reveal(said)
            own.update(revealed.own)
            masking.update(revealed.masking)
    assert not own.keys() & masking.keys()
