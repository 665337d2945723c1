"""Adapters of every PEFT type for a base model of :mod:`tests.device.tiny`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from aggregation import peft_types
from aggregation.adapter import Adapter
from aggregation.spec import AdapterSpec, TensorSpec
from clients.adapter_specs import adapter_spec
from clients.base import BaseRef
from tests.device.tiny import LABELS

METHODS = ("ia3", "prompt", "prefix", "bottleneck")


def spec_of(base: BaseRef, method: str, layers: tuple[int, ...] | None = None) -> AdapterSpec:
    if method in ("dora", "biases", "norms"):
        return lora_and(base, method)
    return adapter_spec(
        base, LABELS, 2, 4.0, layers=layers, method=method, virtual_tokens=3, bottleneck=5
    )


def lora_and(base: BaseRef, what: str) -> AdapterSpec:
    """LoRA with something besides, as no method of ours makes it."""
    plain = adapter_spec(base, LABELS, 2, 4.0, layers=(1,))
    if what == "dora":
        norms = [
            TensorSpec(m.name + ".lora_magnitude_vector", (base.hidden,)) for m in plain.modules
        ]
        return replace(plain, others=(*plain.others, *norms), settings=(("use_dora", True),))
    if what == "biases":
        biases = [TensorSpec(m.name + ".base_layer.bias", (base.hidden,)) for m in plain.modules]
        return replace(plain, others=(*plain.others, *biases), settings=(("bias", "lora_only"),))
    norm = "encoder.encoder.layer.0.output.LayerNorm"
    both = (TensorSpec(norm + ".weight", (32,)), TensorSpec(norm + ".bias", (32,)))
    return replace(plain, others=(*plain.others, *both))


def random(spec: AdapterSpec, seed: int = 0) -> Adapter:
    """Far from the start; what multiplies stays positive."""
    rng = np.random.default_rng(seed)
    scales = peft_types.scales(spec)
    return Adapter(
        spec,
        {
            key: rng.uniform(0.5, 2.0, shape) if key in scales else rng.normal(0, 0.5, shape)
            for key, shape in spec.shapes().items()
        },
    )
