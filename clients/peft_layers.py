"""PEFT's layers where they stand in the way of training a batch, with the same function.

What training needs is that every trainable parameter is used inside the forward of the module that
owns it, with the batch as first dimension: that is what hooks can see, and from which they make the
gradient of each example on its own (``privacy.local``). PEFT does otherwise in three places:

* IA3 multiplies by a vector that lies in a dictionary, which has no forward;
* a bottleneck (PEANuT) computes a whole weight first, in which there are no examples any more;
* a prompt is looked up once, and repeated for the batch.

Names of parameters stay as PEFT has them, so everything that saves and loads goes on working. A
module says its gradients per example by ``per_example_gradients(activations, backprops)``, in the
form of Opacus' grad samplers.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModelForSequenceClassification
from peft.tuners.ia3.layer import Linear as Ia3Linear
from peft.tuners.peanut.layer import Linear as PeanutLinear
from torch import Tensor, nn
from transformers.activations import ACT2FN

from aggregation import peft_types

NAME = "default"


def batch_first(peft_model: Any) -> Any:
    """Rewrite the layers of a model in place; gives the model."""
    for module in peft_model.modules():
        if type(module) is Ia3Linear:
            module.ia3_l = Vector(module.ia3_l)
            module.__class__ = BatchedIa3
        elif type(module) is PeanutLinear:
            down = Down(module)
            module.peanut_A[NAME] = down
            module.__class__ = BatchedPeanut
    return peft_model


class Vector(nn.ParameterDict):  # type: ignore[misc]  # torch is untyped here
    """The IA3 vector of a layer, as a module that multiplies by it."""

    __call__ = nn.Module.__call__  # a plain dictionary of parameters refuses to be called

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (n, T, d) by the vector, of shape (d, 1) or (1, d)."""
        product: Tensor = x * self[NAME].flatten()
        return product

    def per_example_gradients(
        self, activations: list[Tensor], backprops: Tensor
    ) -> dict[Tensor, Tensor]:
        """Of each example the sum over its tokens of input times gradient."""
        vector = self[NAME]
        summed = torch.einsum("n...d,n...d->nd", activations[0], backprops)
        return {vector: summed.reshape(-1, *vector.shape)}


class BatchedIa3(Ia3Linear):  # type: ignore[misc]
    """An IA3 layer whose vector is used by the module that owns it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, with one adapter, always on."""
        if self.is_feedforward:
            changed: Tensor = self.base_layer(self.ia3_l(x), *args, **kwargs)
        else:
            changed = self.ia3_l(self.base_layer(x, *args, **kwargs))
        return changed


class Down(nn.Linear):  # type: ignore[misc]
    """The way down of a bottleneck: x -> x f(A W)^T, W the frozen weight of the layer, (r, d_out).

    As a map of activations it is linear, and its weight is f(A W). What the examples of a batch
    share is A alone, whose gradient is that of f(A W), times f', times W^T.
    """

    def __init__(self, layer: Any) -> None:
        nn.Module.__init__(self)
        self.weight = layer.peanut_A[NAME].weight
        self.bias = None
        self._function = ACT2FN[layer.act_fn[NAME]]
        # In a list, so that the frozen weight does not become a parameter of this module.
        self._layer = [layer]

    def forward(self, x: Tensor) -> Tensor:
        """(n, T, d_in) -> (n, T, r)."""
        down: Tensor = self._function(self.weight @ self._base)
        return x @ down.T

    @property
    def _base(self) -> Tensor:
        weight: Tensor = self._layer[0].get_base_layer().weight
        return weight

    def per_example_gradients(
        self, activations: list[Tensor], backprops: Tensor
    ) -> dict[Tensor, Tensor]:
        """Of each example (sum over tokens of g x^T, times f'(A W)) W^T."""
        with torch.enable_grad():
            inner = (self.weight.detach() @ self._base.detach()).requires_grad_()
            (slope,) = torch.autograd.grad(self._function(inner).sum(), inner)  # f is elementwise
        outer = torch.einsum("n...r,n...i->nri", backprops, activations[0])
        return {self.weight: (outer * slope) @ self._base.T}


class BatchedPeanut(PeanutLinear):  # type: ignore[misc]
    """A bottleneck that goes through the batch: x -> W x + s B f(A W) x."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, with one adapter, always on."""
        change = self.peanut_B[NAME](self.peanut_A[NAME](x))
        changed: Tensor = self.base_layer(x, *args, **kwargs) + self.scaling[NAME] * change
        return changed


class PromptedClassifier(PeftModelForSequenceClassification):  # type: ignore[misc]
    """A prompt or prefix on a :class:`clients.model.SentenceClassifier`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        trunk: Tensor | None = None,
    ) -> Tensor:
        """Logits of a classifier's own inputs; a prefix may start from its ``trunk``."""
        if attention_mask is None:
            raise ValueError("give attention_mask")
        rows = attention_mask.shape[0]
        tokens = self.prompt_tokens[NAME].unsqueeze(0).expand(rows, -1)
        mask = torch.cat([attention_mask.new_ones(tokens.shape), attention_mask], dim=1)
        model = self.get_base_model()
        if self.active_peft_config.peft_type == peft_types.PREFIX_TUNING:
            past = self.get_prompt(rows)
            logits: Tensor = model(input_ids, mask, trunk, past_key_values=past)
            return logits
        prompt = self.prompt_encoder[NAME](tokens)
        embedded = torch.cat([prompt, self.word_embeddings(input_ids)], dim=1)
        logits = model(attention_mask=mask, inputs_embeds=embedded)
        return logits
