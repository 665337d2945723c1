"""A specification as the configuration that PEFT reads, field by field, for every PEFT type.

>>> from aggregation.spec import AdapterSpec, ModuleSpec
>>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))
>>> config = peft_config(spec, "base")
>>> config["r"], config["lora_alpha"], config["target_modules"], config["use_dora"]
(2, 16, ['query'], False)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from aggregation import peft_types
from aggregation.spec import MICRO, TASK_TYPES, AdapterSpec, Orientation

DEFAULTS: Mapping[str, Any] = {"bias": "none", "use_dora": False, "prefix_projection": False}
"""What peft means where a configuration leaves a field out."""
_INCIDENTAL = {
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "lora_dropout",
    "modules_to_save",
    "task_type",
}


def peft_config(spec: AdapterSpec, base_name: str) -> dict[str, Any]:
    """The ``adapter_config.json`` of a specification.

    Patterns are anchored full names (``^encoder.query``), because peft matches them as suffixes.
    ``task_type`` is given for language models, and for prompts and prefixes, which peft knows only
    by task. Others leave it out: peft's wrapper for classifiers passes arguments that only
    transformers' own classes accept, and ``modules_to_save`` says all that it needs.

    Args:
        spec: the adapter.
        base_name: public name of the base model, never a path.

    Returns:
        The fields that peft's own configuration of the type needs; all others are left to its
        defaults.
    """
    by_task = spec.peft_type in peft_types.PROMPTS or spec.task == "causal-lm"
    task = (TASK_TYPES[spec.task] or "FEATURE_EXTRACTION") if by_task else None
    return {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "modules_to_save": sorted({tensor.module for tensor in spec.whole}) or None,
        "peft_type": spec.peft_type,
        "task_type": task,
        **_FIELDS[spec.peft_type](spec),
    }


def meaning(spec: AdapterSpec) -> dict[str, Any]:
    """The fields of the configuration that change what the tensors mean."""
    return {k: v for k, v in peft_config(spec, "").items() if k not in _INCIDENTAL}


def _lora(spec: AdapterSpec) -> dict[str, Any]:
    rank = _most_common(m.rank for m in spec.modules)
    alpha = _most_common(m.alpha for m in spec.modules)
    transposed = any(m.orientation is Orientation.CONV1D for m in spec.modules)
    return {
        "alpha_pattern": {f"^{m.name}": _number(m.alpha) for m in spec.modules if m.alpha != alpha},
        "bias": spec.setting("bias", "none"),
        "fan_in_fan_out": transposed,
        "lora_alpha": _number(alpha or 1),
        "lora_dropout": 0.0,
        "r": rank or 1,
        "rank_pattern": {f"^{m.name}": m.rank for m in spec.modules if m.rank != rank},
        "target_modules": [m.name for m in spec.modules],
        "use_dora": spec.setting("use_dora", False),
        "use_rslora": spec.use_rslora,
    }


def _ia3(spec: AdapterSpec) -> dict[str, Any]:
    return {
        "fan_in_fan_out": spec.setting("fan_in_fan_out"),
        "feedforward_modules": [
            peft_types.adapted(t) for t in spec.own if peft_types.feedforward(t)
        ],
        "target_modules": [peft_types.adapted(tensor) for tensor in spec.own],
    }


def _prompt(spec: AdapterSpec) -> dict[str, Any]:
    tokens, width = peft_types.prompt_shape(spec)
    return {
        "num_attention_heads": spec.setting("heads"),
        "num_layers": spec.setting("layers"),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tokens,
        "token_dim": width,
    }


def _prefix(spec: AdapterSpec) -> dict[str, Any]:
    width = peft_types.prompt_shape(spec)[1]
    return {**_prompt(spec), "encoder_hidden_size": width, "prefix_projection": False}


def _bottleneck(spec: AdapterSpec) -> dict[str, Any]:
    ups = [t for t in spec.own if t.name.endswith(peft_types.UP_SUFFIX)]
    return {
        "act_fn": spec.setting("activation"),
        "depth": 0,
        "r": ups[0].shape[1],
        "scaling": int(spec.setting("scaling_micro")) / MICRO,
        "target_modules": [peft_types.adapted(tensor) for tensor in ups],
    }


_FIELDS: Mapping[str, Any] = {
    peft_types.LORA: _lora,
    peft_types.IA3: _ia3,
    peft_types.PROMPT: _prompt,
    peft_types.PREFIX_TUNING: _prefix,
    peft_types.BOTTLENECK: _bottleneck,
}


def _most_common(values: Any) -> Any:
    counted = Counter(values)
    return min(counted, key=lambda value: (-counted[value], value)) if counted else None


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
