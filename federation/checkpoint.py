"""A training run's state on disk after every round, so that a killed run goes on where it was.

Each round is one folder that appears at once: ``round-00003/`` with ``round.json`` (the record of
the round, and the digest of the state) and ``state.safetensors`` (the adapter and the residual).
The records of all rounds are kept, the states of the last two.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Checkpoints(Path(folder), run="demo").latest() is None
    True
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregation import durable
from aggregation.errors import AggregationError
from aggregation.state import GlobalState
from federation.errors import FederationError
from federation.rounds import Round, RoundsError

SCHEMA = 1
STATES_KEPT = 2
RECORD, STATE = "round.json", "state.safetensors"

_log = logging.getLogger("airpeft.federation.checkpoint")


class CheckpointError(FederationError):
    """The folder holds another run, or nothing that can be gone on from."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: where they are; made at the first write.
        run: name of the run; the checkpoints of another one are refused.
    """

    folder: Path
    run: str

    def save(
        self, record: Round, state: GlobalState, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Make a round durable; when this returns, a kill can't lose it.

        Args:
            record: of the round.
            state: after it.
            files: further files by name, kept as long as the state is; see :meth:`kept`.

        Raises:
            StorageError: if the disk is full or the folder not writable; the run can be resumed.
        """
        data = state.to_bytes()
        document = {
            "schema": SCHEMA,
            "run": self.run,
            "state_sha256": hashlib.sha256(data).hexdigest(),
            "round": record.to_document(),
        }
        durable.write_folder(
            self._folder(record.number),
            {
                **(files or {}),
                STATE: data,
                RECORD: json.dumps(document, sort_keys=True, indent=1).encode(),
            },
        )
        for stale in self._folder(record.number - STATES_KEPT).glob("*"):
            if stale.name != RECORD:
                stale.unlink(missing_ok=True)

    def kept(self, number: int) -> dict[str, bytes]:
        """The further files of a round, by name; none if it had none, or is too long ago."""
        return {
            path.name: path.read_bytes()
            for path in sorted(self._folder(number).glob("*"))
            if path.name not in (RECORD, STATE)
        }

    def latest(self) -> tuple[list[Round], GlobalState] | None:
        """The records of all rounds so far and the newest state; None if there is none.

        A state that does not match its digest is skipped, and the one before it is used.

        Raises:
            CheckpointError: if the folder holds another run, or no state is readable.
        """
        # Five digits and nothing after them: a folder that a kill left half written ends otherwise.
        complete = "round-[0-9][0-9][0-9][0-9][0-9]/round.json"
        documents = [self._read(path) for path in sorted(self.folder.glob(complete))]
        if not documents:
            return None
        for last in range(len(documents), 0, -1):
            state = self._state(documents[last - 1])
            if state is not None:
                return [self._record(document) for document in documents[:last]], state
        raise CheckpointError(
            f"{self.folder}: no state of the run is readable: remove the folder to start anew"
        )

    def _folder(self, number: int) -> Path:
        return self.folder / f"round-{number:05d}"

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            document = json.loads(path.read_bytes())
            run, schema = document["run"], document["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not a checkpoint ({error!r}): remove its folder to go on from the "
                "round before"
            ) from None
        if run != self.run or schema != SCHEMA:
            raise CheckpointError(
                f"{path}: belongs to run {run!r} (schema {schema}), this one is {self.run!r}: "
                "choose another folder"
            )
        return dict(document)

    def _record(self, document: dict[str, Any]) -> Round:
        try:
            return Round.from_document(document["round"])
        except (RoundsError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.folder}: a record is damaged: {error}") from None

    def _state(self, document: dict[str, Any]) -> GlobalState | None:
        number = self._record(document).number
        path = self._folder(number) / STATE
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != document.get("state_sha256"):
            _log.warning("%s does not match its digest; using the round before", path)
            return None
        try:
            return GlobalState.from_bytes(data)
        except AggregationError as error:
            raise CheckpointError(f"{path}: {error}") from error
