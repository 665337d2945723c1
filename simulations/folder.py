"""The run folder: everything that a run reads and leaves, in one place.

::

    scenario.resolved.toml   the scenario, every default written out
    partitions/              client-00000.jsonl ..., heldout.jsonl, partition.json
    ledger.sqlite            what each simulated client has spent
    server-ledger.sqlite     what the server has spent on every client, with [client_privacy];
                             beside it its secret (.key) where clients are real devices
    checkpoints/             one folder for each round
    metrics.jsonl            one line for each round
    memory/                  what each simulated client keeps between rounds
    roster.json              public keys of the simulated clients, if updates are summed securely
    adapter/                 the adapter in PEFT's layout, model card, privacy.json, version.json;
                             in residual/ what the recipe keeps beside it, if anything
    curves.png, report.html

The same command on the same folder goes on with an interrupted run; a folder that holds another
run, or something else, is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aggregation import durable
from aggregation.adapter import Adapter
from aggregation.init import initial_adapter
from clients.base import BaseRef
from clients.data import Examples
from federation.checkpoint import Checkpoints
from federation.rounds import Round, RoundsConfig
from privacy.budget import LocalPrivacy
from privacy.cohort_account import EVERY_CLIENT, SERVER, CohortAccount
from privacy.errors import PrivacyError
from privacy.ledger import Ledger
from privacy.per_example import Mode
from privacy.randomness import SEEDED, device_key, seeded_key
from simulations import datasets, from_scenario
from simulations.errors import SimulationError
from simulations.events import Prepared
from simulations.preflight import Draft, draft
from simulations.scenario import Scenario, ScenarioError, load

RESOLVED = "scenario.resolved.toml"
PARTITIONS = "partitions"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
ADAPTER = "adapter"
CURVES = "curves.png"
REPORT = "report.html"
LEDGER = "ledger.sqlite"
SERVER_LEDGER = "server-ledger.sqlite"
LOCK = ".lock"
SIMULATED = SEEDED  # how simulated clients draw their noise, for the privacy statement


class RunError(SimulationError):
    """A run folder that is another run's, in use, or not writable."""


@dataclass(frozen=True)
class Run:
    """A run that is ready to start.

    Attributes:
        scenario: what it is.
        out: the run folder, absolute.
        base: the base model.
        initial: the adapter that training starts from.
        config: how the rounds go.
        privacy: the clients' privacy, or None.
        heldout: rows to measure on.
        summary: rows of each class by client, see ``simulations.datasets.summary``.
        done: rounds that an earlier process did.
        mode: how clients form gradients per example, and why; None without privacy.
        simulated: whether clients are simulated in this process's charge. Devices are told the seed
            in their tasks, so the server's own noise must then come from a secret of its own.
    """

    scenario: Scenario
    out: Path
    base: BaseRef
    initial: Adapter
    config: RoundsConfig
    privacy: LocalPrivacy | None
    heldout: Examples = field(repr=False)
    summary: dict[str, Any] = field(repr=False)
    done: int = 0
    mode: Mode | None = None
    simulated: bool = True

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return self.scenario.partition.clients

    @property
    def checkpoints(self) -> Path:
        """Where rounds are made durable."""
        return self.out / CHECKPOINTS

    @property
    def ledger(self) -> Path:
        """The ledger that the simulated clients share."""
        return self.out / LEDGER

    @property
    def secret(self) -> Path:
        """The server's secret, from which its noise and its cohorts come where clients are real."""
        return self.out / f"{SERVER_LEDGER}.key"

    @property
    def randomness(self) -> str:
        """Where the server's noise comes from, for the privacy statement."""
        return SIMULATED if self.simulated else SERVER

    @property
    def gradients(self) -> str:
        """How clients form gradients per example, and why; empty without privacy."""
        return "" if self.mode is None else f"{self.mode.name}: {self.mode.reason}"

    @contextmanager
    def account(self) -> Iterator[CohortAccount | None]:
        """The server's account of client-level privacy, open; None if nothing is promised."""
        promised = self.config.client_privacy
        if promised is None:
            yield None
            return
        ledger = Ledger(self.out / SERVER_LEDGER)
        try:
            key = seeded_key(self.config.seed) if self.simulated else device_key(self.secret)
            yield CohortAccount(
                promised, run=self.config.run, ledger=ledger, key=key, randomness=self.randomness
            )
        finally:
            ledger.close()

    def event(self) -> Prepared:
        """What is told when everything is ready."""
        return Prepared(
            run=self.config.run,
            out=self.out,
            clients={name: tuple(rows) for name, rows in self.summary["clients"].items()},
            labels=tuple(self.summary["labels"]),
            heldout=len(self.heldout),
            rounds=self.config.rounds,
            done=self.done,
            parameters=self.initial.spec.size,
            gradients=self.gradients,
        )


@contextmanager
def locked(out: Path) -> Iterator[Path]:
    """Hold a run folder for this process; made if it is missing.

    Yields:
        its absolute path.

    Raises:
        RunError: if it can't be made, or another process holds it.
    """
    out = out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(str(durable.storage_error(out, error))) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{out}: another process is working on this run: wait for it, or choose another "
                "folder"
            ) from None
        yield out
    finally:
        os.close(descriptor)


def prepare(
    scenario: Scenario, out: Path, ready: Draft | None = None, *, clients_here: bool = True
) -> Run:
    """Lay out the run folder, or check that it holds this very run.

    Args:
        scenario: what to run.
        out: the run folder; hold it with :func:`locked`.
        ready: the scenario's draft, if it is made already.
        clients_here: whether clients have their ledger in this folder, as simulated ones do;
            devices under Flower may have their own.

    Raises:
        RunError: if the folder holds something else, or a ledger in it was edited or damaged.
        SimulationError: if the base, the data or the privacy settings are not usable.
        StorageError: if the disk is full.
    """
    out = out.resolve()
    ready = ready or draft(scenario)
    _claim(scenario, out)
    folder = out / PARTITIONS
    if not (folder / datasets.SUMMARY).is_file():
        datasets.materialise(folder, ready.dataset, ready.split)
    summary = json.loads((folder / datasets.SUMMARY).read_text("utf-8"))
    config = ready.config(folder)
    if getattr(config.chosen().private, "secure", False):
        from_scenario.write_roster(scenario, folder)
    found = Checkpoints(out / CHECKPOINTS, config.run).latest()
    _check_ledgers(out, config.run, found[0] if found else [], clients_here)
    return Run(
        scenario=scenario,
        out=out,
        base=ready.base,
        initial=initial_adapter(ready.spec, scenario.seed),
        config=config,
        privacy=ready.privacy,
        heldout=datasets.read(folder / datasets.HELDOUT, summary["labels"]),
        summary=summary,
        done=found[0][-1].number if found else 0,
        mode=ready.mode,
        simulated=clients_here,
    )


def done_rounds(run: Run) -> list[Round]:
    """The records of the rounds that an earlier process did."""
    found = Checkpoints(run.checkpoints, run.config.run).latest()
    return found[0] if found else []


def _check_ledgers(out: Path, run: str, rounds: Sequence[Round], clients_here: bool) -> None:
    """Refuse to go on where it is no longer known what was spent.

    A ledger that was edited says so by itself; one that was emptied or taken away is missed because
    it tells of less than the rounds that are done.
    """
    clients = Counter(name for r in rounds if clients_here for name in r.privacy_events)
    server = Counter({EVERY_CLIENT: sum(len(record.client_events) for record in rounds)})
    for name, done in ((LEDGER, clients), (SERVER_LEDGER, server)):
        path = out / name
        found = _spent(path, run)
        missing = sorted(who for who, times in done.items() if found[who] < times)
        if missing:
            who = missing[0]
            raise RunError(
                f"{path}: tells of {found[who]} events of {who} in run {run}, and {done[who]} are "
                "in the rounds that are done: restore the ledger from a backup, with its -wal "
                "file, or choose another folder and begin anew"
            )


def _spent(path: Path, run: str) -> Counter[str]:
    """How often each client has spent something in a run, as a ledger has it.

    A file of no bytes is what a process leaves that was killed while it made the file.

    Raises:
        RunError: if the ledger was edited or is damaged.
    """
    if not path.exists() or not path.stat().st_size:
        return Counter()
    try:
        ledger = Ledger(path, read_only=True)
        found = Counter(entry.client for entry in ledger.table() if entry.run == run)
        ledger.close()
    except PrivacyError as error:
        raise RunError(str(error)) from error
    return found


def _claim(scenario: Scenario, out: Path) -> None:
    """Write the resolved scenario, or check that the one that is there is the same."""
    path = out / RESOLVED
    if path.is_file():
        try:
            there = load(path)
        except ScenarioError as error:
            raise RunError(f"{out}: {error}: choose another folder") from error
        if there.digest != scenario.digest:
            raise RunError(
                f"{out} holds the run {there.run}, this one is {scenario.run}: choose another "
                "folder, or remove that one"
            )
        return
    strangers = sorted(p.name for p in out.iterdir() if p.name != LOCK)
    if strangers:
        raise RunError(
            f"{out} is not empty and holds no run ({strangers[0]} is in it): choose another folder"
        )
    durable.write_bytes(path, scenario.to_toml().encode())
