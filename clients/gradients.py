"""Which way to gradients per example an adapter will get, said before a model is loaded.

    >>> from aggregation.spec import ModuleSpec, TensorSpec
    >>> query = ModuleSpec("query", 64, 64, rank=8, alpha=16.0)
    >>> spec = AdapterSpec("sha256:" + "0" * 64, (query,), (TensorSpec("classifier.bias", (2,)),))
    >>> planned_mode(spec, Assignment()).name
    'linear'

A client decides by the model that it has in memory (``privacy.per_example.choose``); the tests hold
the two against each other for every method and every recipe.
"""

from __future__ import annotations

import math

from aggregation.spec import AdapterSpec
from aggregation.train import Assignment
from privacy.per_example import Mode, mode_of

BYTES = 4  # adapters train in single precision


def planned_mode(spec: AdapterSpec, assignment: Assignment) -> Mode:
    """The mode of a client that trains this adapter so.

    Args:
        spec: of the adapter. Its factors and a classification head are linear layers; what other
            types of adapters have of their own is not.
        assignment: which factors train.
    """
    values = sum(math.prod(tensor.shape) for tensor in spec.others)
    for module in spec.modules:
        shapes = {
            "A": module.rank * module.d_in,
            "B": module.d_out * module.rank,
            "core": module.rank**2,
        }
        values += shapes.get(assignment.trains, shapes["A"] + shapes["B"])
    other = f"{spec.own[0].name}, which is no linear layer," if spec.own else ""
    return mode_of(BYTES * values, other)
