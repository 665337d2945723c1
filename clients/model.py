"""A base model with a head, and the one place where PEFT is configured.

A base (``clients.base``) becomes a :class:`SentenceClassifier`: the frozen encoder, mean pooling
over the tokens, one linear head. PEFT sees it as a plain module, so a stranger loads an adapter
folder with PEFT's own loader::

    model = build(find_base("minilm"), labels=2)
    model = peft.PeftModel.from_pretrained(model, folder)

Mean pooling, because the encoder was trained with it: a linear probe on frozen features gets
0.81 on our data where the first token's vector gets 0.77. Nothing here touches the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clients.adapter_specs import adapter_spec, first_trained_layer
from clients.base import (
    KNOWN_BASES,
    BaseMismatch,
    BaseNotFound,
    BaseRef,
    BaseUnsupported,
    base_digest,
    check_base,
    find_base,
)
from clients.peft_attach import attach, load_tensors, parameter_slots, read_tensors

__all__ = [
    "KNOWN_BASES",
    "BaseMismatch",
    "BaseNotFound",
    "BaseRef",
    "BaseUnsupported",
    "Prefix",
    "SentenceClassifier",
    "adapter_spec",
    "attach",
    "base_digest",
    "build",
    "check_base",
    "find_base",
    "first_trained_layer",
    "load_tensors",
    "parameter_slots",
    "read_tensors",
    "tokenizer",
]


class Prefix:
    """Keys and values that attention sees before those of the text, in the uppermost layers.

    Args:
        pairs: for each of these layers, lowest first, keys and values of shape
            (n or 1, heads, virtual tokens, width of a head).
        layers: number of layers of the encoder.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], layers: int) -> None:
        if len(pairs) > layers:
            raise ValueError(f"a prefix for {len(pairs)} layers; the encoder has {layers}")
        self._pairs, self.first = pairs, layers - len(pairs)

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer attends to, prefix first; as transformers asks it."""
        rows = keys.shape[0]
        first_keys, first_values = self._pairs[layer - self.first]
        return (
            torch.cat([first_keys.expand(rows, -1, -1, -1), keys], dim=2),
            torch.cat([first_values.expand(rows, -1, -1, -1), values], dim=2),
        )


class SentenceClassifier(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A frozen encoder, mean pooling, and a linear head.

    The layers below :attr:`split` carry no adapter, so what they compute for a text never changes:
    :meth:`trunk` runs them once, and ``forward(trunk=...)`` goes on from there.

    Attributes:
        encoder: the Hugging Face encoder, without its pooler; dropout off.
        classifier: the head, (hidden) -> (labels); starts at zero, so all classes are equal.
        split: index of the first layer that may be trained; 0 runs everything every time.
    """

    def __init__(self, encoder: nn.Module, hidden: int, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(hidden, labels)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.split = 0

    @property
    def config(self) -> Any:
        """The encoder's configuration, by which PEFT finds its way about."""
        return self.encoder.config

    @property
    def device(self) -> torch.device:
        """Where the weights are; PEFT puts virtual tokens there."""
        device: torch.device = self.classifier.weight.device
        return device

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, lowest first."""
        layers = self.encoder.encoder.layer
        assert isinstance(layers, nn.ModuleList)  # noqa: S101 - narrows the type
        return layers

    def trunk(self, input_ids: Tensor, attention_mask: Tensor, split: int | None = None) -> Tensor:
        """Hidden states below layer ``split`` (default :attr:`split`): (n, T) -> (n, T, hidden)."""
        hidden = self.encoder.embeddings(input_ids=input_ids)
        return self._run(hidden, attention_mask, 0, self.split if split is None else split)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        trunk: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        labels: None = None,
        output_attentions: None = None,
        output_hidden_states: None = None,
        return_dict: bool | None = None,
    ) -> Tensor:
        """Logits. The keywords are those with which PEFT's prompts and prefixes call a classifier.

        Args:
            input_ids: (n, T) token ids.
            attention_mask: (n, T), 1 for a token and 0 for padding; needed in every form. Virtual
                tokens come first in it.
            trunk: (n, T, hidden), what :meth:`trunk` returned for the same texts, instead of ids.
            inputs_embeds: (n, T, hidden), what the word embeddings would give, instead of ids. The
                mean is taken over virtual tokens too.
            past_key_values: a :class:`Prefix`, or a cache of transformers with its keys and values;
                the uppermost layers attend to it.
            labels: not used, like the rest.
            output_attentions: not used.
            output_hidden_states: not used.
            return_dict: not used.

        Returns:
            (n, labels).
        """
        given = [value for value in (input_ids, trunk, inputs_embeds) if value is not None]
        if attention_mask is None or len(given) != 1:
            raise ValueError("give attention_mask, and either input_ids, trunk or inputs_embeds")
        mask = attention_mask[:, -given[0].shape[1] :]  # without a prefix
        if trunk is not None:
            hidden = trunk
        elif inputs_embeds is not None:
            hidden = self.encoder.embeddings(inputs_embeds=inputs_embeds)
            hidden = self._run(hidden, mask, 0, self.split)
        else:
            hidden = self.trunk(input_ids, mask)
        prefix, top = self._prefix(past_key_values), len(self.layers)
        first = top if prefix is None else max(self.split, prefix.first)
        hidden = self._run(hidden, mask, self.split, first)
        hidden = self._run(hidden, attention_mask, first, top, prefix)
        mask = mask.to(hidden.dtype).unsqueeze(-1)  # (n, T, 1)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)  # (n, hidden)
        logits: Tensor = self.classifier(pooled)
        return logits

    def _prefix(self, given: Any) -> Prefix | None:
        if given is None or isinstance(given, Prefix):
            return given
        return Prefix([(layer.keys, layer.values) for layer in given.layers], len(self.layers))

    def _run(
        self,
        hidden: Tensor,
        attention_mask: Tensor,
        start: int,
        stop: int,
        prefix: Prefix | None = None,
    ) -> Tensor:
        # (n, 1, 1, T), broadcast over heads and query positions; True may be attended to.
        mask = attention_mask.to(torch.bool)[:, None, None, :]
        for index in range(start, stop):
            hidden = self.layers[index](hidden, mask, past_key_values=prefix)
        return hidden


def build(base: BaseRef, labels: int) -> SentenceClassifier:
    """Load a base and put the head on it; all weights float32, dropout off, head at zero.

    Args:
        base: from :func:`find_base`.
        labels: number of classes.

    Raises:
        BaseUnsupported: if the weights do not fit the configuration.
    """
    import transformers
    from transformers import AutoConfig, AutoModel

    with _quiet(transformers):
        config = AutoConfig.from_pretrained(str(base.path), local_files_only=True)
        config.hidden_dropout_prob = 0.0  # dropout would make the frozen layers random
        config.attention_probs_dropout_prob = 0.0
        try:
            encoder = AutoModel.from_pretrained(
                str(base.path),
                config=config,
                add_pooling_layer=False,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="sdpa",
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise BaseUnsupported(f"{base.path}: the weights cannot be loaded: {error}") from error
    model = SentenceClassifier(encoder, base.hidden, labels)
    model.requires_grad_(False)
    model.eval()
    return model


def tokenizer(base: BaseRef) -> Any:
    """The base's tokeniser."""
    import transformers
    from transformers import AutoTokenizer

    with _quiet(transformers):
        return AutoTokenizer.from_pretrained(str(base.path), local_files_only=True)


class _quiet:  # noqa: N801 - reads as a statement
    """Silences transformers' progress bars and notes while a model loads, then restores them."""

    def __init__(self, transformers: Any) -> None:
        self._logging = transformers.utils.logging

    def __enter__(self) -> None:
        self._level = self._logging.get_verbosity()
        self._bars = self._logging.is_progress_bar_enabled()
        self._logging.set_verbosity_error()
        self._logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._level)
        if self._bars:
            self._logging.enable_progress_bar()
