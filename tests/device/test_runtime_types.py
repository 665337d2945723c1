"""Every PEFT type in the engine: logits as peft's own, alone and in one batch with the others."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from aggregation import guard, peft_layout
from aggregation.adapter import Adapter
from aggregation.guard import GuardError
from aggregation.spec import TensorSpec
from clients.base import BaseRef
from clients.model import adapter_spec, build, tokenizer
from clients.peft_runtime import PeftRuntime
from clients.runtime import LoadError, Request
from tests.device.tiny import LABELS, TEXTS, make_adapter
from tests.device.typed import METHODS, random, spec_of

pytestmark = pytest.mark.filterwarnings("ignore")
SERVED = ("lora", *METHODS, "dora", "biases")


def logits(runtime, versions, texts=TEXTS):
    found = runtime.run([Request(t, v) for t, v in zip(texts, versions, strict=True)])
    return np.array([list(p.logits.values()) for p in found])


@pytest.fixture
def everything(base: BaseRef):
    """One adapter of each type."""
    return {method: random(spec_of(base, method), seed) for seed, method in enumerate(SERVED)}


def test_logits_are_those_of_pefts_own_loader(base: BaseRef, runtime, everything, tmp_path):
    import peft

    batch = tokenizer(base)(list(TEXTS), padding=True, return_tensors="pt")
    seen = []
    for method, adapter in everything.items():
        peft_layout.write(tmp_path / method, adapter, base_name="tiny")
        model = peft.PeftModel.from_pretrained(build(base, len(LABELS)), tmp_path / method).eval()
        with torch.no_grad():
            expected = model(batch["input_ids"], attention_mask=batch["attention_mask"]).numpy()
        version = runtime.load(adapter, name=method)
        found = logits(runtime, [version] * len(TEXTS))
        assert np.abs(found - expected).max() < 5e-6, method
        seen.append(found)
    gaps = [np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]]
    assert min(gaps) > 1e-2, "the types must be told apart"


def test_one_batch_may_mix_all_types(runtime, everything):
    versions = [runtime.load(adapter, name=method) for method, adapter in everything.items()]
    versions.append(runtime.pin())
    alone = {id(v): logits(runtime, [v] * len(TEXTS)) for v in versions}
    rows = [(text, version) for version in versions for text in range(len(TEXTS))]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    found = logits(runtime, [v for _, v in shuffled], [TEXTS[text] for text, _ in shuffled])
    for row, (text, version) in zip(found, shuffled, strict=True):
        assert np.abs(row - alone[id(version)][text]).max() < 5e-6, version.name


def test_a_long_text_makes_room_for_virtual_tokens(base, runtime, everything):
    version = runtime.load(everything["prompt"], name="prompt")
    long = logits(runtime, [version], ["good " * 300])
    cut = logits(runtime, [version], ["good " * 200])
    assert np.array_equal(long, cut)
    assert np.isfinite(long).all()


def test_a_version_does_not_change_when_its_adapters_arrays_would(runtime, everything):
    """What is served is a copy: nothing outside can reach it."""
    for method, adapter in everything.items():
        version = runtime.load(adapter, name=method)
        before = logits(runtime, [version] * len(TEXTS))
        runtime.load(Adapter.zeros(adapter.spec), name="another")
        assert np.array_equal(before, logits(runtime, [version] * len(TEXTS)))


def changed(spec, **changes):
    return dataclasses.replace(spec, **changes)


def with_setting(spec, name, value):
    return changed(spec, settings=tuple({**dict(spec.settings), name: value}.items()))


def renamed(spec, old, new):
    others = [TensorSpec(t.name.replace(old, new), t.shape) for t in spec.others]
    return changed(spec, others=tuple(others))


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("prompt", lambda s: with_setting(s, "heads", 4), "with 4 heads"),
        ("prompt", lambda s: with_setting(s, "layers", 1), "for 1 layers"),
        ("ia3", lambda s: renamed(s, "self.key", "self.keys"), "not a linear layer"),
        ("bottleneck", lambda s: renamed(s, "self.query", "self.qu"), "not a linear layer"),
        ("norms", lambda s: s, "the head"),
        (
            "biases",
            lambda s: changed(
                s,
                settings=(("bias", "all"),),
                others=(*s.others, TensorSpec("encoder.embeddings.LayerNorm.bias", (32,))),
            ),
            "is trained, which this engine does not serve",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(base, runtime, method, change, words):
    spec = change(spec_of(base, method))
    with pytest.raises(LoadError, match=words):
        runtime.load(Adapter.zeros(spec), name="v1")


def test_too_many_virtual_tokens_are_refused(base, runtime):
    spec = adapter_spec(base, LABELS, 2, 4.0, method="prompt", virtual_tokens=40)
    with pytest.raises(LoadError, match="at most half may be virtual"):
        runtime.load(Adapter.zeros(spec), name="v1")


def test_the_guard_knows_the_shapes_of_every_type(base, runtime, everything):
    """Against the layers of the base: what does not fit is refused before the engine sees it."""

    def check(spec):
        guard.check(random(spec), expected_base=base.digest, shapes=runtime.module_shapes)

    for adapter in everything.values():
        check(adapter.spec)
    for method, old, new, reason in (
        ("ia3", "self.key", "self.keys", "wrong-module"),
        ("bottleneck", "layer.1", "layer.7", "wrong-module"),
    ):
        with pytest.raises(GuardError, match=reason):
            check(renamed(spec_of(base, method), old, new))
    for method in ("ia3", "bottleneck", "prompt", "prefix", "dora"):
        wide = {
            name: (d_out + 2, d_in + 2) for name, (d_out, d_in) in runtime.module_shapes.items()
        }
        with pytest.raises(GuardError, match=r"wrong-shape|wrong-module"):
            guard.check(everything[method], expected_base=base.digest, shapes=wide)


def test_a_small_engine_cuts_texts_to_its_positions(base):
    engine = PeftRuntime(base, labels=LABELS, max_length=500)
    version = engine.load(make_adapter(base, 1), name="v1")
    assert np.isfinite(logits(engine, [version], ["good " * 400])).all()
