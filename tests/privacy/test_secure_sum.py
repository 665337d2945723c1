"""The secure sum: right, or given up; and nothing else can be learnt from what was sent."""

from __future__ import annotations

import contextlib
from collections import Counter

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import shamir
from privacy.secure_messages import Confirmation, PublicKeys
from privacy.secure_session import choose
from privacy.secure_sum import (
    SecureSumAborted,
    SecureSumError,
    Session,
)
from tests.privacy.secure import (
    IDENTITIES,
    LENGTH,
    confirmed_up_to,
    member_of,
    run,
    session_of,
    shuffled,
    sum_of,
    vectors_of,
)


@pytest.mark.parametrize("count", [3, 4, 10, 50])
def test_the_sum_is_the_sum(count: int) -> None:
    session = session_of(count)
    vectors = vectors_of(session)
    total, survivors = run(session, vectors, {})
    assert survivors == set(session.members)
    assert np.array_equal(total, sum_of(vectors.values()))


@pytest.mark.parametrize("step", range(5))
def test_thirty_percent_of_fifty_may_drop_out_at_any_step(step: int) -> None:
    session = session_of(50)
    vectors = vectors_of(session, step)
    gone = set(shuffled(session.members, step)[:15])
    total, survivors = run(session, vectors, {step: gone})
    assert np.array_equal(total, sum_of(vectors[name] for name in survivors))
    assert survivors == set(session.members) - (gone if step <= 2 else set())


def test_thirty_percent_of_fifty_may_drop_out_spread_over_the_steps() -> None:
    session = session_of(50)
    vectors, names = vectors_of(session), shuffled(session.members, 2)
    dropped = {step: set(names[3 * step :][:3]) for step in range(5)}
    total, survivors = run(session, vectors, dropped)
    assert survivors == set(session.members) - dropped[0] - dropped[1] - dropped[2]
    assert np.array_equal(total, sum_of(vectors[name] for name in survivors))


def test_when_a_third_drops_at_every_step_the_sum_is_given_up() -> None:
    session = session_of(50)
    names = shuffled(session.members, 1)
    with pytest.raises(SecureSumAborted, match="needed"):
        run(session, vectors_of(session), {step: set(names[8 * step :][:8]) for step in range(5)})


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 9), st.integers(0, 10_000))
def test_it_is_right_or_given_up_whoever_drops_out(count: int, seed: int) -> None:
    session, draw = session_of(count, length=3), np.random.default_rng(seed)
    vectors = vectors_of(session, seed)
    dropped: dict[int, set[str]] = {}
    for name in session.members:
        if draw.random() < 0.3:
            dropped.setdefault(int(draw.integers(5)), set()).add(name)
    try:
        total, survivors = run(session, vectors, dropped)
    except SecureSumAborted:
        return
    assert len(survivors) >= session.threshold
    assert np.array_equal(total, sum_of(vectors[name] for name in survivors))


def test_with_many_members_a_part_of_them_are_neighbours_and_the_sum_is_right() -> None:
    degree, threshold = choose(2000)
    assert degree < 400
    assert (degree + 1) / 2 < threshold <= degree + 1
    session = Session("run", 1, tuple(sorted(IDENTITIES)), LENGTH, degree=12, threshold=9)
    near = {name: session.neighbours(name) for name in session.members}
    assert all(len(found) == 12 for found in near.values())
    assert all(name in near[other] for name, found in near.items() for other in found)
    vectors = vectors_of(session)
    total, survivors = run(session, vectors, {2: {"c03", "c33"}, 4: {"c17"}})
    assert survivors == set(session.members) - {"c03", "c33"}
    assert np.array_equal(total, sum_of(vectors[name] for name in survivors))


def test_a_server_that_tells_two_stories_of_who_survived_learns_nothing() -> None:
    """It wants own masks from some members and masking keys from others, of the same victim."""
    session = session_of(9)
    clients, server = confirmed_up_to(session)
    everybody = server.survivors()
    without = tuple(name for name in everybody if name != "c00")
    first, second = everybody[1:5], everybody[5:]
    said = {name: clients[name].confirm(everybody) for name in first}
    said |= {name: clients[name].confirm(without) for name in second}
    for name, client in clients.items():
        if name in said:
            with pytest.raises(SecureSumAborted, match="confirmed the same list"):
                client.reveal(list(said.values()))


def test_no_member_gives_both_pieces_or_answers_a_step_twice() -> None:
    session = session_of(5)
    clients, server = confirmed_up_to(session)
    everybody = server.survivors()
    said = [clients[name].confirm(everybody) for name in everybody]
    revealed = clients["c01"].reveal(said)
    assert set(revealed.own) == set(everybody)
    assert not set(revealed.own) & set(revealed.masking)
    with pytest.raises(SecureSumError, match="each is done once"):
        clients["c01"].reveal(said)
    with pytest.raises(SecureSumError, match="each is done once"):
        clients["c01"].confirm(everybody[1:])


def test_a_short_list_of_survivors_is_not_confirmed() -> None:
    session = session_of(6)
    clients, _ = confirmed_up_to(session)
    with pytest.raises(SecureSumAborted, match="are needed"):
        clients["c00"].confirm(("c00", "c01"))
    other, _ = confirmed_up_to(session)
    with pytest.raises(SecureSumAborted, match="leaves this member out"):
        other["c00"].confirm(session.members[1:])


def test_keys_that_the_server_made_up_are_refused() -> None:
    session = session_of(4)
    clients = {name: member_of(session, name) for name in session.members}
    keys = {name: client.advertise() for name, client in clients.items()}
    mine = Ed25519PrivateKey.generate()
    forged = PublicKeys("c01", bytes(32), b"\1" * 32, b"")
    forged = forged.signed(mine.sign(forged.statement(session)))
    with pytest.raises(SecureSumAborted, match="not signed by its enrolled identity"):
        clients["c00"].share([forged, keys["c02"], keys["c03"]])
    other = session_of(4, number=2)
    replayed = member_of(other, "c00")
    replayed.advertise()
    with pytest.raises(SecureSumAborted, match="not signed"):  # bound to the round
        replayed.share([keys["c01"], keys["c02"], keys["c03"]])


def test_forged_confirmations_and_pieces_are_found() -> None:
    session = session_of(5)
    clients, server = confirmed_up_to(session)
    everybody = server.survivors()
    said = {name: clients[name].confirm(everybody) for name in everybody}
    forged = [Confirmation(name, bytes(64)) for name in said]
    with pytest.raises(SecureSumAborted, match="confirmed the same list"):
        clients["c00"].reveal(forged)
    revealed = [clients[name].reveal(list(said.values())) for name in everybody[1:]]
    wrong = dict(revealed[0].own) | {"c02": b"\1" * shamir.PIECE_BYTES}
    bad = type(revealed[0])(revealed[0].member, wrong, {})
    with pytest.raises(SecureSumAborted, match="one is wrong"):
        server.total([bad, *revealed[1:]])


def test_pieces_for_somebody_else_do_not_open() -> None:
    session = session_of(4)
    clients = {name: member_of(session, name) for name in session.members}
    keys = [client.advertise() for client in clients.values()]
    sealed = {name: client.share(keys) for name, client in clients.items()}
    swapped = {name: sealed[name].sealed["c01"] for name in ("c02", "c03")}
    with pytest.raises(SecureSumAborted, match="do not open"):
        clients["c00"].mask(np.zeros(LENGTH, np.uint32), swapped)


@settings(max_examples=20, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.data())
def test_any_threshold_of_pieces_gives_the_secret(
    secret: bytes, holders: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, holders))
    pieces = shamir.split(secret, holders=holders, threshold=threshold)
    chosen = data.draw(st.permutations(sorted(pieces)))[:threshold]
    assert shamir.join({number: pieces[number] for number in chosen}) == secret
    if threshold > 1:
        few = {number: pieces[number] for number in chosen[:-1]}
        with contextlib.suppress(shamir.SharingError):
            assert shamir.join(few) != secret


def test_too_few_pieces_are_as_likely_for_one_secret_as_for_another() -> None:
    ends: Counter[int] = Counter()
    for _ in range(400):
        for value in (0, 255):
            piece = shamir.split(bytes([value]) * 32, holders=3, threshold=2)[1]
            ends[value] += piece[-1] & 1
    assert abs(ends[0] - ends[255]) < 120  # six standard deviations of a fair coin's difference


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"members": ("a", "b")}, "3 to"),
        ({"members": ("a", "a", "b")}, "different members"),
        ({"length": 0}, "length=0"),
        ({"threshold": 2}, "above half"),
        ({"degree": 5, "threshold": 4}, "even"),
    ],
)
def test_a_session_that_makes_no_sense_is_refused(change: dict[str, object], said: str) -> None:
    fields = {"run": "r", "round": 1, "members": ("a", "b", "c", "d"), "length": 4, "degree": 3,
              "threshold": 3}  # fmt: skip
    with pytest.raises(SecureSumError, match=said):
        Session(**{**fields, **change})  # type: ignore[arg-type]


def test_a_session_travels() -> None:
    session = session_of(7)
    assert Session.from_mapping(session.to_mapping()) == session
    for broken in ({}, {**session.to_mapping(), "length": "8"}, {**session.to_mapping(), "x": 1}):
        with pytest.raises(SecureSumError):
            Session.from_mapping(broken)
    with pytest.raises(SecureSumError, match="must each lie"):
        choose(100, dropouts=0.5)
