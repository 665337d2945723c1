"""The resident trainer: one base model in memory, any number of clients' jobs through it.

    Trainer.train(jobs) -> one Update or JobFailure for each, in order
    Trainer.evaluate(adapter, data) -> Evaluation

Jobs come as a list, so that an engine may train many clients at once on the shared base without a
change to any caller. :class:`ResidentTrainer` trains them one after the other. For the same job
and one thread it gives the same bits in every process.

A private job goes in this order: the noise is fixed, the event is spent in the ledger (durably, or
refused), and only then is the first gradient computed. With privacy, no number that depends on the
examples leaves in the metrics: no loss, no batch sizes. What a client keeps for its next round
(``clients.memory``) is on the disk before its update is given out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from aggregation.adapter import Adapter
from aggregation.codecs import CodecError, read_codec
from aggregation.errors import AggregationError
from aggregation.update import Update
from clients import overlay as overlays
from clients.attachments import attached, frozen
from clients.base import BaseRef
from clients.data import DataSource, Examples
from clients.errors import ClientError
from clients.faults import JobFailure, JobFault, failure, fault_for
from clients.loop import LocalRound
from clients.measuring import Evaluation, measure
from clients.memory import OWN, ClientMemory, Memories
from clients.outgoing import chosen_before, outgoing, own_start, with_own
from clients.rows import Rows
from clients.secure_desk import SecureDesk, SecureRequest
from clients.shelf import Shelf
from clients.spending import private_event, refuse_unbounded, spend
from clients.training import ClientJob, Owner, PlanError, check_finite
from clients.trunk import CACHE_BYTES
from privacy.errors import PrivacyError
from privacy.ledger import Ledger
from privacy.local import check_model
from privacy.randomness import DEVICE, SEEDED, Stream, derive, seeded_key

__all__ = [
    "Evaluation",
    "JobFailure",
    "JobFault",
    "ResidentTrainer",
    "SecureTrainer",
    "Trainer",
    "private_event",
]


class Trainer(Protocol):
    """What can train."""

    def train(self, jobs: Sequence[ClientJob]) -> list[Update | JobFailure]:
        """Train every job; the results are in the order of the jobs. One failure stops no other."""
        ...

    def evaluate(
        self,
        adapter: Adapter,
        data: Examples | DataSource,
        *,
        max_length: int = 32,
        beside: Sequence[Adapter] = (),
        owner: Owner | None = None,
    ) -> Evaluation:
        """Measure an adapter.

        Args:
            adapter: what is measured.
            data: the examples, or where they are.
            max_length: tokens of a text that are read.
            beside: frozen adapters that belong to it.
            owner: the client whose examples they are: what it keeps is put in, and only its
                held-out share is measured; None measures the adapter as it is on all examples.

        Raises:
            DataError: if the data cannot be used.
            BaseMismatch: if the adapter belongs to another base.
            BudgetExceeded: if the owner's own ledger limits it: exact numbers have no bound.
        """
        ...


class SecureTrainer(Trainer, Protocol):
    """What can train, and keeps in its memory what only a secure sum may see."""

    def secure(self, request: SecureRequest) -> dict[str, bytes]:
        """One step of a secure sum of what was trained with ``ClientJob.secure``.

        Returns:
            The bytes to answer, by name.

        Raises:
            SecureSumError: if there is nothing kept, or the sum has to be given up.
        """
        ...


class ResidentTrainer:
    """Trains and evaluates in this process.

    Args:
        base: from ``find_base``.
        ledger: where private events are spent; None keeps no record, for measurements only.
        threads: threads of the matrix kernels in this whole process; 1 for the same bits
            everywhere; None leaves them as they are.
        device_key: the device's secret; all randomness then derives from it, and the seed that a
            job carries is not used, because whoever sent the job knows it.
        cache_bytes: bound on the hidden states kept in memory.
        shelf: of another trainer of the same base, whose models and hidden states this one uses;
            None for its own.

    Raises:
        PlanError: if the shelf is another base's.
    """

    def __init__(
        self,
        base: BaseRef,
        ledger: Ledger | None = None,
        threads: int | None = None,
        *,
        device_key: bytes | None = None,
        cache_bytes: int = CACHE_BYTES,
        shelf: Shelf | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.base = base
        self._ledger = ledger
        self._device_key = device_key
        if shelf is not None and shelf.base != base:
            raise PlanError(f"the shelf holds {shelf.base.name}, and the base is {base.name}")
        self.shelf = shelf or Shelf(base, cache_bytes)
        self._rows = Rows()
        self._desk = SecureDesk(once=device_key is not None)

    @property
    def randomness(self) -> str:
        """Where the noise comes from, in the words of the privacy statement."""
        return SEEDED if self._device_key is None else DEVICE

    def secure(self, request: SecureRequest) -> dict[str, bytes]:
        """One step of a secure sum of what was trained; see :class:`SecureTrainer`."""
        return self._desk.step(request)

    def train(self, jobs: Sequence[ClientJob]) -> list[Update | JobFailure]:
        """Train the jobs one after the other; see :class:`Trainer`."""
        return [self._guarded(job) for job in jobs]

    def evaluate(
        self,
        adapter: Adapter,
        data: Examples | DataSource,
        *,
        max_length: int = 32,
        beside: Sequence[Adapter] = (),
        owner: Owner | None = None,
    ) -> Evaluation:
        """Measure an adapter; see :class:`Trainer`."""
        if owner is not None:
            refuse_unbounded(owner.client, self._ledger, "measuring on its own rows")
        owner = owner or Owner(client="", run="", round=0)
        assignment = owner.assignment
        with self.shelf.lock:
            examples = self._rows.to_measure(
                data, adapter.spec.labels, owner.client, assignment.holdout
            )
            past = Memories()
            if owner.memory is not None and assignment.keeps:
                past = ClientMemory(owner.memory, owner.run, owner.client).after(owner.round)
            if assignment.keeps == "B":
                adapter = with_own(adapter, past.adapters.get(OWN))
            peft_model = self.shelf.model(adapter.spec)
            features = self.shelf.features(peft_model, examples, max_length, beside)
            own = None
            if assignment.keeps == "overlay":
                hidden = self.shelf.hidden(peft_model, beside)
                own = overlays.own(past, features, hidden, assignment.mix)
            labels = torch.tensor(examples.labels)
            return measure(peft_model, adapter, features, labels, beside=beside, own=own)

    def _guarded(self, job: ClientJob) -> Update | JobFailure:
        try:
            with self.shelf.lock:
                return self._train(job)
        except (ClientError, PrivacyError, AggregationError) as error:
            return failure(job, fault_for(error), error)
        except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
            # Torch and Opacus raise these; one client's trouble must not end the others' round.
            return failure(job, JobFault.TRAINING_FAILED, error)

    def _train(self, job: ClientJob) -> Update:
        spec, assignment = job.adapter.spec, job.assignment
        peft_model = self.shelf.model(spec)
        memory = self._memory(job)
        past = memory.before(job.round) if memory else Memories()
        start, chosen = own_start(job, past), chosen_before(job)
        examples = self._rows.to_train(job.data, spec.labels, job.client, assignment.holdout)
        if job.secure:
            self._desk.check(job, float(len(examples)))
        key, fingerprint = self._keys(job, start, examples)
        features = self.shelf.features(peft_model, examples, job.plan.max_length, job.beside)
        classes = torch.tensor(examples.labels)
        with attached(
            peft_model, start, assignment, beside=frozen(job.beside), chosen=chosen
        ) as attachment:
            if job.privacy is not None:
                check_model(peft_model)  # what cannot train privately must not spend anything
            event, metrics = spend(job, len(examples), self._ledger, fingerprint)
            run = LocalRound(peft_model, attachment, job.plan, features, classes, key)
            if job.privacy is not None and event is not None:
                metrics |= run.privately(job.privacy, event)
            else:
                told = run.plainly()
                metrics |= {"steps": told["steps"]} if event is not None else told
            trained = attachment.read()
        check_finite(trained)
        made = outgoing(
            job,
            trained,
            chosen=chosen,
            past=past,
            noise=Stream(derive(key, "factor noise")),
            weight=float(len(examples)),
            event={} if event is None else event.to_mapping(),
            metrics=metrics,
        )
        memories = made.memories
        if assignment.keeps == "overlay":
            hidden = self.shelf.hidden(peft_model, job.beside)
            memories |= overlays.train_own(
                run, trained, past, assignment.mix, beside=job.beside, hidden=hidden
            )
        if memory:
            memory.write(job.round, memories)
        return self._desk.keep(job, made.update) if job.secure else made.update

    def _memory(self, job: ClientJob) -> ClientMemory | None:
        """Where the client keeps things, if it has a place and something to keep.

        Raises:
            PlanError: if there is something to keep and no place.
        """
        try:
            stateful = read_codec(job.codec).stateful
        except CodecError as error:
            raise PlanError(str(error)) from None
        needs = job.assignment.keeps or job.assignment.sketch or stateful
        if job.memory is not None:
            return ClientMemory(job.memory, job.run, job.client)
        if needs:
            raise PlanError(
                "what this client is asked to do needs a memory from round to round, and it has "
                "none: give memory=..., the folder for it"
            )
        return None

    def _keys(self, job: ClientJob, start: Adapter, examples: Examples) -> tuple[bytes, str]:
        """The root of this job's randomness, and the fingerprint of all that it depends on.

        On a device the fingerprint is part of the root: a round repeated after a crash repeats its
        noise and releases nothing new, and anything else gets noise of its own. In a simulation
        the root is the seed's alone, so that two machines whose results differ in the last bit
        still draw the same noise; the ledger counts by the fingerprint in both cases.
        """
        root = seeded_key(job.seed) if self._device_key is None else self._device_key
        settings: dict[str, Any] = {
            "plan": job.plan.to_mapping(),
            "privacy": job.privacy.to_mapping() if job.privacy else None,
        }
        # Only where there is something to say: what was spent before these existed stays spent.
        if job.assignment.to_mapping():
            settings["assignment"] = job.assignment.to_mapping()
        if job.beside:
            settings["beside"] = [adapter.digest for adapter in job.beside]
        name = (job.run, job.client, job.round)
        depends = (start.digest, examples.digest, json.dumps(settings, sort_keys=True))
        fingerprint = derive(root, "inputs", *name, *depends).hex()
        if self._device_key is None:
            return derive(root, *name), fingerprint
        return derive(root, *name, fingerprint), fingerprint
