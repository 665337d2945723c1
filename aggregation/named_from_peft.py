"""From a PEFT configuration to a specification, for the types that have no LoRA modules.

>>> shapes = {"base_model.model.layer.key.ia3_l": (4, 1)}
>>> spec = named_spec({"peft_type": "IA3"}, shapes, "sha256:" + "0" * 64)
>>> spec.peft_type, spec.own[0].name
('IA3', 'layer.key.ia3_l')

Which modules are adapted, and how, is read off the tensors; the configuration adds the few settings
that they do not show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from aggregation import peft_types
from aggregation.module_spec import MICRO, PREFIX, SpecError, TensorSpec
from aggregation.peft_types import Setting
from aggregation.spec import AdapterSpec

TASKS: Mapping[str, str] = {"SEQ_CLS": "sequence-classification", "CAUSAL_LM": "causal-lm"}


def named_spec(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], base_digest: str
) -> AdapterSpec:
    """The specification of an IA3, prompt, prefix or bottleneck adapter.

    Args:
        config: the parsed ``adapter_config.json``.
        shapes: shape of each tensor, by its key in a specification.
        base_digest: ``sha256:<hex>`` of the base model.

    Raises:
        SpecError: naming the field or tensor that is not supported.
    """
    kind = str(config["peft_type"])
    settings = TYPES[kind](config)
    others = []
    for key, shape in shapes.items():
        if not key.startswith(PREFIX):
            raise SpecError(f"tensor {key!r} does not begin with {PREFIX!r}")
        others.append(TensorSpec(key.removeprefix(PREFIX), tuple(shape)))
    return AdapterSpec(
        base_digest,
        others=tuple(others),
        task=TASKS.get(str(config.get("task_type")), "feature"),
        peft_type=kind,
        settings=tuple(settings.items()),
    )


def _ia3(config: Mapping[str, Any]) -> dict[str, Setting]:
    return {"fan_in_fan_out": config.get("fan_in_fan_out", False) is True}


def _prompt(config: Mapping[str, Any]) -> dict[str, Setting]:
    task = config.get("task_type")
    if task not in (*TASKS, "FEATURE_EXTRACTION"):
        allowed = ", ".join((*TASKS, "FEATURE_EXTRACTION"))
        raise SpecError(f"task_type is {task!r}; prompts and prefixes need one of {allowed}")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise SpecError(
            f"num_transformer_submodules is {config['num_transformer_submodules']!r}; allowed: 1"
        )
    return {
        "heads": _number(config, "num_attention_heads"),
        "layers": _number(config, "num_layers"),
    }


def _bottleneck(config: Mapping[str, Any]) -> dict[str, Setting]:
    if config.get("depth", 0) != 0:
        raise SpecError(f"depth is {config['depth']!r}; allowed: 0 (one layer down, one up)")
    scaling = config.get("scaling", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, int | float):
        raise SpecError(f"scaling is {scaling!r}; expected a number")
    micro = scaling * MICRO
    if not abs(micro) < 1e15 or abs(micro - round(micro)) > 1e-3:
        raise SpecError(f"scaling is {scaling!r}; expected whole millionths")
    return {"activation": config.get("act_fn", "relu"), "scaling_micro": round(micro)}


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int:
        raise SpecError(f"{name} is {value!r}; expected a whole number")
    return value


TYPES: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Setting]]] = {
    peft_types.IA3: _ia3,
    peft_types.PROMPT: _prompt,
    peft_types.PREFIX_TUNING: _prompt,  # saved as projected, so a projection leaves no trace
    peft_types.BOTTLENECK: _bottleneck,
}
