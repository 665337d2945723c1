"""The models of a process: one base in memory, and on it a model for every specification in use."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from aggregation.adapter import Adapter
from aggregation.spec import AdapterSpec
from clients import model as models
from clients.attachments import lowest_split
from clients.base import BaseRef
from clients.data import Examples
from clients.model import SentenceClassifier
from clients.trunk import Features, TrunkCache

MODELS_KEPT = 4


class Shelf:
    """Models and features, made at first use; the least recently used go first.

    Args:
        base: from ``find_base``.
        cache_bytes: bound on the hidden states kept in memory.

    Attributes:
        base: the same.
        lock: to be held by whoever uses a model; trainers of several ledgers may share a shelf.
    """

    def __init__(self, base: BaseRef, cache_bytes: int) -> None:
        self.base = base
        self.lock = threading.Lock()
        self._pristine = models.build(base, 1)
        self._trunks = TrunkCache(self._pristine, models.tokenizer(base), cache_bytes)
        self._models: OrderedDict[str, Any] = OrderedDict()

    def model(self, spec: AdapterSpec) -> Any:
        """A PEFT model of this specification; all of them share the base's weights.

        Raises:
            BaseMismatch: if the specification is for another base.
        """
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

    def features(
        self, peft_model: Any, examples: Examples, max_length: int, beside: Sequence[Adapter] = ()
    ) -> Features:
        """What lies below everything that trains or stands beside, for these texts."""
        split = lowest_split(peft_model, beside)
        return self._trunks.features(
            examples.texts, examples.texts_digest, max_length=max_length, split=split
        )

    def hidden(
        self, peft_model: Any, beside: Sequence[Adapter] = ()
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """What computes the hidden states of :meth:`features`: (n, T) to (n, T, width)."""
        split = lowest_split(peft_model, beside)
        return lambda ids, mask: self._pristine.trunk(ids, mask, split)
