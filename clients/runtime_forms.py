"""What a version does to the base, whatever PEFT type its adapter has: one form for all.

At a linear layer every type comes down to

    y = scale * W (before * x) + shift + (x down) up

with some of the parts missing: LoRA and a bottleneck are ``down`` and ``up`` (once the frozen
weight is known, a bottleneck is a product like LoRA's), IA3 is ``scale`` or ``before``, DoRA is
``scale``, ``shift`` and the product (Liu et al. 2024, 2402.09353, eq. 5), trained biases are
``shift``. A prompt or a prefix stands before the text instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aggregation import peft_types
from aggregation.adapter import Adapter
from aggregation.spec import AdapterSpec, Orientation
from clients.base import BaseRef
from clients.model import Prefix
from clients.runtime import LoadError

HEAD = "classifier"


@dataclass(frozen=True, eq=False)
class Layer:
    """What a version does at one linear layer; a part that is None is not there.

    Attributes:
        down: (d_in, r).
        up: (r, d_out), all scales folded in.
        scale: (d_out), multiplies what the base gives.
        shift: (d_out), added.
        before: (d_in), multiplies the input.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    before: Tensor | None = None

    def after(self, x: Tensor, output: Tensor) -> Tensor:
        """The output of the layer, from its input and what the base gives for it."""
        if self.scale is not None:
            output = output * self.scale
        if self.shift is not None:
            output = output + self.shift
        if self.down is not None and self.up is not None:
            output = output + (x @ self.down) @ self.up
        return output


@dataclass(frozen=True, eq=False)
class State:
    """A version's tensors.

    Attributes:
        layers: by name of the base's linear layer.
        weight: (labels, hidden) of the head; None: the base's head of zeros.
        bias: (labels) of the head.
        prompt: (virtual tokens, hidden), before the text.
        prefix: keys and values before the text's.
        virtual: how many tokens stand before the text, of a prompt or prefix.
    """

    layers: Mapping[str, Layer] = field(default_factory=dict)
    weight: Tensor | None = None
    bias: Tensor | None = None
    prompt: Tensor | None = None
    prefix: Prefix | None = None
    virtual: int = 0


def make_state(adapter: Adapter, name: str, model: nn.Module, base: BaseRef) -> State:
    """Prepare an adapter for a base model.

    Args:
        adapter: checked by the guard.
        name: of the version, for messages.
        model: the classifier; its weights are read, never written.
        base: what the model is.

    Raises:
        LoadError: it is for another base, or touches what this engine cannot adapt.
    """
    spec = adapter.spec
    try:
        if spec.base_digest != base.digest:
            raise LoadError(f"made for base {spec.base_digest}, this engine runs {base.digest}")
        weight, bias = _head(adapter, base)
        if spec.peft_type in peft_types.PROMPTS:
            prompt, prefix = _virtual(adapter, base)
            tokens = peft_types.prompt_shape(spec)[0]
            return State({}, weight, bias, prompt, prefix, tokens)
        make = {peft_types.IA3: _ia3, peft_types.BOTTLENECK: _bottlenecks}.get(spec.peft_type)
        return State((make or _lora)(adapter, _finder(model, base.name)), weight, bias)
    except LoadError as error:
        raise LoadError(f"{name}: {error}") from None


Find = Callable[[str, tuple[int | None, int | None]], nn.Linear]


def _finder(model: nn.Module, base: str) -> Find:
    """Finds a linear layer of the encoder by name and (d_out, d_in), None for any."""
    modules = dict(model.named_modules())

    def find(name: str, shape: tuple[int | None, int | None]) -> nn.Linear:
        module = modules.get(name)
        if isinstance(module, nn.Linear) and name != HEAD:
            sizes = (module.out_features, module.in_features)
            if all(want in (None, got) for want, got in zip(shape, sizes, strict=True)):
                return module
        said = " x ".join(str(n) for n in shape if n is not None)
        raise LoadError(f"{name} of shape {said} is not a linear layer of {base}")

    return find


def _lora(adapter: Adapter, find: Find) -> dict[str, Layer]:
    spec = adapter.spec
    own = {tensor.name: adapter.tensors[tensor.key] for tensor in spec.own}
    layers = {}
    for module in spec.modules:
        if module.orientation is not Orientation.LINEAR:
            raise LoadError(f"{module.name} is {module.orientation}, not linear")
        linear = find(module.name, (module.d_out, module.d_in))
        B, A = adapter.factors(module.name)
        up, down = np.float32(spec.scale(module.name)) * B, tensor_of(A.T)
        norm = own.pop(module.name + peft_types.MAGNITUDE_SUFFIX, None)
        bias = own.pop(f"{module.name}.base_layer.bias", None)
        scale = None
        if norm is not None:
            with torch.inference_mode():
                whole = linear.weight + tensor_of(up) @ tensor_of(A)
                scale = tensor_of(norm) / torch.linalg.vector_norm(whole, dim=1)
        shift = _shift(linear, scale, bias)
        scaled = tensor_of(up.T) if scale is None else tensor_of(up.T) * scale
        layers[module.name] = Layer(down, scaled, scale, shift)
    if own:
        raise LoadError(f"{min(own)} is trained, which this engine does not serve")
    return layers


def _shift(linear: nn.Linear, scale: Tensor | None, bias: Any) -> Tensor | None:
    """What makes the layer's bias the trained one, if any, and never a scaled one."""
    old = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
    if bias is None and scale is None:
        return None
    new = old if bias is None else tensor_of(bias)
    return new - (old if scale is None else scale * old)


def _ia3(adapter: Adapter, find: Find) -> dict[str, Layer]:
    layers = {}
    for tensor in adapter.spec.own:
        name, vector = peft_types.adapted(tensor), tensor_of(adapter.tensors[tensor.key].ravel())
        if peft_types.feedforward(tensor):
            find(name, (None, len(vector)))
            layers[name] = Layer(before=vector)
        else:
            find(name, (len(vector), None))
            layers[name] = Layer(scale=vector)
    return layers


def _bottlenecks(adapter: Adapter, find: Find) -> dict[str, Layer]:
    """Down is f(A W), which is known once W is: (2410.01870, section 3)."""
    from transformers.activations import ACT2FN

    spec, layers = adapter.spec, {}
    values = {tensor.name: tensor_of(adapter.tensors[tensor.key]) for tensor in spec.own}
    scaling = float(int(spec.setting("scaling_micro")) / 1_000_000)
    for name in sorted({peft_types.adapted(tensor) for tensor in spec.own}):
        up = values[name + peft_types.UP_SUFFIX]
        linear = find(name, (len(up), None))
        with torch.inference_mode():
            down = values[name + peft_types.DOWN_SUFFIX] @ linear.weight
            down = ACT2FN[spec.setting("activation")](down)
            layers[name] = Layer(down.T.contiguous(), scaling * up.T)
    return layers


def _virtual(adapter: Adapter, base: BaseRef) -> tuple[Tensor | None, Prefix | None]:
    spec = adapter.spec
    (tokens, width), layers = peft_types.prompt_shape(spec), int(spec.setting("layers"))
    value = tensor_of(adapter.tensors[spec.own[0].key])
    prompt = spec.peft_type == peft_types.PROMPT
    fits = layers == base.layers if prompt else layers <= base.layers
    if not fits or width != base.hidden or spec.setting("heads") != base.heads:
        raise LoadError(
            f"virtual tokens for {layers} layers of width {width} with "
            f"{spec.setting('heads')} heads; {base.name} has {base.layers} of width {base.hidden} "
            f"with {base.heads}"
        )
    if prompt:
        if tokens > base.positions // 2:
            raise LoadError(
                f"{tokens} virtual tokens; {base.name} has {base.positions} positions, of "
                "which at most half may be virtual"
            )
        return value, None
    # As peft cuts it: (tokens, 2 layers, heads, width of a head), keys before values.
    cut = value.view(tokens, 2 * layers, base.heads, width // base.heads).permute(1, 2, 0, 3)
    pairs = [(cut[2 * i][None], cut[2 * i + 1][None]) for i in range(layers)]
    return None, Prefix(pairs, base.layers)


def _head(adapter: Adapter, base: BaseRef) -> tuple[Tensor, Tensor]:
    spec: AdapterSpec = adapter.spec
    allowed = {
        f"{HEAD}.weight": (len(spec.labels), base.hidden),
        f"{HEAD}.bias": (len(spec.labels),),
    }
    found = {tensor.name: tensor.shape for tensor in spec.whole}
    if not spec.labels or found != allowed:
        raise LoadError(
            f"a sentence classifier needs labels and the head {allowed}, the adapter has {found}"
        )
    tensors = {tensor.name: adapter.tensors[tensor.key] for tensor in spec.whole}
    return tensor_of(tensors[f"{HEAD}.weight"]), tensor_of(tensors[f"{HEAD}.bias"])


def tensor_of(array: Any) -> Tensor:
    """A float32 tensor that shares memory with nothing."""
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
