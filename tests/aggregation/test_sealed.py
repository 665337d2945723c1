"""Sealed payloads: what is opened is what was sealed, in order and to the end, or nothing is."""

from __future__ import annotations

import io
import itertools

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation import sealed
from aggregation.payload import PayloadError
from aggregation.sealed import CHUNK, HEAD, TAG, Opener, SealError, seal

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
DATA = bytes(itertools.islice(itertools.cycle(range(251)), 2 * CHUNK + 1000))
SEALED = seal(DATA, KEY)
FULL = CHUNK + TAG
CHUNKS = [SEALED[at : at + FULL] for at in range(len(HEAD), len(SEALED), FULL)]


def opened(data: bytes, key: bytes = KEY) -> bytes:
    return Opener(data, key, limit=1 << 20).read()


@pytest.mark.parametrize("length", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 5])
def test_what_was_sealed_is_opened_whatever_the_length(length: int) -> None:
    data = DATA[:length] if length <= len(DATA) else DATA + DATA[: length - len(DATA)]
    found = seal(data, KEY)
    assert len(found) == sealed.sealed_length(len(data))
    assert sealed.plain_length(len(found)) == len(data)
    assert opened(found) == data


def test_the_bytes_are_those_of_the_stream_construction() -> None:
    info = b"airpeft.v1 payload airseal\0\x01"
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(KEY)
    cipher, expected = ChaCha20Poly1305(key), b"airseal\0\x01"
    for number, last in ((0, 0), (1, 0), (2, 1)):
        nonce = bytes(10) + bytes([number, last])
        expected += cipher.encrypt(nonce, DATA[number * CHUNK : (number + 1) * CHUNK], None)
    assert expected == SEALED


def test_chunks_are_opened_one_by_one_and_no_more_is_read_than_needed() -> None:
    source = io.BytesIO(SEALED)
    opener = Opener(source, KEY, limit=len(DATA))
    assert opener.read(100) == DATA[:100]
    assert source.tell() <= len(HEAD) + 2 * FULL
    assert opener.read(0) == b""
    assert opener.read(CHUNK) == DATA[100 : 100 + CHUNK]
    assert opener.read() == DATA[100 + CHUNK :]
    assert opener.read() == b""


def test_more_than_is_allowed_is_never_handed_out() -> None:
    with pytest.raises(SealError, match="more in it than is allowed"):
        Opener(SEALED, KEY, limit=len(DATA) - 1).read()
    first = Opener(SEALED, KEY, limit=CHUNK)
    assert first.read(CHUNK) == DATA[:CHUNK]
    with pytest.raises(SealError, match="more in it"):
        first.read(1)


ATTACKS = {
    "no bytes": b"",
    "another magic": b"airpeft\0" + SEALED[8:],
    "a later version": SEALED[:8] + b"\x02" + SEALED[9:],
    "the head alone": HEAD,
    "reordered": HEAD + CHUNKS[1] + CHUNKS[0] + CHUNKS[2],
    "one left out": HEAD + CHUNKS[0] + CHUNKS[2],
    "one twice": HEAD + CHUNKS[0] + CHUNKS[0] + CHUNKS[1] + CHUNKS[2],
    "the last one missing": HEAD + CHUNKS[0] + CHUNKS[1],
    "the last two missing": HEAD + CHUNKS[0],
    "the last one twice": SEALED + CHUNKS[2],
    "a chunk behind the end": SEALED + CHUNKS[0],
    "a byte behind the end": SEALED + b"\0",
    "an empty chunk behind the end": SEALED + ChaCha20Poly1305(KEY).encrypt(bytes(12), b"", None),
    "a byte less": SEALED[:-1],
    "a tag less": SEALED[:-TAG],
    "only a piece of a tag": HEAD + b"short",
    "a chunk of another payload": HEAD + CHUNKS[0] + seal(DATA, OTHER)[len(HEAD) + FULL :],
}


@pytest.mark.parametrize("name", ATTACKS)
def test_chunks_that_were_moved_cut_or_added_open_nothing(name: str) -> None:
    with pytest.raises(SealError):
        opened(ATTACKS[name])


@given(st.integers(0, 8 * len(SEALED) - 1))
@settings(max_examples=40, deadline=None)
def test_a_flipped_bit_opens_nothing(bit: int) -> None:
    data = bytearray(SEALED)
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SealError):
        opened(bytes(data))


@given(st.integers(0, len(SEALED) - 1))
@settings(max_examples=40, deadline=None)
def test_what_is_cut_short_opens_nothing(length: int) -> None:
    with pytest.raises(SealError):
        opened(SEALED[:length])


def test_another_key_opens_nothing_and_is_known_for_another() -> None:
    with pytest.raises(SealError, match="chunk 0 does not open"):
        opened(SEALED, OTHER)
    check = sealed.key_check(KEY)
    assert sealed.is_right(KEY, check)
    assert not sealed.is_right(OTHER, check)
    assert not sealed.is_right(KEY[:-1], check)
    with pytest.raises(SealError, match="32 bytes, not 31"):
        opened(SEALED, KEY[:-1])


def test_keys_are_fresh_and_the_same_payload_is_sealed_to_other_bytes() -> None:
    one, two = sealed.new_key(), sealed.new_key()
    assert one != two
    assert seal(DATA, one)[len(HEAD) :] != seal(DATA, two)[len(HEAD) :]


def test_lengths_that_nothing_sealed_can_have() -> None:
    assert issubclass(SealError, PayloadError)
    for length in (0, len(HEAD), len(HEAD) + TAG - 1, len(HEAD) + FULL + 1, len(HEAD) + FULL + TAG):
        with pytest.raises(SealError, match="cut short or lengthened"):
            sealed.plain_length(length)
