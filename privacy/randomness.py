"""Where the noise comes from: ChaCha20 keystreams, turned into uniform and normal numbers.

    >>> stream = Stream(derive(b"k" * 32, "run", 1, "noise"))
    >>> stream.uniform(2).shape, stream.normal(3).shape
    ((2,), (3,))
    >>> bool((Stream(b"k" * 32).normal(4) == Stream(b"k" * 32).normal(4)).all())
    True

A key is all the randomness there is. On a device it is a secret file made from the operating
system's entropy, and each training derives its own key from it and from everything that the
training depends on: repeating the same round after a crash repeats the same noise, bit for bit, so
it releases nothing new, while any other input gets fresh noise. In a simulation the key comes from
the scenario's seed; the statement says which it was.

The normal numbers are sums of four, halved, so that the gaps between floating-point numbers do not
give the exact sum away (Holohan and Braghin 2021, section 5.1).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from aggregation.durable import storage_error, sync_folder
from privacy.errors import PrivacyError

KEY_BYTES = 32
SEEDED = "ChaCha20 keyed by the scenario's seed: reproducible, for simulation only"
DEVICE = "ChaCha20 keyed by a secret of the device, from the operating system's entropy"

Floats = npt.NDArray[np.float64]


class KeyFileError(PrivacyError):
    """The file of the device's secret is not one of ours."""


def derive(key: bytes, *labels: str | int) -> bytes:
    """A key of 32 bytes for one purpose: HMAC-SHA256 over the labels, each with its length."""
    message = b"".join(
        len(raw).to_bytes(8, "big") + raw for raw in (str(label).encode() for label in labels)
    )
    return hmac.digest(key, message, hashlib.sha256)


def seeded_key(seed: int) -> bytes:
    """The root key of a simulation."""
    return derive(b"airpeft simulation", seed)


def device_key(path: Path) -> bytes:
    """The device's secret; made at the first call, readable by its owner only.

    Args:
        path: the file. Two processes that come at once get the same key.

    Raises:
        KeyFileError: if the file has another length.
        StorageError: if it cannot be written.
    """
    path = Path(path)
    if not path.exists():
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(os.urandom(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(partial, path)  # unlike a rename, it never replaces a key
            sync_folder(path.parent)
        except OSError as error:
            raise storage_error(path, error) from error
        finally:
            partial.unlink(missing_ok=True)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise KeyFileError(
            f"{path}: a device's secret has {KEY_BYTES} bytes, this file has {len(key)}; if it was "
            "damaged, remove it, and repeated rounds count as new ones"
        )
    return key


class Stream:
    """An endless sequence of random numbers that only the holder of the key can tell."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, got {len(key)}")
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """``count`` whole numbers of 64 random bits each."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), "<u8")

    def uniform(self, count: int) -> Floats:
        """``count`` numbers, uniform in [0, 1), with 53 random bits each."""
        bits = self.words(count) >> np.uint64(11)
        return bits.astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> Floats:
        """``count`` standard normal numbers (Box and Muller 1958), each the half sum of four."""
        pairs = 2 * count
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(pairs)))  # 1 - u is in (0, 1]
        angle = 2.0 * np.pi * self.uniform(pairs)
        four = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).reshape(4, count)
        half: Floats = four.sum(axis=0) / 2.0
        return half

    def permutation(self, count: int) -> npt.NDArray[np.int64]:
        """The numbers below ``count`` in random order."""
        return np.argsort(self.uniform(count), kind="stable")
