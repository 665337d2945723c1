"""The ways to make a private step on one batch: ours, and those of stock Opacus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor

from privacy.local import PrivateSgd
from privacy.per_example import HOOKS
from privacy.randomness import Stream, seeded_key

CLIP, SIGMA = 1.0, 0.9
Step = Callable[[], object]


@dataclass(frozen=True)
class Subject:
    """One batch on one model.

    Attributes:
        model: with its adapter.
        optimizer: makes one over what trains.
        losses: for each part of the batch, the loss of each of its examples.
        rows: examples in the batch.
    """

    model: Any
    optimizer: Callable[[], torch.optim.Optimizer]
    losses: Callable[[], Iterator[Tensor]]
    rows: int


@dataclass(frozen=True)
class Ways:
    """The ways to make a step on one batch; each is a context that gives a function."""

    subject: Subject

    def all(self) -> dict[str, Callable[[], AbstractContextManager[Step]]]:
        return {
            "non-private": self.plain,
            "ours": self.ours,
            "ours, hooks": lambda: self.ours(HOOKS),
            "Opacus hooks": self.hooks,
            "Opacus ghost": self.ghost,
        }

    def plain(self) -> AbstractContextManager[Step]:
        optimizer = self.subject.optimizer()

        def step() -> None:
            for losses in self.subject.losses():
                (losses.sum() / self.subject.rows).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return nullcontext(step)

    @contextmanager
    def ours(self, mode: str | None = None) -> Iterator[Step]:
        with PrivateSgd(
            self.subject.model,
            self.subject.optimizer(),
            max_grad_norm=CLIP,
            noise_multiplier=SIGMA,
            expected_batch=float(self.subject.rows),
            noise=Stream(seeded_key(2)),
            mode=mode,
        ) as private:
            yield lambda: private.step(self.subject.losses())

    @contextmanager
    def hooks(self) -> Iterator[Step]:
        optimizer = DPOptimizer(self.subject.optimizer(), **self._settings())
        with self._opacus(GradSampleHooks(self.subject.model, loss_reduction="mean")):

            def step() -> None:
                for losses in self._parts(optimizer):
                    losses.mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()

            yield step

    @contextmanager
    def ghost(self) -> Iterator[Step]:
        optimizer = DPOptimizerFastGradientClipping(self.subject.optimizer(), **self._settings())
        hooks = GradSampleHooksFastGradientClipping(
            self.subject.model, loss_reduction="mean", max_grad_norm=CLIP
        )
        with self._opacus(hooks):

            def step() -> None:
                for losses in self._parts(optimizer):
                    DPTensorFastGradientClipping(hooks, optimizer, losses, "mean").backward()
                    optimizer.step()
                    optimizer.zero_grad()

            yield step

    def _settings(self) -> dict[str, Any]:
        return {
            "noise_multiplier": SIGMA,
            "max_grad_norm": CLIP,
            "expected_batch_size": self.subject.rows,
            "loss_reduction": "mean",
        }

    def _parts(self, optimizer: Any) -> Iterator[Tensor]:
        """The same parts as ours, signalled to Opacus as its BatchMemoryManager does."""
        left = self.subject.rows
        for losses in self.subject.losses():
            left -= len(losses)
            optimizer.signal_skip_step(do_skip=left > 0)
            yield losses

    @contextmanager
    def _opacus(self, hooks: Any) -> Iterator[None]:
        self.subject.model.train()
        try:
            yield
        finally:
            hooks.cleanup()
            self.subject.model.eval()
