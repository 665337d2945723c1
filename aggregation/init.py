"""The adapter that a federation starts from: changes nothing yet, and can learn at once.

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

from aggregation.adapter import Adapter
from aggregation.spec import AdapterSpec, Orientation

HEAD_DEVIATION = 0.02


def initial_adapter(spec: AdapterSpec, seed: int) -> Adapter:
    """Draw the start of a training run.

    A is uniform in +-1/sqrt(d_in), which is Kaiming's rule with a = sqrt(5) as peft uses it
    (Hu et al. 2021, section 4.1, and peft's ``reset_lora_parameters``); B is zero. For an
    embedding A is standard normal, as in peft. Weights of a head are normal with deviation 0.02,
    vectors (biases) zero.

    Args:
        spec: what to draw.
        seed: any integer; each tensor has its own stream, derived from the seed and its name, so
            that adding a module does not move the others.

    Returns:
        An adapter whose product is zero in every module.
    """
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
    for other in spec.others:
        if len(other.shape) > 1:
            generator = _generator(seed, other.key)
            draw = generator.normal(0.0, HEAD_DEVIATION, other.shape)
            tensors[other.key] = draw.astype(np.float32)
    return Adapter(spec, tensors)


def _generator(seed: int, key: str) -> np.random.Generator:
    word = hashlib.sha256(f"airpeft.init:{seed}:{key}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(word[:16], "big")))
