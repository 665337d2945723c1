from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from aggregation import peft_layout
from aggregation.adapter import Adapter
from aggregation.init import initial_adapter
from aggregation.spec import ModuleSpec, SpecError
from clients import model as models
from clients.base import (
    BaseMismatch,
    BaseNotFound,
    BaseRef,
    BaseUnsupported,
    base_digest,
    find_base,
)
from tests.device.tiny import LABELS, make_adapter, make_base


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def inputs(base: BaseRef, texts: list[str]) -> dict[str, torch.Tensor]:
    rows = models.tokenizer(base)(texts, padding=True, return_tensors="pt")
    return {key: rows[key] for key in ("input_ids", "attention_mask")}


TEXTS = ["the film was good", "bad", "a very very dull plot . not fun"]


def test_a_base_is_bound_by_what_it_computes(tmp_path: Path, base: BaseRef) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base.path, copy)
    assert find_base(copy).digest == base.digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "elsewhere"}))
    assert base_digest(copy) == base.digest
    (copy / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    assert base_digest(copy) != base.digest
    (copy / "config.json").write_text(json.dumps(config))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert base_digest(copy) != base.digest
    assert find_base(copy).name == "copy"  # never a path


def test_an_unknown_base_is_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match="minilm"):
        find_base("no-such-model")
    with pytest.raises(BaseNotFound, match=r"config\.json"):
        find_base(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BaseUnsupported, match="not the configuration"):
        find_base(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8}'
    )
    with pytest.raises(BaseUnsupported, match="llama"):
        find_base(tmp_path)


def test_the_classifier_is_the_encoder_with_mean_pooling(base: BaseRef) -> None:
    from transformers import AutoModel

    model = models.build(base, 3)
    batch = inputs(base, TEXTS)
    with torch.no_grad():
        assert torch.equal(model(**batch), torch.zeros(3, 3))  # before training, all are equal
        model.classifier.weight.normal_()
        hidden = AutoModel.from_pretrained(base.path).eval()(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        assert torch.allclose(model(**batch), model.classifier(pooled), atol=1e-6)
        for row, text in enumerate(TEXTS):  # padding changes nothing
            alone = model(**inputs(base, [text]))
            assert torch.allclose(alone[0], model(**batch)[row], atol=1e-5)
    with pytest.raises(ValueError, match="either"):
        model(**batch, trunk=batch["input_ids"])


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_the_trunk_is_exact_at_every_split(base: BaseRef, layers: tuple[int, ...]) -> None:
    spec = models.adapter_spec(base, LABELS, rank=2, alpha=4.0, layers=layers)
    peft_model = models.attach(models.build(base, 2), spec)
    models.load_tensors(peft_model, _random(spec))
    model = peft_model.base_model.model
    assert model.split == layers[0]
    batch = inputs(base, TEXTS)
    with torch.no_grad():
        trunk = model.trunk(**batch)
        assert torch.equal(
            peft_model(**batch), peft_model(trunk=trunk, attention_mask=batch["attention_mask"])
        )


def _random(spec: models.AdapterSpec) -> Adapter:
    rng = np.random.default_rng(0)
    return Adapter(spec, {k: rng.normal(0, 0.3, shape) for k, shape in spec.shapes().items()})


def test_tensors_go_in_and_come_out(base: BaseRef) -> None:
    adapter = make_adapter(base, 1)
    peft_model = models.attach(models.build(base, 2), adapter.spec)
    slots = models.parameter_slots(peft_model, adapter.spec)
    models.load_tensors(peft_model, adapter)
    assert models.read_tensors(peft_model, adapter.spec).digest == adapter.digest
    again = models.parameter_slots(peft_model, adapter.spec)
    assert all(slots[key] is again[key] for key in slots)  # in place: optimisers stay valid
    assert {n for n, p in peft_model.named_parameters() if p.requires_grad} == {
        name
        for name, p in peft_model.named_parameters()
        if any(p is slot for slot in slots.values())
    }
    with pytest.raises(BaseUnsupported, match="another specification"):
        models.load_tensors(peft_model, _random(adapter.spec.with_ranks(2)))


def test_a_stranger_gets_the_same_logits_from_the_folder(base: BaseRef, tmp_path: Path) -> None:
    import peft

    adapter = make_adapter(base, 2)
    ours = models.attach(models.build(base, 2), adapter.spec)
    models.load_tensors(ours, adapter)
    folder = tmp_path / "adapter"
    peft_layout.write(folder, adapter, base_name=base.name)
    theirs = peft.PeftModel.from_pretrained(models.build(base, 2), folder).eval()
    batch = inputs(base, TEXTS)
    with torch.no_grad():
        assert torch.equal(ours(**batch), theirs(**batch))
        assert float(ours(**batch).abs().max()) > 0.1


def test_the_specification_is_refused_where_it_cannot_be(base: BaseRef) -> None:
    with pytest.raises(BaseUnsupported, match="layers: 7"):
        models.adapter_spec(base, LABELS, 2, 4.0, layers=(7,))
    with pytest.raises(BaseUnsupported, match="targets: 'output'"):
        models.adapter_spec(base, LABELS, 2, 4.0, targets=("output",))
    with pytest.raises(SpecError, match="rank=0"):
        models.adapter_spec(base, LABELS, 0, 4.0)


def test_an_adapter_of_another_base_is_refused(base: BaseRef, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", seed=1)
    assert other.digest != base.digest
    with pytest.raises(BaseMismatch, match="use the base"):
        models.check_base(make_adapter(other, 0).spec, base)


def test_a_module_below_the_layers_means_no_trunk(base: BaseRef) -> None:
    from dataclasses import replace

    spec = models.adapter_spec(base, LABELS, 2, 4.0)
    low = ModuleSpec("encoder.embeddings.word_embeddings", 30, 32, 2, 4.0)
    assert models.first_trained_layer(replace(spec, modules=(*spec.modules, low)), 2) == 0
    assert models.first_trained_layer(replace(spec, modules=()), 2) == 2


def test_minilm_is_found_loaded_and_served_to_a_stranger(tmp_path: Path) -> None:
    import peft

    base = find_base("minilm")
    assert (base.name, base.layers, base.hidden) == ("minilm", 6, 384)
    spec = models.adapter_spec(base, LABELS, rank=8, alpha=16.0)
    assert spec.modules[0].name == "encoder.encoder.layer.4.attention.self.query"
    assert spec.size == 25_346
    adapter = initial_adapter(spec, seed=0)
    rng = np.random.default_rng(0)
    adapter = Adapter(spec, {k: v + rng.normal(0, 0.05, v.shape) for k, v in adapter})
    ours = models.attach(models.build(base, 2), spec)
    models.load_tensors(ours, adapter)
    peft_layout.write(tmp_path / "adapter", adapter, base_name=base.name)
    theirs = peft.PeftModel.from_pretrained(models.build(base, 2), tmp_path / "adapter").eval()
    batch = inputs(base, TEXTS)
    with torch.no_grad():
        trunk = ours.base_model.model.trunk(**batch)
        cached = ours(trunk=trunk, attention_mask=batch["attention_mask"])
        assert torch.equal(ours(**batch), theirs(**batch))
        assert torch.allclose(cached, theirs(**batch), atol=1e-6)
