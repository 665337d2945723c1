"""Where PEFT is configured and its parameters are named: adapters go in and come out here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aggregation import peft_types
from aggregation.adapter import Adapter
from aggregation.peft_config import peft_config
from aggregation.spec import PREFIX, AdapterSpec
from clients.adapter_specs import first_trained_layer
from clients.base import BaseUnsupported

if TYPE_CHECKING:
    from clients.model import SentenceClassifier


def attach(model: SentenceClassifier, spec: AdapterSpec) -> Any:
    """Wrap the model with PEFT's layers as the specification says, and set ``model.split``.

    What PEFT makes is rewritten where it would mix the examples of a batch, or go through its
    parameters where no hook sees it (``clients.peft_layers``); the function is the same.

    Returns:
        a ``peft.PeftModel`` in evaluation mode, whose adapter and head are trainable.

    Raises:
        BaseUnsupported: if PEFT cannot adapt this base so.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model

    from clients import peft_layers

    fields = peft_config(spec, "base")
    fields["base_model_name_or_path"] = None  # a public name is written at export, never a path
    fields["inference_mode"] = False
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[spec.peft_type]
    if spec.peft_type not in peft_types.PROMPTS:
        fields["task_type"] = None  # the classifier is ours, not one of PEFT's task wrappers
    config = kind(**{k: v for k, v in fields.items() if k in kind.__dataclass_fields__})
    model.split = first_trained_layer(spec, len(model.layers))
    try:
        if spec.peft_type in peft_types.PROMPTS:
            return peft_layers.PromptedClassifier(model, config).eval()
        return peft_layers.batch_first(get_peft_model(model, config)).eval()
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BaseUnsupported(f"PEFT cannot adapt this base so: {error}") from error


def load_tensors(peft_model: Any, adapter: Adapter) -> None:
    """Copy an adapter into the model's own tensors, in place; optimisers keep their references.

    Raises:
        BaseUnsupported: if the model was attached with another specification.
    """
    slots = parameter_slots(peft_model, adapter.spec)
    with torch.no_grad():
        for key, value in adapter:
            slots[key].copy_(torch.from_numpy(np.array(value)))


def read_tensors(peft_model: Any, spec: AdapterSpec) -> Adapter:
    """Copy the model's adapter out."""
    slots = parameter_slots(peft_model, spec)
    return Adapter(spec, {key: slots[key].detach().cpu().numpy().copy() for key in spec.shapes()})


def parameter_slots(peft_model: Any, spec: AdapterSpec) -> dict[str, Tensor]:
    """The model's trainable parameters, by their keys in a specification.

    Raises:
        BaseUnsupported: the model was attached with another specification.
    """
    slots: dict[str, Tensor] = {}
    for name, parameter in peft_model.named_parameters():
        if ".original_module." not in name:
            slots[_key(name, spec.peft_type)] = parameter
    shapes = spec.shapes()
    wrong = [k for k, shape in shapes.items() if k not in slots or slots[k].shape != shape]
    if wrong:
        raise BaseUnsupported(
            f"the model was attached with another specification: {wrong[0]} is missing or has "
            "another shape"
        )
    return {key: slots[key] for key in shapes}


def _key(parameter: str, peft_type: str) -> str:
    name = parameter.replace(".modules_to_save.default.", ".").replace(".default", "")
    if name.endswith(peft_types.MAGNITUDE_SUFFIX + ".weight"):
        return name.removesuffix(".weight")  # as peft saves it
    if peft_type not in peft_types.PROMPTS or name.startswith(PREFIX):
        return name
    return PREFIX + name.removeprefix("base_model.")  # peft puts a prompt beside the model
