"""What an adapter is, apart from its numbers: the only place that knows PEFT's conventions.

A specification lists the adapted modules with their shapes, ranks and scales, and the tensors
that travel whole (a classification head). It is closed: everything that a receiver needs in order
to rebuild a PEFT configuration is here and is schema-checked, so no configuration is ever taken
from a payload.

    >>> query = ModuleSpec("encoder.query", d_in=8, d_out=4, rank=2, alpha=16.0)
    >>> spec = AdapterSpec(base_digest="sha256:" + "0" * 64, modules=(query,))
    >>> spec.scale("encoder.query")
    8.0
    >>> sorted(spec.shapes())[0]
    'base_model.model.encoder.query.lora_A.weight'

Adapters that are not LoRA have no modules, only named tensors and the few settings of their type
(:mod:`aggregation.peft_types`). It knows nothing of torch, of files, or of who trained the adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from aggregation import peft_types
from aggregation.module_spec import (
    MAX_DIMENSION,
    MAX_RANK,
    MICRO,
    PREFIX,
    ModuleSpec,
    Orientation,
    SpecError,
    TensorSpec,
)
from aggregation.peft_types import Setting
from aggregation.spec_fields import FIELDS, MODULE_FIELDS, exact, typed

__all__ = [
    "MAX_DIMENSION",
    "MAX_MODULES",
    "MAX_RANK",
    "MICRO",
    "PREFIX",
    "TASK_TYPES",
    "AdapterSpec",
    "ModuleSpec",
    "Orientation",
    "SpecError",
    "TensorSpec",
]
MAX_MODULES = 4096
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class AdapterSpec:
    """Everything about an adapter but its numbers. Immutable; equal specs have equal digests.

    Attributes:
        base_digest: ``sha256:<hex>`` of the base model that the adapter was made for.
        modules: adapted modules, kept sorted by name.
        others: tensors of any shape that have a meaning one by one, kept sorted by name: heads and
            other modules saved whole, and the adapter's own tensors if it is not plain LoRA.
        use_rslora: scale alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023, section 3).
        task: what the adapted model does: ``feature``, ``sequence-classification``, ``causal-lm``.
        labels: names of the classes, for a classifier.
        peft_type: as PEFT calls it; see :mod:`aggregation.peft_types`.
        settings: what else a receiver needs to rebuild the configuration, as (name, value) kept
            sorted by name; none for plain LoRA.

    Raises:
        SpecError: on duplicates, on too many modules, on a malformed field, or on tensors that are
            not those of the type.
    """

    base_digest: str
    modules: tuple[ModuleSpec, ...] = ()
    others: tuple[TensorSpec, ...] = ()
    use_rslora: bool = False
    task: str = "feature"
    labels: tuple[str, ...] = ()
    peft_type: str = peft_types.LORA
    settings: tuple[tuple[str, Setting], ...] = ()

    def __post_init__(self) -> None:
        if not _DIGEST.match(self.base_digest):
            raise SpecError(f"base_digest {self.base_digest!r} is not 'sha256:' and 64 hex digits")
        if self.task not in TASK_TYPES:
            raise SpecError(f"task {self.task!r} is not one of {', '.join(TASK_TYPES)}")
        if len(self.modules) + len(self.others) > MAX_MODULES:
            raise SpecError(f"more than {MAX_MODULES} modules")
        if not self.modules and not self.others:
            raise SpecError("the adapter has neither adapted modules nor other tensors")
        if any(not 0 < len(label) <= 64 for label in self.labels) or len(self.labels) > 4096:
            raise SpecError("labels must be 1 to 64 characters each, at most 4096 of them")
        object.__setattr__(self, "modules", tuple(sorted(self.modules, key=lambda m: m.name)))
        object.__setattr__(self, "others", tuple(sorted(self.others, key=lambda t: t.name)))
        names = [m.name for m in self.modules] + [t.name for t in self.others]
        twice = (
            sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        )
        if twice:
            raise SpecError(f"named twice: {', '.join(twice)}")
        object.__setattr__(self, "settings", tuple(sorted(self.settings, key=lambda s: s[0])))
        peft_types.check(self)

    def setting(self, name: str, default: Setting | None = None) -> Setting:
        """A setting of the type, or the default.

        Raises:
            SpecError: if there is neither.
        """
        value = next((v for key, v in self.settings if key == name), default)
        if value is None:
            raise SpecError(f"{self.peft_type} has no setting {name!r}")
        return value

    @cached_property
    def own(self) -> tuple[TensorSpec, ...]:
        """Those of ``others`` that belong to the PEFT type: IA3 vectors, virtual tokens, ..."""
        return peft_types.own_tensors(self)

    @cached_property
    def whole(self) -> tuple[TensorSpec, ...]:
        """Those of ``others`` that replace tensors of the base: a classification head, a norm."""
        return peft_types.whole_tensors(self)

    @cached_property
    def _by_name(self) -> dict[str, ModuleSpec]:
        return {m.name: m for m in self.modules}

    def module(self, name: str) -> ModuleSpec:
        """The specification of one module.

        Raises:
            SpecError: if the adapter does not adapt it.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise SpecError(f"the adapter has no module {name!r}") from None

    def scale(self, name: str) -> float:
        """The scale s: the update of the module's weight is s B A (Hu et al. 2021, section 4.1)."""
        module = self.module(name)
        return module.alpha / (math.sqrt(module.rank) if self.use_rslora else module.rank)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's PEFT name and shape, in canonical (sorted) order."""
        out: dict[str, tuple[int, ...]] = {}
        for module in self.modules:
            key_a, key_b = module.keys
            out[key_a] = (module.rank, module.d_in)
            out[key_b] = (module.d_out, module.rank)
        for tensor in self.others:
            out[tensor.key] = tensor.shape
        return dict(sorted(out.items()))

    @cached_property
    def layout(self) -> Mapping[str, tuple[int, int, tuple[int, ...]]]:
        """Where each tensor lies in one vector of all: (first, behind the last, shape) by name."""
        out, first = {}, 0
        for key, shape in self.shapes().items():
            out[key] = (first, first + math.prod(shape), shape)
            first = out[key][1]
        return out

    @cached_property
    def size(self) -> int:
        """Number of values in all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def with_ranks(self, ranks: int | Mapping[str, int]) -> AdapterSpec:
        """The same adapter at other ranks; alpha is kept, so the scale changes with the rank."""

        def rank(module: ModuleSpec) -> int:
            return ranks if isinstance(ranks, int) else ranks.get(module.name, module.rank)

        return replace(self, modules=tuple(replace(m, rank=rank(m)) for m in self.modules))

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no blanks, integers only (alpha in millionths).

        Plain LoRA is schema 1; whatever has another type or settings is schema 2.
        """
        doc: dict[str, Any] = {
            "base_digest": self.base_digest,
            "labels": list(self.labels),
            "modules": [
                {
                    "alpha_micro": round(m.alpha * MICRO),
                    "d_in": m.d_in,
                    "d_out": m.d_out,
                    "name": m.name,
                    "orientation": m.orientation.value,
                    "rank": m.rank,
                }
                for m in self.modules
            ],
            "others": [{"name": t.name, "shape": list(t.shape)} for t in self.others],
            "peft_type": self.peft_type,
            "schema": 1,
            "task": self.task,
            "use_rslora": self.use_rslora,
        }
        if self._extended:
            doc |= {"schema": 2, "settings": dict(self.settings)}
        return json.dumps(doc, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @property
    def _extended(self) -> bool:
        return self.peft_type != peft_types.LORA or bool(self.settings)

    @classmethod
    def from_json(cls, text: str | bytes) -> AdapterSpec:
        """Read what :meth:`to_json` wrote; every field is checked and none is optional.

        Raises:
            SpecError: on anything unknown, missing or of the wrong type.
        """
        try:
            doc = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"the specification is not JSON: {error}") from None
        try:
            return cls._from_document(doc)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise SpecError(f"the specification has a wrong field: {error!r}") from None

    @classmethod
    def _from_document(cls, doc: Any) -> AdapterSpec:
        schema = doc["schema"] if isinstance(doc, dict) and "schema" in doc else 1
        if type(schema) is not int or schema not in (1, 2):
            raise SpecError(f"specification schema {schema!r} is neither 1 nor 2")
        exact(doc, FIELDS | ({"settings"} if schema == 2 else set()), "specification")
        modules = []
        for m in doc["modules"]:
            exact(m, MODULE_FIELDS, "module")
            typed(int, m["d_in"], m["d_out"], m["rank"], m["alpha_micro"])
            modules.append(
                ModuleSpec(
                    m["name"],
                    m["d_in"],
                    m["d_out"],
                    m["rank"],
                    m["alpha_micro"] / MICRO,
                    Orientation(m["orientation"]),
                )
            )
        others = []
        for t in doc["others"]:
            exact(t, {"name", "shape"}, "tensor")
            typed(int, *t["shape"])
            others.append(TensorSpec(t["name"], tuple(t["shape"])))
        typed(bool, doc["use_rslora"])
        typed(list, doc["modules"], doc["others"], doc["labels"])
        typed(str, *doc["labels"])
        settings = doc.get("settings", {})
        typed(dict, settings)
        spec = cls(
            doc["base_digest"],
            tuple(modules),
            tuple(others),
            doc["use_rslora"],
            doc["task"],
            tuple(doc["labels"]),
            doc["peft_type"],
            tuple(settings.items()),
        )
        if spec._extended != (schema == 2):
            raise SpecError(
                f"a specification of {spec.peft_type} with {len(settings)} settings "
                f"is not of schema {schema}"
            )
        return spec

    @cached_property
    def digest(self) -> str:
        """``sha256:<hex>`` of the canonical JSON."""
        return "sha256:" + hashlib.sha256(self.to_json().encode()).hexdigest()


TASK_TYPES: Mapping[str, str | None] = {
    "feature": None,
    "sequence-classification": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
}
