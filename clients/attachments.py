"""What hangs on a loaded model while one client trains or measures, and comes off again.

An assignment says which tensors move. Here it is made true on the PEFT model: what is frozen has
no gradient at all (so it is neither clipped nor noised), what is masked has one of exactly zero,
and a core stands between two frozen factors. Adapters beside the trained one are added by hooks on
the base's own layers. On leaving, every hook, layer and flag is as before; the base's weights are
shared by all models of the process and are never written.

    with attached(peft_model, start, assignment) as attachment:
        ... train attachment.factors and attachment.whole ...
        trained = attachment.read()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aggregation.adapter import Adapter
from aggregation.rank_selection import Mask
from aggregation.spec import AdapterSpec, Orientation
from aggregation.train import Assignment
from clients import cores
from clients import model as models
from clients.base import BaseUnsupported
from clients.cores import ADAPTER, lora_layer, tensor_of


@dataclass(eq=False)
class Mix:
    """Weights of a whole batch: one for all rows, or a tensor of one per row.

    Attributes:
        weight: set before each forward pass.
    """

    weight: float | Tensor = 1.0

    def of(self, output: Tensor) -> float | Tensor:
        """The weight in a form that multiplies a layer's output, rows first."""
        if isinstance(self.weight, Tensor):
            return self.weight.reshape(-1, *(1,) * (output.ndim - 1))
        return self.weight


@dataclass(frozen=True, eq=False)
class Attachment:
    """An adapter on a model, ready to train.

    Attributes:
        factors: what trains of the adapter itself: factors, cores, or the tensors of another type.
        whole: what trains of the tensors that replace the base's: the head.
        masks: by parameter name, 1 where an entry trains and 0 where it does not.
        read: the adapter as it is now.
    """

    factors: list[Tensor]
    whole: list[Tensor]
    masks: Mapping[str, Tensor]
    read: Callable[[], Adapter]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    def mask_gradients(self) -> None:
        """Make the gradient of every masked entry exactly zero."""
        for name, mask in self.masks.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.mul_(mask)


def frozen(beside: Sequence[Adapter]) -> list[tuple[Adapter, Mix]]:
    """Adapters that stand beside at their full weight."""
    return [(adapter, Mix()) for adapter in beside]


@contextmanager
def attached(
    peft_model: Any,
    start: Adapter,
    assignment: Assignment,
    *,
    beside: Sequence[tuple[Adapter, Mix]] = (),
    chosen: Mapping[str, Mask] | None = None,
    whole: bool = True,
) -> Iterator[Attachment]:
    """Load an adapter into a model as an assignment says.

    Args:
        peft_model: from ``clients.model.attach`` for the same specification.
        start: the adapter that training starts from.
        assignment: which factors train.
        beside: frozen adapters, and the weight of each.
        chosen: by module, the rank indices that train; None for all.
        whole: whether a head trains too.

    Raises:
        BaseUnsupported: if an adapter does not fit the model.
        RecipeError: if a core is asked for and the start is not on its basis.
    """
    spec = start.spec
    with ExitStack() as undo:
        models.load_tensors(peft_model, start)
        slots = models.parameter_slots(peft_model, spec)
        undo.callback(_require, [(slot, slot.requires_grad) for slot in slots.values()])
        for adapter, mix in beside:
            undo.enter_context(applied(peft_model, adapter, mix))
        keys = {tensor.key for tensor in spec.whole}
        trains = _trained(spec, assignment.trains) | {tensor.key for tensor in spec.own}
        for key, slot in slots.items():
            slot.requires_grad_(key in trains or (key in keys and whole))
        factors = [slots[key] for key in slots if key in trains]
        read = lambda: models.read_tensors(peft_model, spec)  # noqa: E731
        if assignment.trains == "core":
            layers = undo.enter_context(cores.inserted(peft_model, start, assignment.seed))
            factors = [layer.weight for layer in layers.values()]
            factors += [slots[tensor.key] for tensor in spec.own]
            read = lambda: cores.read(start, layers, slots, assignment.seed)  # noqa: E731
        named = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        yield Attachment(
            factors,
            [slots[key] for key in sorted(keys)] if whole else [],
            _masks(spec, slots, named, chosen) if chosen is not None else {},
            read,
            named,
        )


@contextmanager
def applied(peft_model: Any, adapter: Adapter, mix: Mix | None = None) -> Iterator[None]:
    """Add a frozen adapter's ``s B A x`` to the output of the base's layers.

    Tensors outside its modules are not used: the head is the trained adapter's.

    Args:
        peft_model: the model.
        adapter: at any rank and scale of its own.
        mix: its weight; None for 1.

    Raises:
        BaseUnsupported: if a module is not there, or has another shape.
    """
    mix = mix or Mix()
    if adapter.spec.own:
        raise BaseUnsupported(
            f"an adapter beside is {adapter.spec.peft_type} with {adapter.spec.own[0].name}: only "
            "plain LoRA is a sum that can stand beside; choose a recipe that keeps none"
        )
    with ExitStack() as undo:
        for module in adapter.spec.modules:
            layer = base_layer(peft_model, module.name)
            left, right = adapter.factors(module.name)
            scaled = left.astype(np.float64) * adapter.spec.scale(module.name)
            up, down = tensor_of(scaled.T), tensor_of(right.T)  # (r, d_out), (d_in, r)
            if _shape(layer) not in ((module.d_out, module.d_in), None):
                raise BaseUnsupported(
                    f"an adapter beside has module {module.name} of shape {module.d_out} x "
                    f"{module.d_in}; the model's is {_shape(layer)}"
                )
            looked_up = module.orientation is Orientation.EMBEDDING
            handle = layer.register_forward_hook(_adding(up, down, mix, looked_up=looked_up))
            undo.callback(handle.remove)
        inner = peft_model.get_base_model()
        undo.callback(setattr, inner, "split", inner.split)
        inner.split = lowest_split(peft_model, [adapter])
        yield


@contextmanager
def weighted(peft_model: Any, spec: AdapterSpec, mix: Mix) -> Iterator[None]:
    """Multiply the trained adapter's own ``s B A x`` by a weight."""

    def scale(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * mix.of(output)

    with ExitStack() as undo:
        for module in spec.modules:
            last = lora_layer(peft_model, module.name, "weigh").lora_B[ADAPTER]
            undo.callback(last.register_forward_hook(scale).remove)
        yield


def lowest_split(peft_model: Any, beside: Sequence[Adapter]) -> int:
    """The lowest layer that the model's adapter or one beside it touches.

    What runs only once for each text must lie below all of them.
    """
    inner = peft_model.get_base_model()
    layers, own = len(inner.layers), int(inner.split)
    return min([own, *(models.first_trained_layer(a.spec, layers) for a in beside)])


def base_layer(peft_model: Any, name: str) -> nn.Module:
    """The base's own layer of this name, below whatever PEFT has put around it.

    Raises:
        BaseUnsupported: if there is none.
    """
    try:
        layer = peft_model.get_base_model().get_submodule(name)
    except AttributeError:
        raise BaseUnsupported(f"the model has no module {name}") from None
    found: nn.Module = getattr(layer, "base_layer", layer)
    return found


def _trained(spec: AdapterSpec, trains: str) -> set[str]:
    """Names of the factors that train."""
    sides = {"both": (0, 1), "A": (0,), "B": (1,), "core": ()}[trains]
    return {module.keys[side] for module in spec.modules for side in sides}


def _masks(
    spec: AdapterSpec,
    slots: Mapping[str, Tensor],
    named: Mapping[str, Tensor],
    chosen: Mapping[str, Mask],
) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in named.items()}
    masks = {}
    for module in spec.modules:
        mask = torch.from_numpy(np.asarray(chosen[module.name], np.float32))
        key_a, key_b = module.keys
        for key, shaped in ((key_a, mask[:, None]), (key_b, mask[None, :])):
            if id(slots[key]) in names:
                masks[names[id(slots[key])]] = shaped
    return masks


def _adding(up: Tensor, down: Tensor, mix: Mix, *, looked_up: bool) -> Callable[..., Tensor]:
    def add(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        thin = down[inputs[0]] if looked_up else inputs[0] @ down
        extra: Tensor = thin @ up
        if isinstance(mix.weight, float) and mix.weight == 1.0:
            return output + extra
        return output + extra * mix.of(extra)

    return add


def _shape(layer: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a layer, if it says so."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    return None


def _require(before: Sequence[tuple[Tensor, bool]]) -> None:
    for slot, required in before:
        slot.requires_grad_(required)
