"""Training the core alone: ``B R A`` with B and A frozen, on the layers that PEFT has made.

PEFT's layer computes ``s lora_B(lora_A(x))``. For the time of a training, ``lora_B`` is R followed
by the frozen left factor of the public basis (``aggregation.core_basis``), both plain linear
layers: autograd gives the exact gradient of R, and Opacus that of every example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aggregation import core_basis
from aggregation.adapter import Adapter
from aggregation.errors import RecipeError

ADAPTER = "default"  # PEFT's name of the one adapter that we attach


@contextmanager
def inserted(peft_model: Any, start: Adapter, seed: int) -> Iterator[dict[str, nn.Linear]]:
    """Put a trainable R between the factors of every module, and take it out again.

    Args:
        peft_model: with the adapter already loaded.
        start: the adapter; its A is that of the basis.
        seed: of the public basis.

    Yields:
        by module, the layer whose weight, (r, r), is R.

    Raises:
        RecipeError: if the adapter is not on the basis, or a module is not linear.
    """
    basis = core_basis.basis(start.spec, seed)
    cores = core_basis.core_of(start, seed)
    _check_on_basis(start, basis)
    layers: dict[str, nn.Linear] = {}
    with ExitStack() as undo:
        for module in start.spec.modules:
            holder = lora_layer(peft_model, module.name, "train the core of").lora_B
            core = nn.Linear(module.rank, module.rank, bias=False)
            left = nn.Linear(module.rank, module.d_out, bias=False).requires_grad_(False)
            with torch.no_grad():
                core.weight.copy_(tensor_of(cores[module.name]))
                left.weight.copy_(tensor_of(basis[module.name][0]))
            undo.callback(holder.__setitem__, ADAPTER, holder[ADAPTER])
            holder[ADAPTER] = nn.Sequential(core, left).train(holder[ADAPTER].training)
            layers[module.name] = core
        yield layers


def _check_on_basis(start: Adapter, basis: Mapping[str, tuple[Any, Any]]) -> None:
    for module in start.spec.modules:
        right = start.factors(module.name)[1]
        if not np.array_equal(right, np.asarray(basis[module.name][1], np.float32)):
            raise RecipeError(
                f"{module.name}: a core trains between the factors of the public basis, and this "
                "adapter's A is another; hand out what core_basis.settle makes of it"
            )


def read(
    start: Adapter, cores: Mapping[str, nn.Linear], slots: Mapping[str, Tensor], seed: int
) -> Adapter:
    """The adapter as it is now.

    Args:
        start: for its specification.
        cores: from :func:`inserted`.
        slots: the model's parameters, for the tensors outside the modules.
        seed: of the public basis.
    """
    values = {name: array_of(layer.weight) for name, layer in cores.items()}
    others = {tensor.key: array_of(slots[tensor.key]) for tensor in start.spec.others}
    return core_basis.with_core(start.spec, values, seed, others)


def lora_layer(peft_model: Any, name: str, verb: str) -> Any:
    """PEFT's layer around a module of the base.

    Args:
        peft_model: the model.
        name: of the module.
        verb: what it is wanted for, for the message.

    Raises:
        RecipeError: if PEFT has put no LoRA for linear layers there, or a variant such as DoRA.
    """
    layer = peft_model.get_base_model().get_submodule(name)
    if ADAPTER not in getattr(layer, "lora_B", {}) or getattr(layer, "lora_variant", None):
        raise RecipeError(
            f"cannot {verb} {name}, which is no linear layer with plain LoRA on it; "
            "choose a recipe with train=both"
        )
    return layer


def tensor_of(array: Any) -> Tensor:
    """A float32 copy."""
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def array_of(tensor: Tensor) -> Any:
    """A copy in NumPy."""
    return tensor.detach().cpu().numpy().copy()
