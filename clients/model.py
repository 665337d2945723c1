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

import numpy as np
import torch
from torch import Tensor, nn

from aggregation import peft_layout
from aggregation.adapter import Adapter
from aggregation.spec import AdapterSpec, ModuleSpec, TensorSpec
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

__all__ = [
    "KNOWN_BASES",
    "BaseMismatch",
    "BaseNotFound",
    "BaseRef",
    "BaseUnsupported",
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
    ) -> Tensor:
        """Logits.

        Args:
            input_ids: (n, T) token ids; not needed with ``trunk``.
            attention_mask: (n, T), 1 for a token and 0 for padding; needed in both forms.
            trunk: (n, T, hidden), what :meth:`trunk` returned for the same texts.

        Returns:
            (n, labels).
        """
        if attention_mask is None or (trunk is None) == (input_ids is None):
            raise ValueError("give attention_mask, and either input_ids or trunk")
        hidden = self.trunk(input_ids, attention_mask) if trunk is None else trunk
        hidden = self._run(hidden, attention_mask, self.split, len(self.layers))
        mask = attention_mask.to(hidden.dtype).unsqueeze(-1)  # (n, T, 1)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)  # (n, hidden)
        logits: Tensor = self.classifier(pooled)
        return logits

    def _run(self, hidden: Tensor, attention_mask: Tensor, start: int, stop: int) -> Tensor:
        # (n, 1, 1, T), broadcast over heads and query positions; True may be attended to.
        mask = attention_mask.to(torch.bool)[:, None, None, :]
        for index in range(start, stop):
            hidden = self.layers[index](hidden, mask)
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


def adapter_spec(
    base: BaseRef,
    labels: Sequence[str],
    rank: int,
    alpha: float,
    targets: Sequence[str] = ("query", "value"),
    layers: Sequence[int] | None = None,
    use_rslora: bool = False,
) -> AdapterSpec:
    """The specification of an adapter for a :class:`SentenceClassifier` on this base.

    Args:
        base: from :func:`find_base`.
        labels: names of the classes.
        rank: LoRA rank, the same for every module.
        alpha: LoRA alpha.
        targets: which projections of the attention: ``query``, ``key``, ``value``.
        layers: which layers, counted from 0; None for the last two.
        use_rslora: scale by sqrt(rank) instead of rank.

    Raises:
        BaseUnsupported: if a layer or a target is not there.
        SpecError: if rank, alpha or labels are out of bounds.
    """
    chosen = tuple(range(max(0, base.layers - 2), base.layers)) if layers is None else layers
    for layer in chosen:
        if not 0 <= layer < base.layers:
            raise BaseUnsupported(f"layers: {layer} is outside 0..{base.layers - 1} of {base.name}")
    for target in targets:
        if target not in ("query", "key", "value"):
            raise BaseUnsupported(f"targets: {target!r} is not one of query, key, value")
    modules = tuple(
        ModuleSpec(
            f"encoder.encoder.layer.{layer}.attention.self.{target}",
            d_in=base.hidden,
            d_out=base.hidden,
            rank=rank,
            alpha=alpha,
        )
        for layer in chosen
        for target in targets
    )
    head = (
        TensorSpec("classifier.weight", (len(labels), base.hidden)),
        TensorSpec("classifier.bias", (len(labels),)),
    )
    return AdapterSpec(
        base.digest,
        modules,
        head,
        use_rslora=use_rslora,
        task="sequence-classification",
        labels=tuple(labels),
    )


def first_trained_layer(spec: AdapterSpec, layers: int) -> int:
    """Index of the lowest layer that the adapter touches; ``layers`` if it touches none."""
    lowest = layers
    for module in spec.modules:
        head, _, rest = module.name.partition("encoder.encoder.layer.")
        # A module outside the layers (an embedding) means that nothing below is frozen.
        lowest = min(lowest, int(rest.split(".")[0]) if rest and not head else 0)
    return lowest


def attach(model: SentenceClassifier, spec: AdapterSpec) -> Any:
    """Wrap the model with PEFT's LoRA layers as the specification says, and set ``model.split``.

    Returns:
        a ``peft.PeftModel`` in evaluation mode, whose adapter and head are trainable.
    """
    from peft import LoraConfig, get_peft_model

    fields = dict(peft_layout.peft_config(spec, "base"))
    known = set(LoraConfig.__dataclass_fields__)
    config = LoraConfig(**{key: value for key, value in fields.items() if key in known})
    config.base_model_name_or_path = None  # a public name is written at export, never a path
    config.task_type = None  # the classifier is ours, not one of PEFT's task wrappers
    config.inference_mode = False
    model.split = first_trained_layer(spec, len(model.layers))
    return get_peft_model(model, config).eval()


def load_tensors(peft_model: Any, adapter: Adapter) -> None:
    """Copy an adapter into the model's own tensors, in place; optimisers keep their references.

    Raises:
        BaseUnsupported: if the model was attached with another specification.
    """
    slots = parameter_slots(peft_model, adapter.spec)
    with torch.no_grad():
        for key, value in adapter:
            slots[key].copy_(torch.from_numpy(np.array(value)))


def read_tensors(peft_model: Any, spec: AdapterSpec) -> Adapter:
    """Copy the model's adapter out."""
    slots = parameter_slots(peft_model, spec)
    return Adapter(spec, {key: slots[key].detach().cpu().numpy().copy() for key in spec.shapes()})


def parameter_slots(peft_model: Any, spec: AdapterSpec) -> dict[str, Tensor]:
    """The model's trainable parameters by the names that PEFT gives them in a saved adapter."""
    slots: dict[str, Tensor] = {}
    for name, parameter in peft_model.named_parameters():
        key = name.replace(".modules_to_save.default.", ".").replace(".default", "")
        if ".original_module." not in name:
            slots[key] = parameter
    shapes = spec.shapes()
    wrong = [k for k, shape in shapes.items() if k not in slots or slots[k].shape != shape]
    if wrong:
        raise BaseUnsupported(
            f"the model was attached with another specification: {wrong[0]} is missing or has "
            "another shape"
        )
    return {key: slots[key] for key in shapes}
