"""One client's round on a loaded model: the loop, with and without privacy.

The two loops share everything but what happens between the losses and the optimiser: without
privacy the mean of the batch's losses is differentiated; with privacy every example's gradient is
clipped on its own and noise is added (``privacy.local``). In both, a batch goes through the model
in parts of texts of similar length, so hardly any padding is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clients.attachments import Attachment
from clients.training import Indices, TrainingPlan, parts, shuffled_batches
from clients.trunk import Features
from privacy.budget import LocalPrivacy
from privacy.events import SgdEvent
from privacy.local import PrivateSgd, poisson_batch
from privacy.planted import Planted
from privacy.randomness import Stream, derive

log = logging.getLogger("airpeft.clients.loop")


@dataclass(frozen=True)
class LocalRound:
    """One training on a loaded model.

    Attributes:
        peft_model: from ``clients.model.attach``.
        attachment: what trains of it, at its start.
        plan: how to train.
        features: of the texts.
        labels: (n) class indices.
        key: root of this training's randomness.
    """

    peft_model: Any
    attachment: Attachment
    plan: TrainingPlan
    features: Features
    labels: Tensor
    key: bytes

    def plainly(self) -> dict[str, float]:
        """Train without privacy; returns metrics."""
        optimizer = self._optimizer()
        total, seen, steps = 0.0, 0, 0
        for batch in shuffled_batches(len(self.labels), self.plan, self._stream("order")):
            for losses in self._losses(batch):
                (losses.sum() / len(batch)).backward()
                total += float(losses.detach().sum())
            self.attachment.mask_gradients()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen += len(batch)
            steps += 1
        return {"loss": total / seen, "steps": float(steps)}

    def privately(
        self, privacy: LocalPrivacy, event: SgdEvent, planted: Planted | None = None
    ) -> dict[str, float]:
        """Train with DP-SGD exactly as the event says; returns metrics that tell nothing.

        Args:
            privacy: its clip.
            event: noise, sampling rate and steps.
            planted: for an audit, examples besides the client's own.
        """
        examples, sampling = len(self.labels), self._stream("sampling")
        with PrivateSgd(
            self.peft_model,
            self._optimizer(),
            max_grad_norm=privacy.max_grad_norm,
            noise_multiplier=event.noise_multiplier,
            expected_batch=event.sample_rate * examples,
            noise=self._stream("noise"),
            masks=self.attachment.masks,
            planted=planted,
        ) as private:
            mode = private.mode
            log.info("private steps by %s gradients per example: %s", mode.name, mode.reason)
            for _ in range(event.steps):
                batch = poisson_batch(examples, event.sample_rate, sampling)
                private.step(self._losses(batch, rows=mode.rows_at_once))
        return {"steps": float(event.steps), "sample_rate": event.sample_rate}

    def _optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.plan, self.attachment.factors, self.attachment.whole)

    def _losses(self, batch: Indices, rows: int | None = None) -> Iterator[Tensor]:
        """For each part of a batch, of so many texts at most, every example's own loss."""
        bounds = [bound for bound in (rows, self.plan.physical_batch) if bound is not None]
        rows = min(bounds, default=None)
        for part in parts(batch, self.features.tokens.lengths, rows=rows):
            logits = self.peft_model(**self.features.inputs(part))
            yield torch.nn.functional.cross_entropy(logits, self.labels[part], reduction="none")

    def _stream(self, purpose: str) -> Stream:
        return Stream(derive(self.key, purpose))


def build_optimizer(
    plan: TrainingPlan, factors: list[Tensor], whole: list[Tensor]
) -> torch.optim.Optimizer:
    """The plan's optimiser, fresh for one round."""
    head = plan.learning_rate if plan.head_learning_rate is None else plan.head_learning_rate
    groups = [
        {"params": params, "lr": lr}
        for params, lr in ((factors, plan.learning_rate), (whole, head))
        if params
    ]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=plan.momentum)
    return torch.optim.AdamW(groups, weight_decay=0.0)
