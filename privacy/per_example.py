"""One gradient for each example, from the backward pass that is made anyway; and how it is chosen.

    >>> from torch import nn
    >>> choose(nn.Sequential(nn.Linear(3, 2), nn.ReLU())).name
    'linear'
    >>> choose(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))).name
    'hooks'

Two modes, the same gradients:

* ``linear``, ours: a linear layer that trains forms ``G_i = g_i^T x_i`` for each example i of the
  batch (Goodfellow 2015, arXiv:1510.01799) instead of their sum, which nobody needs. Only for
  models in which nothing but plain linear layers trains.
* ``hooks``, Opacus' own: for every layer that Opacus knows, or that brings gradients per example
  of its own. Autograd forms the summed gradients as well, and they are thrown away.

Ghost clipping, Opacus' third way, is not offered. It saves the memory of the gradients per example
and pays for it with a second backward pass; those of an adapter are so small that there is nothing
to save, and a batch whose gradients would be too large is split instead (``rows_at_once``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from privacy.errors import PrivacyError

LINEAR, HOOKS = "linear", "hooks"
MODES = (LINEAR, HOOKS)
# Of gradients per example at once; beyond it, a batch goes through in smaller parts.
SAMPLE_BYTES = 64 << 20


class MechanismError(PrivacyError):
    """A model that cannot be trained privately as it is, or that did not train."""


@dataclass(frozen=True)
class Mode:
    """How gradients per example are computed.

    Attributes:
        name: one of ``MODES``.
        reason: why, in a sentence.
        rows_at_once: how many examples may go through the model together, so that their gradients
            take at most ``SAMPLE_BYTES``; at least 1.
    """

    name: str
    reason: str
    rows_at_once: int


def choose(model: nn.Module, asked: str | None = None) -> Mode:
    """The cheapest mode that is right for what trains in a model.

    Args:
        model: with the flags ``requires_grad`` as they will be in training.
        asked: the one to take instead, if it is right too.

    Raises:
        MechanismError: if what was asked for is no mode, or not right for this model.
    """
    trained = list(_trained(model))
    size = sum(p.numel() * p.element_size() for _, _, own in trained for p in own)
    other = next((t for t in trained if not _plain(t[1])), None)
    what = "" if other is None else f"{other[0] or 'the model'}, a {type(other[1]).__name__},"
    return mode_of(size, what, asked)


def mode_of(size: int, other: str = "", asked: str | None = None) -> Mode:
    """The mode for what is known of a model without having it.

    Args:
        size: bytes of all that trains.
        other: the first thing that trains and is no plain linear layer, in words that "trains too"
            may follow; empty if there is none.
        asked: as for :func:`choose`, and refused alike.

    Raises:
        MechanismError: as :func:`choose`.
    """
    if asked not in (None, *MODES):
        raise MechanismError(f"mode={asked!r} is not one of {', '.join(MODES)}")
    rows = max(1, SAMPLE_BYTES // max(1, size))
    cost = (
        f"an example's gradient takes {size / 1e3:,.0f} kB, too little to pay a second backward "
        "pass for, as ghost clipping does"
    )
    if not other and asked != HOOKS:
        return Mode(LINEAR, f"only linear layers train; {cost}", rows)
    why = f"{other} trains too" if other else "it was asked for"
    if asked == LINEAR:
        raise MechanismError(f"mode={LINEAR!r} is for linear layers only: {why}")
    return Mode(HOOKS, f"{why}; {cost}", rows)


@contextmanager
def linear_gradients(model: nn.Module) -> Iterator[LinearGradients]:
    """Make the linear layers that train form gradients per example, until the block is left.

    Args:
        model: one for which :func:`choose` says ``linear``.

    Yields:
        what takes the gradients after each backward pass.
    """
    layers = {name: layer for name, layer, _ in _trained(model) if isinstance(layer, nn.Linear)}
    try:
        yield LinearGradients(layers)
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


class LinearGradients:
    """What the backward passes left behind.

    Args:
        layers: by name; until ``forward`` is removed from them again, they compute as before.
    """

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        self._layers = layers
        self._found: dict[str, list[tuple[Tensor | None, Tensor | None]]] = {}
        for name, layer in layers.items():
            self._found[name] = []
            layer.forward = _Forward(layer, self._found[name])

    def collect(self, examples: int) -> None:
        """Put the gradients of the last backward pass where Opacus' clipping looks for them.

        Args:
            examples: how many were in it.

        Raises:
            MechanismError: if a layer was not used, or saw something else than examples in its
                first dimension, or a parameter had a part in the loss past its own layer: its
                gradient would not be that of one example.
        """
        samples: dict[nn.Parameter, list[Tensor]] = {}
        for name, layer in self._layers.items():
            if not self._found[name]:
                raise MechanismError(f"{name} trains, but no example's loss depends on it")
            for weight, bias in self._found[name]:
                for parameter, sample in ((layer.weight, weight), (layer.bias, bias)):
                    if sample is None:
                        continue
                    if len(sample) != examples:
                        raise MechanismError(
                            f"{name} saw {len(sample)} rows for {examples} examples: the first "
                            "dimension of its input must be the examples"
                        )
                    if parameter.grad is not None:
                        raise MechanismError(
                            f"a parameter of {name} is used past its layer: that use has no "
                            "gradient per example"
                        )
                    samples.setdefault(parameter, []).append(sample)
            self._found[name].clear()
        for parameter, found in samples.items():  # several, if a layer was used several times
            parameter.grad_sample = found[0] if len(found) == 1 else torch.stack(found).sum(dim=0)


class _Forward:
    """A layer's forward pass that remembers gradients per example."""

    def __init__(self, layer: nn.Linear, found: list[tuple[Tensor | None, Tensor | None]]) -> None:
        self._layer, self._found = layer, found

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = _PerExample.apply(x, self._layer.weight, self._layer.bias, self._found)
        return out


class _PerExample(torch.autograd.Function):  # type: ignore[misc]
    """``x W^T + b``; its backward pass forms one gradient of W and b for each row of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, found: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.found = found
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows, seen = grad.reshape(len(grad), -1, grad.shape[-1]), x.reshape(len(x), -1, x.shape[-1])
        ctx.found.append(
            (
                torch.bmm(rows.transpose(1, 2), seen) if needs_weight else None,
                rows.sum(dim=1) if needs_bias else None,
            )
        )
        return grad @ weight if needs_x else None, None, None, None


def _plain(layer: nn.Module) -> bool:
    """Whether it is a linear layer that nobody has changed."""
    return type(layer) is nn.Linear and "forward" not in vars(layer)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Parameter]]]:
    """Every layer that has trainable parameters of its own."""
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own:
            yield name, module, own
