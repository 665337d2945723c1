"""The resident trainer: one base model in memory, any number of clients' jobs through it.

    Trainer.train(jobs) -> one Update or JobFailure for each, in order
    Trainer.evaluate(adapter, data) -> Evaluation

Jobs come as a list, so that an engine may train many clients at once on the shared base without a
change to any caller. :class:`ResidentTrainer` trains them one after the other. For the same job
and one thread it gives the same bits in every process.

A private job goes in this order: the noise is fixed, the event is spent in the ledger (durably, or
refused), and only then is the first gradient computed. With privacy, no number that depends on the
examples leaves in the metrics: no loss, no batch sizes.
"""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.spec import AdapterSpec
from aggregation.update import Update
from clients import model as models
from clients.base import BaseRef
from clients.data import DataError, DataSource, Examples
from clients.errors import ClientError
from clients.faults import JobFailure, JobFault, failure, fault_for
from clients.loop import LocalRound
from clients.model import SentenceClassifier
from clients.training import ClientJob, PlanError, TrainingPlan, parts
from clients.trunk import CACHE_BYTES, FILL_TOKENS, Features, TrunkCache
from privacy import calibration
from privacy.budget import LocalPrivacy
from privacy.errors import PrivacyError
from privacy.events import SgdEvent
from privacy.ledger import Ledger
from privacy.randomness import DEVICE, SEEDED, derive, seeded_key

__all__ = [
    "Evaluation",
    "JobFailure",
    "JobFault",
    "ResidentTrainer",
    "Trainer",
    "private_event",
]

MODELS_KEPT = 4
FILES_KEPT = 256


@dataclass(frozen=True)
class Evaluation:
    """How an adapter does on some examples: accuracy in 0..1, mean cross-entropy in nats."""

    accuracy: float
    loss: float
    examples: int


class Trainer(Protocol):
    """What can train."""

    def train(self, jobs: Sequence[ClientJob]) -> list[Update | JobFailure]:
        """Train every job; the results are in the order of the jobs. One failure stops no other."""
        ...

    def evaluate(
        self, adapter: Adapter, data: Examples | DataSource, *, max_length: int = 32
    ) -> Evaluation:
        """Measure an adapter.

        Raises:
            DataError: if the data cannot be used.
            BaseMismatch: if the adapter belongs to another base.
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
    """

    def __init__(
        self,
        base: BaseRef,
        ledger: Ledger | None = None,
        threads: int | None = None,
        *,
        device_key: bytes | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.base = base
        self._ledger = ledger
        self._device_key = device_key
        self._pristine = models.build(base, 1)
        self._trunks = TrunkCache(self._pristine, models.tokenizer(base), cache_bytes)
        self._models: OrderedDict[str, Any] = OrderedDict()
        self._files: OrderedDict[tuple[Any, ...], Examples] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def randomness(self) -> str:
        """Where the noise comes from, in the words of the privacy statement."""
        return SEEDED if self._device_key is None else DEVICE

    def train(self, jobs: Sequence[ClientJob]) -> list[Update | JobFailure]:
        """Train the jobs one after the other; see :class:`Trainer`."""
        return [self._guarded(job) for job in jobs]

    def evaluate(
        self, adapter: Adapter, data: Examples | DataSource, *, max_length: int = 32
    ) -> Evaluation:
        """Measure an adapter; see :class:`Trainer`."""
        with self._lock:
            examples = self._examples(data, adapter.spec.labels)
            peft_model = self._model(adapter.spec)
            models.load_tensors(peft_model, adapter)
            features = self._features(peft_model, examples, max_length)
            labels = torch.tensor(examples.labels)
            right, loss = 0, 0.0
            with torch.inference_mode():
                for part in parts(np.arange(len(examples)), features.tokens.lengths, FILL_TOKENS):
                    logits = peft_model(**features.inputs(part))
                    truth = labels[part]
                    right += int((logits.argmax(-1) == truth).sum())
                    loss += float(torch.nn.functional.cross_entropy(logits, truth, reduction="sum"))
        return Evaluation(right / len(examples), loss / len(examples), len(examples))

    def _guarded(self, job: ClientJob) -> Update | JobFailure:
        try:
            with self._lock:
                return self._train(job)
        except (ClientError, PrivacyError, AggregationError) as error:
            return failure(job, fault_for(error), error)
        except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
            # Torch and Opacus raise these; one client's trouble must not end the others' round.
            return failure(job, JobFault.TRAINING_FAILED, error)

    def _train(self, job: ClientJob) -> Update:
        models.check_base(job.adapter.spec, self.base)
        examples = self._examples(job.data, job.adapter.spec.labels)
        key, fingerprint = self._keys(job, examples)
        peft_model = self._model(job.adapter.spec)
        features = self._features(peft_model, examples, job.plan.max_length)
        run = LocalRound(peft_model, job, features, torch.tensor(examples.labels), key)
        if job.privacy is None:
            metrics = run.plainly()
            event: dict[str, int | float | str] = {}
        else:
            planned, epsilon = self._spend(job, job.privacy, len(examples), fingerprint)
            event = planned.to_mapping()
            metrics = {"epsilon": epsilon, "noise_multiplier": planned.noise_multiplier}
            metrics |= run.privately(job.privacy, planned)
        trained = models.read_tensors(peft_model, job.adapter.spec)
        if not trained.is_finite():
            raise PlanError("training diverged to values that are not finite: lower learning_rate")
        weight = float(len(examples))
        return Update(job.client, job.round, job.adapter.digest, trained, weight, event, metrics)

    def _spend(
        self, job: ClientJob, privacy: LocalPrivacy, examples: int, fingerprint: str
    ) -> tuple[SgdEvent, float]:
        """The event of this job, and the epsilon it brings the client to; durable on return."""
        event = private_event(job.plan, privacy, examples)
        if self._ledger is None:
            return event, calibration.epsilon([event], privacy.delta, privacy.accountant)
        spent = self._ledger.spend(
            job.client,
            job.run,
            job.round,
            event,
            privacy.budget(),
            accountant=privacy.accountant,
            delta=privacy.delta,
            inputs=fingerprint,
        )
        return event, spent.epsilon

    def _keys(self, job: ClientJob, examples: Examples) -> tuple[bytes, str]:
        """The root of this job's randomness, and the fingerprint of all that it depends on.

        On a device the fingerprint is part of the root: a round repeated after a crash repeats its
        noise and releases nothing new, and anything else gets noise of its own. In a simulation
        the root is the seed's alone, so that two machines whose results differ in the last bit
        still draw the same noise; the ledger counts by the fingerprint in both cases.
        """
        root = seeded_key(job.seed) if self._device_key is None else self._device_key
        settings = {
            "plan": job.plan.to_mapping(),
            "privacy": job.privacy.to_mapping() if job.privacy else None,
        }
        name = (job.run, job.client, job.round)
        depends = (job.adapter.digest, examples.digest, json.dumps(settings, sort_keys=True))
        fingerprint = derive(root, "inputs", *name, *depends).hex()
        if self._device_key is None:
            return derive(root, *name), fingerprint
        return derive(root, *name, fingerprint), fingerprint

    def _examples(self, data: Examples | DataSource, labels: tuple[str, ...]) -> Examples:
        if isinstance(data, Examples):
            if data.label_names != labels:
                raise DataError(
                    f"the data's classes are {', '.join(data.label_names)}, the adapter's are "
                    f"{', '.join(labels)}: they must be the same, in the same order"
                )
            examples = data
        else:
            examples = self._read(data, labels)
        if not len(examples):
            raise DataError("there are no examples to work with: the partition is empty")
        return examples

    def _read(self, source: DataSource, labels: tuple[str, ...]) -> Examples:
        try:
            state = source.path.stat()
        except OSError:
            raise DataError(f"{source.path}: there is no such file") from None
        key = (source, labels, state.st_size, state.st_mtime_ns)
        if key not in self._files:
            self._files[key] = source.read(labels)
            if len(self._files) > FILES_KEPT:
                self._files.popitem(last=False)
        return self._files[key]

    def _features(self, peft_model: Any, examples: Examples, max_length: int) -> Features:
        split = peft_model.base_model.model.split
        return self._trunks.features(
            examples.texts, examples.texts_digest, max_length=max_length, split=split
        )

    def _model(self, spec: AdapterSpec) -> Any:
        """A PEFT model of this specification; all of them share the base's weights."""
        models.check_base(spec, self.base)
        found = self._models.get(spec.digest)
        if found is None:
            shared: dict[int, Any] = {id(p): p for p in self._pristine.encoder.parameters()}
            shell = SentenceClassifier(
                copy.deepcopy(self._pristine.encoder, shared), self.base.hidden, len(spec.labels)
            )
            shell.requires_grad_(False)
            found = self._models[spec.digest] = models.attach(shell.eval(), spec)
            if len(self._models) > MODELS_KEPT:
                self._models.popitem(last=False)
        self._models.move_to_end(spec.digest)
        return found


def private_event(plan: TrainingPlan, privacy: LocalPrivacy, examples: int) -> SgdEvent:
    """What one private round of a client with so many examples will do, noise calibrated.

    Raises:
        PlanError: if a batch would be larger than the data.
        BudgetError: if delta is too large for so few examples.
        CalibrationError: if no noise reaches the epsilon.
    """
    sigma = privacy.noise_multiplier
    if sigma is None:
        assert privacy.epsilon is not None  # noqa: S101 - LocalPrivacy has checked it
        trial = plan.event(examples, privacy, 1.0)
        sigma = calibration.noise_multiplier(
            privacy.epsilon,
            privacy.delta,
            trial.sample_rate,
            trial.steps * privacy.rounds,
            privacy.accountant,
        )
    return plan.event(examples, privacy, sigma)
