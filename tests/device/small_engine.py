"""An engine of a few NumPy lines that keeps a runtime's promises: for tests of all but the engine.

Its base model counts letters; an adapter of rank r turns the counts into the scores of two classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from aggregation.adapter import Adapter
from aggregation.spec import AdapterSpec, ModuleSpec
from clients.runtime import BASE, DEFAULT, AdapterVersion, LoadError, Prediction, Request

DIGEST = "sha256:" + "5" * 64
LETTERS, LABELS = 64, ("negative", "positive")


def small_adapter(seed: int) -> Adapter:
    module = ModuleSpec("letters", d_in=LETTERS, d_out=len(LABELS), rank=2, alpha=2.0)
    spec = AdapterSpec(DIGEST, (module,), labels=LABELS, task="sequence-classification")
    rng = np.random.default_rng(seed)
    return Adapter(spec, {key: rng.normal(0, 0.5, shape) for key, shape in spec.shapes().items()})


class SmallEngine:
    """See :class:`clients.runtime.Runtime`."""

    kind = "torch"
    base_digest = DIGEST
    module_shapes: Mapping[str, tuple[int, int]] = {"letters": (len(LABELS), LETTERS)}

    def __init__(self) -> None:
        self._base = AdapterVersion(BASE, "", LABELS)
        self._current: dict[str, AdapterVersion] = {}

    def load(self, adapter: Adapter, *, name: str) -> AdapterVersion:
        if adapter.spec.base_digest != self.base_digest:
            raise LoadError(f"for base {adapter.spec.base_digest}")
        factors = [adapter.tensors[key] for key in adapter.spec.modules[0].keys]
        return AdapterVersion(name, adapter.digest, adapter.spec.labels, factors)

    def publish(self, version: AdapterVersion | None, name: str = DEFAULT) -> AdapterVersion:
        previous = self.pin(name)
        self._current[name] = version or self._base
        return previous

    def pin(self, name: str = DEFAULT) -> AdapterVersion:
        return self._current.get(name, self._base)

    def run(self, requests: Sequence[Request]) -> list[Prediction]:
        return [self._answer(request) for request in requests]

    def unload(self, version: AdapterVersion) -> None:
        pass

    def _answer(self, request: Request) -> Prediction:
        version = request.version
        logits = np.zeros(len(LABELS))
        if version.state is not None:
            counts = np.bincount(np.frombuffer(request.text.encode(), np.uint8) % LETTERS)
            first, second = version.state
            logits = second @ (first @ np.resize(counts, LETTERS))
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        return Prediction(
            LABELS[int(logits.argmax())],
            dict(zip(LABELS, scores.tolist(), strict=True)),
            dict(zip(LABELS, logits.tolist(), strict=True)),
            version,
        )
