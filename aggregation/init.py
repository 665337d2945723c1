"""The adapter that a federation starts from: changes nothing yet, and can learn at once.

(A prompt or a prefix can't change nothing: there is no token that nobody attends to.)

    >>> from aggregation.spec import AdapterSpec, ModuleSpec
    >>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))
    >>> first, again = initial_adapter(spec, seed=7), initial_adapter(spec, seed=7)
    >>> first.digest == again.digest, float(abs(first.factors("query")[0]).max())
    (True, 0.0)

Every client has to start from the same A: independent draws would make the mean of the factors
meaningless. So the adapter is drawn once, by the server, and travels like any other.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from aggregation import peft_types
from aggregation.adapter import Adapter
from aggregation.spec import AdapterSpec, Orientation, SpecError, TensorSpec

HEAD_DEVIATION = 0.02
PROMPT_DEVIATION = 0.02


def initial_adapter(spec: AdapterSpec, seed: int) -> Adapter:
    """Draw the start of a training run.

    A is uniform in +-1/sqrt(d_in), which is Kaiming's rule with a = sqrt(5) as peft uses it
    (Hu et al. 2021, section 4.1, and peft's ``reset_lora_parameters``); B is zero. For an
    embedding A is standard normal, as in peft. Weights of a head are normal with deviation 0.02,
    vectors (biases) zero.

    IA3 vectors are one, which changes nothing (Liu et al. 2022, 2205.05638, section 3.3). Of a
    bottleneck the way down is drawn as A is, and the way up is zero, which changes nothing either.
    Virtual tokens, keys and values are normal with deviation 0.02, as BERT draws its embeddings.

    Args:
        spec: what to draw.
        seed: any integer; each tensor has its own stream, derived from the seed and its name, so
            that adding a module does not move the others.

    Returns:
        An adapter whose product is zero in every module.

    Raises:
        SpecError: for DoRA, and for trained biases: they start at values of the base's own weights,
            which are not known here.
    """
    if spec.settings and spec.peft_type == peft_types.LORA:
        raise SpecError(
            "DoRA magnitudes and trained biases start at the base's own values; start from an "
            "adapter folder that peft has made"
        )
    tensors = {key: np.zeros(shape, np.float32) for key, shape in spec.shapes().items()}
    for module in spec.modules:
        key, _ = module.keys
        generator = _generator(seed, key)
        shape = (module.rank, module.d_in)
        if module.orientation is Orientation.EMBEDDING:
            tensors[key] = generator.standard_normal(shape).astype(np.float32)
        else:
            bound = 1.0 / math.sqrt(module.d_in)
            tensors[key] = generator.uniform(-bound, bound, shape).astype(np.float32)
    for other in spec.whole:
        if len(other.shape) > 1:
            generator = _generator(seed, other.key)
            draw = generator.normal(0.0, HEAD_DEVIATION, other.shape)
            tensors[other.key] = draw.astype(np.float32)
    for own in spec.own:
        tensors[own.key] = _first(own, _generator(seed, own.key))
    return Adapter(spec, tensors)


def _first(tensor: TensorSpec, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """The start of a tensor that belongs to a PEFT type without modules."""
    if tensor.name.endswith(peft_types.IA3_SUFFIX):
        return np.ones(tensor.shape, np.float32)
    if tensor.name.endswith(peft_types.UP_SUFFIX):
        return np.zeros(tensor.shape, np.float32)
    if tensor.name.endswith(peft_types.DOWN_SUFFIX):
        bound = 1.0 / math.sqrt(tensor.shape[1])
        return generator.uniform(-bound, bound, tensor.shape).astype(np.float32)
    return generator.normal(0.0, PROMPT_DEVIATION, tensor.shape).astype(np.float32)


def _generator(seed: int, key: str) -> np.random.Generator:
    word = hashlib.sha256(f"airpeft.init:{seed}:{key}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(word[:16], "big")))
