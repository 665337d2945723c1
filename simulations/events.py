"""What a simulation tells while it runs, for whoever shows progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prepared:
    """The run folder is laid out and the data dealt.

    Attributes:
        run: name of the run.
        out: the run folder.
        clients: rows of each class, by client.
        labels: names of the classes.
        heldout: how many rows no client has.
        rounds: how many rounds there will be.
        done: how many of them an earlier process did.
        parameters: how many values the adapter has.
        gradients: how clients form gradients per example, and why; empty without privacy.
    """

    run: str
    out: Path
    clients: Mapping[str, tuple[int, ...]]
    labels: tuple[str, ...]
    heldout: int
    rounds: int
    done: int
    parameters: int
    gradients: str = ""


@dataclass(frozen=True)
class RoundStarted:
    """The clients of a round are being asked."""

    round: int
    cohort: tuple[str, ...]


@dataclass(frozen=True)
class ClientDone:
    """One client answered; ``refused`` says why its answer is not used, or is empty."""

    client: str
    round: int
    seconds: float
    refused: str = ""


@dataclass(frozen=True)
class RoundDone:
    """A round is on disk; ``metrics`` is its line of ``metrics.jsonl``. Round 0 is the start."""

    round: int
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Finished:
    """The adapter and the report are written."""

    adapter_digest: str
    adapter: Path
    report: Path


Event = Prepared | RoundStarted | ClientDone | RoundDone | Finished
