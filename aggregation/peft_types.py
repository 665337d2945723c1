"""The PEFT types that an adapter may have: what each adds to a specification.

======== =============== ==================================================== =====================
method   ``peft_type``   the adapter's own tensors                            settings
======== =============== ==================================================== =====================
lora     LORA            factors of modules; DoRA magnitudes; biases          use_dora, bias
ia3      IA3             ``<module>.ia3_l``, (d_out, 1), or (1, d_in) for a    fan_in_fan_out
                         feed-forward module
prompt   PROMPT_TUNING   the virtual tokens, (tokens, width)                  heads, layers
prefix   PREFIX_TUNING   keys and values, (tokens, 2 layers width)            heads, layers
bottle-  PEANUT          ``<module>.peanut_A.weight`` (r, d_out) and          activation,
neck                     ``<module>.peanut_B.weight`` (d_out, r)              scaling_micro
======== =============== ==================================================== =====================

Only LORA has *modules*, whose meaning is a product of factors. The tensors of the other types mean
something one by one, like a head, and are averaged one by one.

Names of tensors are made here and in :mod:`aggregation.module_spec`, and nowhere else. It knows
nothing of files and of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aggregation.module_spec import MICRO, PREFIX, SpecError, TensorSpec

if TYPE_CHECKING:
    from aggregation.spec import AdapterSpec

Setting = str | int | bool

LORA, IA3, PROMPT, PREFIX_TUNING, BOTTLENECK = (
    "LORA",
    "IA3",
    "PROMPT_TUNING",
    "PREFIX_TUNING",
    "PEANUT",
)
METHODS: Mapping[str, str] = {
    "lora": LORA,
    "ia3": IA3,
    "prompt": PROMPT,
    "prefix": PREFIX_TUNING,
    "bottleneck": BOTTLENECK,
}
PROMPTS = (PROMPT, PREFIX_TUNING)
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
MAX_VIRTUAL_TOKENS = 1024
MAX_LAYERS = 1024

PROMPT_NAME = "prompt_encoder.embedding.weight"
IA3_SUFFIX = ".ia3_l"
DOWN_SUFFIX, UP_SUFFIX = ".peanut_A.weight", ".peanut_B.weight"
MAGNITUDE_SUFFIX = ".lora_magnitude_vector"
BIAS_SUFFIX = ".bias"
_FILE_PROMPT, _FILE_PREFIX = "prompt_embeddings", "base_model."

# By type: each setting and what it may be, a kind or the values themselves. Those of LORA are left
# out where they are PEFT's defaults, so that a plain LoRA adapter has none.
_SETTINGS: Mapping[str, Mapping[str, type[Any] | tuple[Setting, ...]]] = {
    LORA: {"bias": ("all", "lora_only"), "use_dora": (True,)},
    IA3: {"fan_in_fan_out": bool},
    PROMPT: {"heads": int, "layers": int},
    PREFIX_TUNING: {"heads": int, "layers": int},
    BOTTLENECK: {"activation": ACTIVATIONS, "scaling_micro": int},
}


def check(spec: AdapterSpec) -> None:
    """Refuse a specification that contradicts its type.

    Raises:
        SpecError: naming the field or tensor, and what is allowed.
    """
    if spec.peft_type not in _SETTINGS:
        raise SpecError(
            f"peft_type {spec.peft_type!r} is not supported; allowed: {', '.join(_SETTINGS)}"
        )
    _check_settings(spec)
    if spec.peft_type == LORA:
        _check_lora(spec)
        return
    if spec.modules or spec.use_rslora:
        raise SpecError(f"{spec.peft_type} has no LoRA modules and no use_rslora, only tensors")
    if not own_tensors(spec):
        raise SpecError(f"{spec.peft_type}: the adapter has none of the tensors of its type")
    if spec.peft_type in PROMPTS:
        _check_prompt(spec)
    elif spec.peft_type == IA3:
        for tensor in own_tensors(spec):
            if len(tensor.shape) != 2 or 1 not in tensor.shape:
                raise SpecError(f"{tensor.name}: shape {tensor.shape} is not (d, 1) or (1, d)")
    else:
        _check_bottleneck(spec)


def own_tensors(spec: AdapterSpec) -> tuple[TensorSpec, ...]:
    """The named tensors that belong to the type; the others replace tensors of the base whole."""
    return tuple(tensor for tensor in spec.others if _is_own(spec, tensor))


def whole_tensors(spec: AdapterSpec) -> tuple[TensorSpec, ...]:
    """The tensors of modules that are saved whole, such as a classification head."""
    return tuple(tensor for tensor in spec.others if not _is_own(spec, tensor))


def scales(spec: AdapterSpec) -> frozenset[str]:
    """Keys of the tensors that multiply what the base computes: IA3 vectors, DoRA magnitudes.

    A relative error of them is one of the whole layer, not one of its small change: they must not
    be rounded as factors may be.
    """
    suffixes = (IA3_SUFFIX, MAGNITUDE_SUFFIX)
    return frozenset(t.key for t in own_tensors(spec) if t.name.endswith(suffixes))


def prompt_shape(spec: AdapterSpec) -> tuple[int, int]:
    """(virtual tokens, width) of a prompt or prefix; (0, 0) of any other type."""
    if spec.peft_type not in PROMPTS:
        return 0, 0
    tokens, width = own_tensors(spec)[0].shape
    layers = spec.setting("layers")
    return tokens, width if spec.peft_type == PROMPT else width // (2 * int(layers))


def feedforward(tensor: TensorSpec) -> bool:
    """Whether an IA3 vector multiplies the input of its module, and not the output."""
    return tensor.shape[0] == 1 and tensor.shape[1] > 1


def adapted(tensor: TensorSpec) -> str:
    """The module of the base that one of the type's own tensors belongs to."""
    for suffix in (IA3_SUFFIX, DOWN_SUFFIX, UP_SUFFIX, MAGNITUDE_SUFFIX, ".base_layer.bias"):
        if tensor.name.endswith(suffix):
            return tensor.name.removesuffix(suffix)
    return tensor.module


def fitting(tensor: TensorSpec, d_out: int, d_in: int) -> tuple[int, ...]:
    """The shape that one of the type's own tensors must have at a layer of the base."""
    if tensor.name.endswith(IA3_SUFFIX):
        return (1, d_in) if feedforward(tensor) else (d_out, 1)
    if tensor.name.endswith(DOWN_SUFFIX):
        return tensor.shape[0], d_out
    if tensor.name.endswith(UP_SUFFIX):
        return d_out, tensor.shape[1]
    return (d_out,)


def file_key(spec: AdapterSpec, key: str) -> str:
    """The name that a tensor has in a PEFT folder; peft names those of prompts differently."""
    if spec.peft_type not in PROMPTS:
        return key
    name = key.removeprefix(PREFIX)
    return _FILE_PROMPT if name == PROMPT_NAME else _FILE_PREFIX + name


def key_in_file(peft_type: str, name: str) -> str:
    """The inverse of :func:`file_key`.

    Raises:
        SpecError: no file of this type has such a tensor.
    """
    if peft_type not in PROMPTS:
        return name
    if name == _FILE_PROMPT:
        return PREFIX + PROMPT_NAME
    if not name.startswith(_FILE_PREFIX) or name.startswith(PREFIX):
        raise SpecError(f"tensor {name!r} is neither {_FILE_PROMPT!r} nor of a saved module")
    return PREFIX + name.removeprefix(_FILE_PREFIX)


def _is_own(spec: AdapterSpec, tensor: TensorSpec) -> bool:
    kind, name = spec.peft_type, tensor.name
    if kind == IA3:
        return name.endswith(IA3_SUFFIX)
    if kind == BOTTLENECK:
        return name.endswith((DOWN_SUFFIX, UP_SUFFIX))
    if kind in PROMPTS:
        return name == PROMPT_NAME
    return name.endswith(MAGNITUDE_SUFFIX) or _is_trained_bias(spec, tensor)


def _is_trained_bias(spec: AdapterSpec, tensor: TensorSpec) -> bool:
    """Whether peft's ``bias`` trains the tensor, and not ``modules_to_save``."""
    if not spec.setting("bias", "") or not tensor.name.endswith(BIAS_SUFFIX):
        return False
    return not any(t.module == tensor.module and t != tensor for t in spec.others)


def _check_settings(spec: AdapterSpec) -> None:
    allowed, given = _SETTINGS[spec.peft_type], dict(spec.settings)
    missing = set() if spec.peft_type == LORA else set(allowed) - set(given)
    if missing or set(given) - set(allowed) or len(given) != len(spec.settings):
        raise SpecError(
            f"{spec.peft_type}: settings are {sorted(given)}; expected {sorted(allowed)}"
        )
    for name, value in given.items():
        kind = allowed[name]
        if isinstance(kind, tuple):
            if value not in kind or type(value) is not type(kind[0]):
                words = ", ".join(map(str, kind))
                raise SpecError(f"{spec.peft_type}: {name}={value!r} is not one of {words}")
        elif type(value) is not kind:
            raise SpecError(f"{spec.peft_type}: {name}={value!r} must be {kind.__name__}")


def _check_lora(spec: AdapterSpec) -> None:
    norms = {t.name.removesuffix(MAGNITUDE_SUFFIX): t for t in spec.others if _magnitude(t)}
    for tensor in spec.others:
        strange = ".lora_" in tensor.name and not _magnitude(tensor)
        if strange or (".base_layer." in tensor.name and not _is_trained_bias(spec, tensor)):
            raise SpecError(f"{tensor.name} is neither a factor, a magnitude nor a trained bias")
    if not spec.setting("use_dora", False):
        if norms:
            raise SpecError(f"{min(norms)} has a magnitude, but use_dora is not set")
        return
    for module in spec.modules:
        found = norms.pop(module.name, None)
        if found is None or found.shape != (module.d_out,):
            raise SpecError(
                f"{module.name}{MAGNITUDE_SUFFIX} has shape {found.shape if found else None}; "
                f"use_dora needs {(module.d_out,)}"
            )
    if norms:
        raise SpecError(f"{min(norms)} has a magnitude but no factors")


def _magnitude(tensor: TensorSpec) -> bool:
    return tensor.name.endswith(MAGNITUDE_SUFFIX)


def _check_prompt(spec: AdapterSpec) -> None:
    shape = own_tensors(spec)[0].shape
    layers, heads = int(spec.setting("layers")), int(spec.setting("heads"))
    if not (1 <= layers <= MAX_LAYERS and 1 <= heads <= MAX_LAYERS):
        raise SpecError(f"layers={layers} and heads={heads} must be in 1..{MAX_LAYERS}")
    parts = 1 if spec.peft_type == PROMPT else 2 * layers
    if len(shape) != 2 or shape[0] > MAX_VIRTUAL_TOKENS or shape[1] % (parts * heads):
        raise SpecError(
            f"{PROMPT_NAME}: shape {shape} is not (tokens, n), with at most {MAX_VIRTUAL_TOKENS} "
            f"tokens and n a multiple of {parts * heads}"
        )


def _check_bottleneck(spec: AdapterSpec) -> None:
    scaling = int(spec.setting("scaling_micro"))
    if not 0 < scaling <= 4096 * MICRO:
        raise SpecError(f"scaling_micro={scaling} must be above 0 and at most {4096 * MICRO}")
    shapes = {tensor.name: tensor.shape for tensor in own_tensors(spec)}
    ranks = set()
    for name in {adapted(tensor) for tensor in own_tensors(spec)}:
        down, up = shapes.get(name + DOWN_SUFFIX, ()), shapes.get(name + UP_SUFFIX, ())
        if len(down) != 2 or up != down[::-1]:
            raise SpecError(
                f"{name}: shapes {down} and {up} are not (r, d_out) and (d_out, r) of one layer"
            )
        ranks.add(down[0])
    if len(ranks) != 1:
        raise SpecError(f"bottlenecks of sizes {sorted(ranks)}; all layers must have the same")
