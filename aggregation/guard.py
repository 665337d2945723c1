"""The last look at an adapter before a runtime loads it. Signed is not the same as sane.

A signature says who released an adapter; this says whether its numbers and shapes can be loaded
at all: finite (an infinite query projection can still give finite logits, so looking at outputs
is not enough), of a plausible size, for this base model, and exactly the tensors announced (peft
only warns about missing ones, and then serves the bare base model).

    >>> import numpy as np
    >>> from aggregation.adapter import Adapter
    >>> from aggregation.spec import AdapterSpec, ModuleSpec
    >>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))
    >>> check(Adapter.zeros(spec), expected_base="sha256:" + "1" * 64)
    Traceback (most recent call last):
    ...
    aggregation.guard.GuardError: wrong-base: the adapter is for sha256:0000..., this device has ...

All or nothing, and nothing is changed. It knows nothing of signatures and of runtimes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from aggregation import peft_types, tensor_file
from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.spec import AdapterSpec, Orientation


class GuardReason(StrEnum):
    """Why an adapter must not be loaded."""

    WRONG_BASE = "wrong-base"
    WRONG_MODULE = "wrong-module"
    MISSING_TENSOR = "missing-tensor"
    UNKNOWN_TENSOR = "unknown-tensor"
    DUPLICATE_TENSOR = "duplicate-tensor"
    WRONG_SHAPE = "wrong-shape"
    WRONG_DTYPE = "wrong-dtype"
    BAD_HEADER = "bad-header"
    BAD_LAYOUT = "bad-layout"
    TOO_BIG = "too-big"
    NOT_FINITE = "not-finite"
    TOO_LARGE = "too-large"
    TOO_STRONG = "too-strong"


class GuardError(AggregationError):
    """An adapter that must not be loaded; ``reason`` is from a closed list."""

    def __init__(self, reason: GuardReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class GuardLimits:
    """What still counts as plausible. The defaults are far above what training produces.

    Attributes:
        max_bytes: size of a file, in bytes.
        max_abs: largest value of any tensor.
        max_rms: root mean square of any tensor.
        max_spectral: largest singular value of any module's update s B A. (A base weight of width
            384 to 4096 has one of about 2 to 100.)
    """

    max_bytes: int = 512 << 20
    max_abs: float = 100.0
    max_rms: float = 10.0
    max_spectral: float = 1000.0


def check(
    adapter: Adapter,
    *,
    expected_base: str,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    heads: Mapping[str, tuple[int, ...]] | None = None,
    limits: GuardLimits | None = None,
) -> None:
    """Refuse an adapter that must not be loaded.

    Args:
        adapter: decoded, not yet loaded.
        expected_base: digest of the base model on this device.
        shapes: (d_out, d_in) of the base model's layers by module name, as the product B A sees
            them; None if the runtime compares them itself. Vectors, magnitudes and bottlenecks are
            compared too; of a prompt or prefix only the width, layers and heads being the
            runtime's business.
        heads: shapes of the tensors that an adapter may replace whole, by name; None allows those
            that the specification lists.
        limits: bounds on the numbers.

    Raises:
        GuardError: with the reason, and the module or tensor.
    """
    limits = limits or GuardLimits()
    if adapter.spec.base_digest != expected_base:
        raise GuardError(
            GuardReason.WRONG_BASE,
            f"the adapter is for {adapter.spec.base_digest}, this device has {expected_base}",
        )
    if shapes is not None:
        _check_modules(adapter.spec, shapes)
        _check_own(adapter.spec, shapes)
    if heads is not None:
        _check_heads(adapter.spec, heads)
    for key, value in adapter:
        _check_values(key, value, limits)
    for module in adapter.spec.modules:
        _check_strength(adapter, module.name, limits.max_spectral)


def check_safetensors(data: bytes, spec: AdapterSpec, limits: GuardLimits | None = None) -> Adapter:
    """Read an adapter from safetensors bytes that nobody has looked at yet.

    Args:
        data: the whole file.
        spec: the signed specification; the file must hold exactly its tensors, as float32.
        limits: bounds on the file and its numbers.

    Returns:
        The adapter. :func:`check` is still to be asked about the base.

    Raises:
        GuardError: and nothing else, whatever the bytes are.
    """
    limits = limits or GuardLimits()
    if len(data) > limits.max_bytes:
        detail = f"the file has {len(data)} bytes; at most {limits.max_bytes} are allowed"
        raise GuardError(GuardReason.TOO_BIG, detail)
    try:
        tensors, _ = tensor_file.load(data)
    except tensor_file.TensorFileError as error:
        raise GuardError(GuardReason(error.reason.value), error.detail) from None
    shapes = spec.shapes()
    for key in sorted(shapes.keys() - tensors.keys()):
        raise GuardError(GuardReason.MISSING_TENSOR, f"{key} is not in the file")
    for key in sorted(tensors.keys() - shapes.keys()):
        raise GuardError(GuardReason.UNKNOWN_TENSOR, f"{key[:200]} is not in the specification")
    for key, shape in shapes.items():
        if tensors[key].shape != shape:
            detail = f"{key} has shape {tensors[key].shape}, expected {shape}"
            raise GuardError(GuardReason.WRONG_SHAPE, detail)
        if tensors[key].dtype != np.float32:
            detail = f"{key} has dtype {tensors[key].dtype}, expected float32 or bfloat16"
            raise GuardError(GuardReason.WRONG_DTYPE, detail)
        _check_values(key, tensors[key], limits)
    return Adapter(spec, tensors)


def _check_modules(spec: AdapterSpec, shapes: Mapping[str, tuple[int, int]]) -> None:
    for module in spec.modules:
        found = shapes.get(module.name)
        if found is None:
            detail = f"the base model has no module {module.name}"
            raise GuardError(GuardReason.WRONG_MODULE, detail)
        if tuple(found) != (module.d_out, module.d_in):
            kind = "embedding" if module.orientation is Orientation.EMBEDDING else "layer"
            detail = (
                f"{module.name} is a {kind} of {found[0]} x {found[1]} in the base model, "
                f"{module.d_out} x {module.d_in} in the adapter"
            )
            raise GuardError(GuardReason.WRONG_MODULE, detail)


def _check_own(spec: AdapterSpec, shapes: Mapping[str, tuple[int, int]]) -> None:
    """The tensors of a type without factors must fit the layers that they belong to."""
    tokens, width = peft_types.prompt_shape(spec)
    if tokens:
        if width not in {d_in for _, d_in in shapes.values()}:
            detail = f"virtual tokens of width {width}; no layer of the base model reads that"
            raise GuardError(GuardReason.WRONG_SHAPE, detail)
        return
    for tensor in spec.own:
        name = peft_types.adapted(tensor)
        if name not in shapes:
            if tensor.name.endswith(peft_types.BIAS_SUFFIX):
                continue  # of a norm, which is no layer; the runtime compares it itself
            detail = f"the base model has no module {name}"
            raise GuardError(GuardReason.WRONG_MODULE, detail)
        expected = peft_types.fitting(tensor, *shapes[name])
        if tensor.shape != expected:
            detail = f"{tensor.name} has shape {tensor.shape}, expected {expected}"
            raise GuardError(GuardReason.WRONG_SHAPE, detail)


def _check_heads(spec: AdapterSpec, heads: Mapping[str, tuple[int, ...]]) -> None:
    for tensor in spec.whole:
        if tensor.name not in heads:
            allowed = ", ".join(sorted(heads)) or "none"
            detail = f"{tensor.name} may not be replaced by an adapter; allowed: {allowed}"
            raise GuardError(GuardReason.UNKNOWN_TENSOR, detail)
        if tuple(heads[tensor.name]) != tensor.shape:
            detail = f"{tensor.name} has shape {tensor.shape}, expected {heads[tensor.name]}"
            raise GuardError(GuardReason.WRONG_SHAPE, detail)


def _check_values(key: str, value: npt.NDArray[np.float32], limits: GuardLimits) -> None:
    # Two passes without copies: a NaN or infinity survives min and max, so they find it as well.
    low, high = float(value.min()), float(value.max())
    largest = max(-low, high)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise GuardError(GuardReason.NOT_FINITE, f"{key} has values that are NaN or infinite")
    if largest > limits.max_abs:
        detail = f"{key} has a value of size {largest:.3g}; at most {limits.max_abs:g} is allowed"
        raise GuardError(GuardReason.TOO_LARGE, detail)
    if largest > limits.max_rms:  # the RMS is at most the largest value
        rms = math.sqrt(float(np.mean(np.square(value, dtype=np.float64))))
        if rms > limits.max_rms:
            detail = f"{key} has RMS {rms:.3g}; at most {limits.max_rms:g} is allowed"
            raise GuardError(GuardReason.TOO_LARGE, detail)


def _check_strength(adapter: Adapter, module: str, limit: float) -> None:
    left, right = adapter.factors(module)
    scale = adapter.spec.scale(module)
    # The Frobenius norms bound the spectral norm; they suffice nearly always, and cost one pass.
    bound = scale * float(np.linalg.norm(left)) * float(np.linalg.norm(right))
    if bound <= limit:
        return
    gram_left = np.matmul(left.T, left, dtype=np.float64)
    gram_right = np.matmul(right, right.T, dtype=np.float64)
    largest = float(np.max(np.linalg.eigvals(gram_left @ gram_right).real))
    spectral = scale * math.sqrt(max(largest, 0.0))
    if not spectral <= limit:
        detail = f"{module}: the update has spectral norm {spectral:.3g}; at most {limit:g}"
        raise GuardError(GuardReason.TOO_STRONG, detail)
