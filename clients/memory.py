"""What a client keeps between rounds, on its own disk: nothing of it is ever sent as it is.

One file per run, client and round, written durably when the round's training is done. A round
looks at the memory of the rounds before it, never at its own: a round that is repeated after a
crash starts from the same memory as the first time, and a resumed run equals an undisturbed one.

    <folder>/<run>/<client>/000007.safetensors

Only the last two rounds that the client took part in stay, in at most eight runs: an older one can
be asked for by nobody. What is in a file:

===========  ==========================================================================
``start``    the adapter that was handed out: what equals it need not be sent again
``own``      the client's whole trained adapter, of which B and the head are its own
``overlay``  a second adapter, that never leaves
``trained``  the trained adapter, for the second half of a round in two passes
vectors      what a codec or the overlay remembers, each float32 of one dimension
===========  ==========================================================================
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from aggregation import tensor_file
from aggregation.adapter import Adapter
from aggregation.durable import write_bytes
from aggregation.errors import AggregationError
from aggregation.spec import AdapterSpec
from clients.errors import ClientError

ROUNDS_KEPT = 2
RUNS_KEPT = 8
START, OWN, OVERLAY, TRAINED = "start", "own", "overlay", "trained"

_SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}\Z")
_FILE = re.compile(r"([0-9]{6,9})\.safetensors\Z")

Vector = npt.NDArray[np.float32]


class MemoryDamaged(ClientError):  # noqa: N818 - says what happened
    """A file of the memory is not one of ours; the message names it."""


class MissingTensors(ClientError):  # noqa: N818 - says what happened
    """A task builds on something that this client has not kept, or never had."""


@dataclass(frozen=True)
class Memories:
    """What a client keeps of one round.

    Attributes:
        adapters: by the names in the table above.
        vectors: float32 of one dimension, by name.
    """

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    vectors: Mapping[str, Vector] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.adapters or self.vectors)

    def __or__(self, other: Memories) -> Memories:
        return Memories({**self.adapters, **other.adapters}, {**self.vectors, **other.vectors})


class ClientMemory:
    """The memory of one client in one run.

    Args:
        folder: of all memories; made when something is first written.
        run: name of the run.
        client: the client's stable name.
    """

    def __init__(self, folder: Path, run: str, client: str) -> None:
        self._runs = Path(folder)
        self._run = self._runs / _safe(run)
        self.folder = self._run / _safe(client)

    def before(self, number: int) -> Memories:
        """What is known when a round begins: of the last round before it, or nothing.

        Raises:
            MemoryDamaged: if the file cannot be read.
        """
        return self._newest(number - 1)

    def after(self, number: int) -> Memories:
        """What is known when a round has ended: of the last round up to it, or nothing.

        Raises:
            MemoryDamaged: if the file cannot be read.
        """
        return self._newest(number)

    def of(self, number: int) -> Memories:
        """What was kept of exactly this round, or nothing.

        Raises:
            MemoryDamaged: if the file cannot be read.
        """
        return self._read(number) if number in self._rounds() else Memories()

    def write(self, number: int, memories: Memories) -> None:
        """Keep this of a round, durably; older rounds and later ones are forgotten.

        Later ones are there if a run goes on from an earlier state: they did not happen.

        Raises:
            StorageError: if the disk does not take it; what was there stays.
        """
        new = not self._run.exists()
        write_bytes(self._path(number), _packed(memories), mode=0o600)
        kept = [n for n in self._rounds() if n <= number][-ROUNDS_KEPT:]
        for old in self._rounds():
            if old not in kept:
                self._path(old).unlink(missing_ok=True)
        if new:
            self._forget_runs()

    def find(self, digest: str) -> Adapter | None:
        """An adapter that was handed out in one of the rounds that are kept, by its digest."""
        for number in reversed(self._rounds()):
            start = self._read(number).adapters.get(START)
            if start is not None and start.digest == digest:
                return start
        return None

    def _newest(self, most: int) -> Memories:
        numbers = [n for n in self._rounds() if n <= most]
        return self._read(numbers[-1]) if numbers else Memories()

    def _rounds(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        matches = (_FILE.match(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _read(self, number: int) -> Memories:
        path = self._path(number)
        try:
            return _unpacked(path.read_bytes())
        except (OSError, AggregationError, ValueError, KeyError, TypeError) as error:
            raise MemoryDamaged(
                f"{path}: cannot be read ({error}); remove the folder {self.folder}, and this "
                "client goes on as a new one"
            ) from error

    def _forget_runs(self) -> None:
        """Only the runs that began last stay; a device takes part in any number of them."""
        # Other clients of this machine may be at it too: what is gone already is no trouble.
        with contextlib.suppress(OSError):
            runs = [path for path in self._runs.iterdir() if path.is_dir() and path != self._run]
            runs.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
            for old in runs[: max(0, len(runs) - RUNS_KEPT + 1)]:
                shutil.rmtree(old)


def _packed(memories: Memories) -> bytes:
    specs: dict[str, str] = {}
    tensors: dict[str, Vector] = {}
    for name, adapter in memories.adapters.items():
        specs[adapter.spec.digest] = adapter.spec.to_json()
        tensors[f"adapter.{name}"] = adapter.pack()
    for name, vector in memories.vectors.items():
        tensors[f"vector.{name}"] = np.asarray(vector, np.float32).reshape(-1)
    # An empty vector says nothing that its absence does not, and the format has no empty tensors.
    tensors = {name: vector for name, vector in tensors.items() if vector.size}
    note = {
        "adapters": {name: a.spec.digest for name, a in memories.adapters.items()},
        "schema": 1,
        "specs": specs,
    }
    return tensor_file.save(tensors, json.dumps(note, sort_keys=True))


def _unpacked(data: bytes) -> Memories:
    tensors, metadata = tensor_file.load(data)
    note = json.loads(metadata["format"])
    if note["schema"] != 1:
        raise ValueError(f"schema {note['schema']!r} is not 1")
    specs = {digest: AdapterSpec.from_json(text) for digest, text in note["specs"].items()}
    return Memories(
        {
            name: Adapter.unpack(specs[digest], tensors[f"adapter.{name}"])
            for name, digest in note["adapters"].items()
        },
        {
            key.removeprefix("vector."): value.astype(np.float32, copy=False)
            for key, value in tensors.items()
            if key.startswith("vector.")
        },
    )


def _safe(name: str) -> str:
    """A name as a part of a path: itself where that is harmless, else its hash."""
    if _SAFE.match(name):
        return name
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
