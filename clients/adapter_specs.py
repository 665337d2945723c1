"""Specifications of adapters for a sentence classifier, one for each method. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aggregation import peft_types
from aggregation.module_spec import MICRO
from aggregation.spec import AdapterSpec, ModuleSpec, TensorSpec
from clients.base import BaseRef, BaseUnsupported

VIRTUAL_TOKENS = 16
BOTTLENECK = 16
_LAYERS = "encoder.encoder.layer."
_HEAD = "classifier"


def adapter_spec(
    base: BaseRef,
    labels: Sequence[str],
    rank: int,
    alpha: float,
    targets: Sequence[str] = ("query", "value"),
    layers: Sequence[int] | None = None,
    use_rslora: bool = False,
    *,
    method: str = "lora",
    virtual_tokens: int = VIRTUAL_TOKENS,
    bottleneck: int = BOTTLENECK,
) -> AdapterSpec:
    """The specification of an adapter for a :class:`clients.model.SentenceClassifier` on this base.

    * ``lora``: low-rank factors on the targets of the chosen layers (Hu et al. 2021, 2106.09685).
    * ``ia3``: vectors that multiply the keys, the values and the inside of the feed-forward maps of
      the chosen layers (Liu et al. 2022, 2205.05638, section 3.3).
    * ``prompt``: virtual tokens before the text (Lester et al. 2021, 2104.08691).
    * ``prefix``: virtual keys and values in the chosen layers, which must be the uppermost ones (Li
      and Liang 2021, 2101.00190; in some layers only, as in P-tuning v2, 2110.07602).
    * ``bottleneck``: PEANuT (2410.01870), the type that peft has for bottlenecks: down to a few
      units, ReLU, up again, beside the targets of the chosen layers. It reads the frozen weight and
      not the activation, so it costs nothing at inference once loaded.

    All have the classification head besides.

    Args:
        base: from :func:`clients.base.find_base`.
        labels: names of the classes.
        rank: LoRA rank, the same for every module.
        alpha: LoRA alpha.
        targets: which projections of the attention: ``query``, ``key``, ``value``.
        layers: which layers, counted from 0; None for the last two.
        use_rslora: scale by sqrt(rank) instead of rank.
        method: see above.
        virtual_tokens: how many, of a prompt or prefix.
        bottleneck: units in the middle of a bottleneck.

    Raises:
        BaseUnsupported: if a layer, a target or the method is not there.
        SpecError: if a size or the labels are out of bounds.
    """
    if method not in peft_types.METHODS:
        words = ", ".join(peft_types.METHODS)
        raise BaseUnsupported(f"method: {method!r} is not one of {words}")
    chosen = tuple(range(max(0, base.layers - 2), base.layers)) if layers is None else layers
    for layer in chosen:
        if not 0 <= layer < base.layers:
            raise BaseUnsupported(f"layers: {layer} is outside 0..{base.layers - 1} of {base.name}")
    for target in targets:
        if target not in ("query", "key", "value"):
            raise BaseUnsupported(f"targets: {target!r} is not one of query, key, value")
    names = [f"{_LAYERS}{i}.attention.self.{target}" for i in chosen for target in targets]
    others: tuple[TensorSpec, ...] = (
        TensorSpec(f"{_HEAD}.weight", (len(labels), base.hidden)),
        TensorSpec(f"{_HEAD}.bias", (len(labels),)),
    )
    fields: dict[str, Any] = {}
    if method == "lora":
        fields["modules"] = tuple(
            ModuleSpec(name, base.hidden, base.hidden, rank, alpha) for name in names
        )
        fields["use_rslora"] = use_rslora
    elif method == "ia3":
        others += _vectors(base, chosen)
        fields["settings"] = (("fan_in_fan_out", False),)
    elif method == "bottleneck":
        others += _bottlenecks(base, names, bottleneck)
        fields["settings"] = (("activation", "relu"), ("scaling_micro", MICRO))
    else:
        others += (_virtual(base, method, chosen, virtual_tokens),)
        used = len(chosen) if method == "prefix" else base.layers
        fields["settings"] = (("heads", base.heads), ("layers", used))
    return AdapterSpec(
        base.digest,
        others=others,
        task="sequence-classification",
        labels=tuple(labels),
        peft_type=peft_types.METHODS[method],
        **fields,
    )


def first_trained_layer(spec: AdapterSpec, layers: int) -> int:
    """Index of the lowest layer that the adapter touches; ``layers`` if it touches none."""
    if spec.peft_type == peft_types.PROMPT:
        return 0
    lowest = layers
    if spec.peft_type == peft_types.PREFIX_TUNING:
        lowest = max(0, layers - int(spec.setting("layers")))
    names = [module.name for module in spec.modules]
    if spec.peft_type not in peft_types.PROMPTS:
        names += [peft_types.adapted(tensor) for tensor in spec.own]
    for name in names + [tensor.module for tensor in spec.whole]:
        before, _, rest = name.partition(_LAYERS)
        # A module outside the layers (an embedding) means that nothing below is frozen.
        above = layers if name == _HEAD else 0
        lowest = min(lowest, int(rest.split(".")[0]) if rest and not before else above)
    return lowest


def _vectors(base: BaseRef, layers: Sequence[int]) -> tuple[TensorSpec, ...]:
    places = [
        *((f"{i}.attention.self.{name}", (base.hidden, 1)) for i in layers for name in _ATTENTION),
        *((f"{i}.output.dense", (1, base.inner)) for i in layers),
    ]
    suffix = peft_types.IA3_SUFFIX
    return tuple(TensorSpec(f"{_LAYERS}{place}{suffix}", shape) for place, shape in places)


_ATTENTION = ("key", "value")


def _bottlenecks(base: BaseRef, names: Sequence[str], units: int) -> tuple[TensorSpec, ...]:
    down, up = (units, base.hidden), (base.hidden, units)
    return tuple(
        TensorSpec(name + suffix, shape)
        for name in names
        for suffix, shape in ((peft_types.DOWN_SUFFIX, down), (peft_types.UP_SUFFIX, up))
    )


def _virtual(base: BaseRef, method: str, layers: Sequence[int], tokens: int) -> TensorSpec:
    if method == "prompt":
        return TensorSpec(peft_types.PROMPT_NAME, (tokens, base.hidden))
    if tuple(layers) != tuple(range(base.layers - len(layers), base.layers)):
        raise BaseUnsupported(
            f"layers: a prefix needs the uppermost ones of {base.name}, not {list(layers)}"
        )
    return TensorSpec(peft_types.PROMPT_NAME, (tokens, 2 * len(layers) * base.hidden))
