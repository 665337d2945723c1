"""Measuring an adapter: alone, beside frozen ones, or with what a client has kept for itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aggregation.adapter import Adapter
from clients import model as models
from clients.attachments import Mix, applied, weighted
from clients.overlay import Own
from clients.training import parts
from clients.trunk import FILL_TOKENS, Features


@dataclass(frozen=True)
class Evaluation:
    """How an adapter does on some examples: accuracy in 0..1, mean cross-entropy in nats."""

    accuracy: float
    loss: float
    examples: int


def measure(
    peft_model: Any,
    adapter: Adapter,
    features: Features,
    labels: Tensor,
    *,
    beside: Sequence[Adapter] = (),
    own: Own | None = None,
) -> Evaluation:
    """Answer all texts and compare.

    Args:
        peft_model: a model of the adapter's specification; its tensors are overwritten.
        adapter: what is measured.
        features: of the texts, computed below everything that any of the adapters touches.
        labels: (n) class indices.
        beside: frozen adapters.
        own: the client's own adapter, if it has one.
    """
    models.load_tensors(peft_model, adapter)
    right, loss = 0, 0.0
    shared_mix, own_mix = Mix(), Mix()
    with ExitStack() as undo:
        for extra in beside:
            undo.enter_context(applied(peft_model, extra))
        if own is not None:
            undo.enter_context(applied(peft_model, own.overlay, own_mix))
            undo.enter_context(weighted(peft_model, adapter.spec, shared_mix))
        undo.enter_context(torch.inference_mode())
        for part in parts(np.arange(len(labels)), features.tokens.lengths, FILL_TOKENS):
            if own is not None:
                own_mix.weight = own.weights[part]
                shared_mix.weight = 1.0 - own.weights[part]
            logits = peft_model(**features.inputs(part))
            truth = labels[part]
            right += int((logits.argmax(-1) == truth).sum())
            loss += float(torch.nn.functional.cross_entropy(logits, truth, reduction="sum"))
    return Evaluation(right / len(labels), loss / len(labels), len(labels))
