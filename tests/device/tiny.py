"""A base model of a few kilobytes in the layout of a real one, and adapters for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from aggregation.adapter import Adapter
from clients.base import BaseRef, find_base

LABELS = ("negative", "positive")
WORDS = ["good", "bad", "film", "the", "a", "very", "not", "was", "plot", "fun", "dull", "."]
TEXTS = ("the film was good", "a very dull plot .", "not bad", "fun fun fun", "the plot was bad")


def make_base(folder: Path, *, seed: int = 0) -> BaseRef:
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = list(dict.fromkeys(vocabulary))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    model = BertModel(config, add_pooling_layer=False)
    for name, value in model.named_parameters():
        if value.ndim == 2 and "embeddings" in name:
            value.data.normal_(0.0, 1.0)
    model.save_pretrained(folder)
    tokens = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    )
    return find_base(folder)


def make_adapter(
    base: BaseRef, seed: int, *, labels: tuple[str, ...] = LABELS, strength: float = 1.0
) -> Adapter:
    from clients.model import adapter_spec

    spec = adapter_spec(base, labels, rank=4, alpha=8.0)
    rng = np.random.default_rng(seed)
    return Adapter(
        spec, {key: strength * rng.normal(0, 0.5, shape) for key, shape in spec.shapes().items()}
    )
