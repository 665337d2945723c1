"""What the frozen layers compute for each text: once, not once per step.

No adapter sits below the split layer, so the hidden states there never change, and training reads
them from memory: a third of the time per step when only the top two of six layers train. They are
computed in float32 with the same layers and the same masks, so this is no approximation.

The batches in which they are computed depend on the texts alone (sorted by length), never on who
asks or when: the same file gives the same bits in every process with one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clients.model import SentenceClassifier
from clients.training import Indices, parts

CACHE_BYTES = 2 << 30
FILL_TOKENS = 8192  # forward only, so larger parts than in training


@dataclass(frozen=True)
class Tokens:
    """Token ids of some texts, one after the other.

    Attributes:
        ids: all ids, int64, (sum of lengths).
        lengths: tokens of each text.
        starts: where each text begins in ``ids``.
        pad: the id that fills a row; some encoders count positions by it.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    pad: int = 0

    @classmethod
    def of(cls, tokenizer: Any, texts: Sequence[str], max_length: int) -> Tokens:
        """Tokenise, cutting each text at ``max_length`` tokens."""
        rows = tokenizer(
            list(texts), truncation=True, max_length=max_length, padding=False,
            return_attention_mask=False, return_token_type_ids=False,
        )["input_ids"]  # fmt: skip
        lengths = tuple(len(row) for row in rows)
        starts = tuple(np.cumsum((0, *lengths[:-1])).tolist())
        ids = torch.tensor([i for row in rows for i in row])
        return cls(ids, lengths, starts, tokenizer.pad_token_id or 0)

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Ids and mask, (n, T) each, padded to the longest of these texts."""
        rows = [self.ids[self.starts[i] : self.starts[i] + self.lengths[i]] for i in indices]
        return _pad(rows, self.pad), self.mask(indices)

    def mask(self, indices: Indices) -> Tensor:
        """(n, T): 1 for a token, 0 for padding."""
        lengths = torch.tensor([self.lengths[i] for i in indices])
        return (torch.arange(int(lengths.max())) < lengths[:, None]).to(torch.int64)


@dataclass(frozen=True)
class Features:
    """The inputs of the trained layers for some texts.

    Attributes:
        tokens: their tokens.
        hidden: (sum of lengths, width) hidden states below the split; None if they are not kept,
            and then the whole model runs.
    """

    tokens: Tokens
    hidden: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return 0 if self.hidden is None else self.hidden.numel() * self.hidden.element_size()

    def inputs(self, indices: Indices) -> dict[str, Tensor]:
        """Keyword arguments of ``SentenceClassifier.forward`` for these texts."""
        if self.hidden is None:
            ids, mask = self.tokens.batch(indices)
            return {"input_ids": ids, "attention_mask": mask}
        starts, lengths = self.tokens.starts, self.tokens.lengths
        rows = [self.hidden[starts[i] : starts[i] + lengths[i]] for i in indices]
        return {"trunk": _pad(rows), "attention_mask": self.tokens.mask(indices)}


class TrunkCache:
    """Features by the content of the texts; the least recently used go first.

    Args:
        model: the base; only its frozen layers run here.
        tokenizer: the base's tokeniser.
        limit: bytes of hidden states to keep. A file that alone needs more is not kept: its texts
            run through the whole model at every step.
    """

    def __init__(self, model: SentenceClassifier, tokenizer: Any, limit: int = CACHE_BYTES) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._limit = limit
        self._features: OrderedDict[tuple[str, int, int], Features] = OrderedDict()

    def features(
        self, texts: Sequence[str], digest: str, *, max_length: int, split: int
    ) -> Features:
        """The features of these texts, computed now or before.

        Args:
            texts: the texts.
            digest: of the texts (``Examples.texts_digest``).
            max_length: tokens of a text that are read.
            split: index of the first layer that trains.
        """
        key = (digest, max_length, split)
        found = self._features.get(key)
        if found is None:
            found = self._compute(texts, max_length, split)
            self._features[key] = found
            while sum(f.nbytes for f in self._features.values()) > self._limit:
                self._features.popitem(last=False)
        else:
            self._features.move_to_end(key)
        return found

    def _compute(self, texts: Sequence[str], max_length: int, split: int) -> Features:
        tokens = Tokens.of(self._tokenizer, texts, max_length)
        width = self._model.classifier.in_features
        if split == 0 or 4 * width * len(tokens.ids) > self._limit:
            return Features(tokens, None)
        hidden = torch.empty(len(tokens.ids), width)
        with torch.inference_mode():
            for part in parts(np.arange(len(texts)), tokens.lengths, FILL_TOKENS):
                ids, mask = tokens.batch(part)
                out = self._model.trunk(ids, mask, split)
                for row, i in enumerate(part):
                    start, length = tokens.starts[i], tokens.lengths[i]
                    hidden[start : start + length] = out[row, :length]
        return Features(tokens, hidden)


def _pad(rows: list[Tensor], value: float = 0.0) -> Tensor:
    padded: Tensor = torch.nn.utils.rnn.pad_sequence(rows, True, value)
    return padded
