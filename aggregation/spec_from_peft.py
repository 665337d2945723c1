"""From a PEFT configuration and tensor shapes to a specification, for folders that are not ours.

Shapes and ranks come from the tensors; the configuration adds alphas, rsLoRA and the orientation,
and is refused where it asks for what is neither plain LoRA, DoRA nor a trained bias. Other PEFT
types are read by :mod:`aggregation.named_from_peft`.

    >>> shapes = {"base_model.model.query.lora_A.weight": (2, 8),
    ...           "base_model.model.query.lora_B.weight": (4, 2)}
    >>> spec = spec_from_peft({"peft_type": "LORA", "r": 2, "lora_alpha": 16}, shapes,
    ...                       "sha256:" + "0" * 64)
    >>> spec.scale("query")
    8.0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from aggregation import named_from_peft, peft_types
from aggregation.peft_types import LORA, MAGNITUDE_SUFFIX, Setting
from aggregation.spec import (
    MICRO,
    PREFIX,
    AdapterSpec,
    ModuleSpec,
    Orientation,
    SpecError,
    TensorSpec,
)

_FLOAT32 = 5e-7  # a few roundings of it: so far may an alpha be from whole millionths
_MOST = 1e12  # of a whole number that has no float, such as 10^400, nothing can be asked
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "EA",
    ".lora_embedding_B": "EB",
}
# Fields that change what the tensors mean; each must be absent or empty.
_NOT_PLAIN = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# With bias="all" peft also saves what it keeps of a module that is saved whole: its frozen bias,
# and the trained one once more under an inner name. Neither is ever read back into a model.
_SHADOWS = (".original_module.bias", ".modules_to_save.bias")


def tensors_from_peft(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a folder by the names that they have in a specification.

    Raises:
        SpecError: if a name does not belong to the PEFT type.
    """
    kind = str(config.get("peft_type"))
    names = [name for name in tensors if not name.endswith(_SHADOWS)]
    return {peft_types.key_in_file(kind, name): tensors[name] for name in names}


def spec_from_peft(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], base_digest: str
) -> AdapterSpec:
    """The specification of an adapter that other software wrote.

    Args:
        config: the parsed ``adapter_config.json``.
        shapes: shape of each tensor, by its name as :func:`tensors_from_peft` gives it.
        base_digest: ``sha256:<hex>`` of the base model.

    Raises:
        SpecError: naming the field or tensor that is not supported.
    """
    if config.get("peft_type") in named_from_peft.TYPES:
        return named_from_peft.named_spec(config, shapes, base_digest)
    settings = _check_plain(config)
    factors, others = _sort(shapes)
    transposed = bool(config.get("fan_in_fan_out", False))
    modules = []
    for name, parts in factors.items():
        embedding = set(parts) == {"EA", "EB"}
        if not embedding and set(parts) != {"A", "B"}:
            raise SpecError(_lacking(name, parts))
        right, left = (parts["EA"], parts["EB"]) if embedding else (parts["A"], parts["B"])
        if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
            raise SpecError(f"module {name}: factors of shapes {left} and {right} do not fit")
        _check_rank(config, name, right[0])
        orientation = Orientation.CONV1D if transposed else Orientation.LINEAR
        modules.append(
            ModuleSpec(
                name,
                d_in=right[1],
                d_out=left[0],
                rank=right[0],
                alpha=_alpha(config, name),
                orientation=Orientation.EMBEDDING if embedding else orientation,
            )
        )
    task = named_from_peft.TASKS.get(str(config.get("task_type")), "feature")
    rslora = bool(config.get("use_rslora", False))
    return AdapterSpec(base_digest, tuple(modules), others, rslora, task, settings=settings)


def _check_plain(config: Mapping[str, Any]) -> tuple[tuple[str, Setting], ...]:
    """Refuse what is not supported, and give the settings of what is not plain."""
    if config.get("peft_type") != LORA:
        allowed = ", ".join((LORA, *named_from_peft.TYPES))
        raise SpecError(f"peft_type is {config.get('peft_type')!r}; allowed: {allowed}")
    settings: dict[str, Setting] = {"use_dora": True} if config.get("use_dora") else {}
    if config.get("bias", "none") != "none":
        settings["bias"] = config["bias"]
    for name in _NOT_PLAIN:
        if config.get(name):
            raise SpecError(f"{name} is set, which is not plain LoRA and is not supported")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in ("gaussian", "orthogonal", "eva"):
        # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA move the base weights too.
        raise SpecError(
            f"init_lora_weights is {start!r}, which changes the base weights; save the adapter "
            "converted to plain LoRA (save_pretrained, path_initial_model_for_weight_conversion)"
        )
    return tuple(settings.items())


def _sort(
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, dict[str, tuple[int, ...]]], tuple[TensorSpec, ...]]:
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    others = []
    for key, shape in shapes.items():
        if not key.startswith(PREFIX):
            raise SpecError(f"tensor {key!r} does not begin with {PREFIX!r}")
        name = key.removeprefix(PREFIX)
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        if suffix:
            factors.setdefault(name.removesuffix(suffix), {})[_SUFFIXES[suffix]] = shape
        elif (".lora_" in name and not name.endswith(MAGNITUDE_SUFFIX)) or (
            ".base_layer." in name and not name.endswith(".base_layer.bias")
        ):
            raise SpecError(
                f"tensor {name!r} is not plain LoRA; save the adapter with "
                "save_embedding_layers=False, and without LoRA biases"
            )
        else:
            others.append(TensorSpec(name, tuple(shape)))
    return factors, tuple(others)


def _lacking(name: str, parts: Mapping[str, tuple[int, ...]]) -> str:
    """Which tensor is not there, of a module that has not exactly both factors of one kind."""
    missing = {"A": "B", "B": "A", "EA": "EB", "EB": "EA"}
    for suffix, part in _SUFFIXES.items():
        if part not in parts and missing[part] in parts:
            return f"tensor {PREFIX}{name}{suffix} is missing; a module needs both factors"
    return f"module {name} has the factors of a linear layer and of an embedding; expected one kind"


def _check_rank(config: Mapping[str, Any], name: str, rank: int) -> None:
    said = _setting(config, "rank_pattern", "r", name)
    if said != rank:
        raise SpecError(f"module {name}: the tensors have rank {rank}, the configuration {said}")


def _alpha(config: Mapping[str, Any], name: str) -> float:
    """A module's alpha in whole millionths, if that is the same to the precision of float32.

    Such as 16 / 3 and 8 sqrt(2), which scalings that PEFT does not know are written as.
    """
    alpha = _setting(config, "alpha_pattern", "lora_alpha", name)
    if not math.isfinite(alpha):
        return alpha
    near = round(alpha * MICRO) / MICRO
    return near if abs(near - alpha) <= _FLOAT32 * abs(alpha) else alpha


def _setting(config: Mapping[str, Any], pattern: str, default: str, module: str) -> float:
    """A rank or an alpha as peft resolves it: the first pattern that is the name or its suffix."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise SpecError(f"{pattern} is {type(patterns).__name__}; expected an object")
    value = config.get(default)
    for key, candidate in patterns.items():
        name = key.removeprefix("^").replace("\\.", ".")
        if not name.replace(".", "").replace("_", "").isalnum():
            raise SpecError(f"{pattern}: {key!r} is a regular expression; give full module names")
        if module == name or (not key.startswith("^") and module.endswith("." + name)):
            value = candidate
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _MOST:
        raise SpecError(f"{default} for {module} is {value!r:.40}; expected a number")
    return value
