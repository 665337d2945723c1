"""Adapters without factors, and LoRA with more than factors: as values, as bytes, aggregated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aggregation import offline, peft_layout, peft_types
from aggregation.adapter import Adapter
from aggregation.errors import RecipeError
from aggregation.init import initial_adapter
from aggregation.named_tensors import objection
from aggregation.offline import OfflineError
from aggregation.payload import PayloadError, decode, encode
from aggregation.recipes import RECIPES, recipe
from aggregation.spec import AdapterSpec, ModuleSpec, SpecError, TensorSpec
from aggregation.state import GlobalState, initial_state
from aggregation.update import UpdateError
from aggregation.values import packed_length
from tests.aggregation.adapters import (
    BASE,
    FEW,
    moved,
    plain_spec,
    products,
    random_adapter,
    relative,
    update,
)

HEAD = (TensorSpec("head.weight", (3, 5)), TensorSpec("head.bias", (3,)))


@st.composite
def named_specs(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(peft_types.METHODS)) -> AdapterSpec:
    """Any type with any sizes, with or without a head; LoRA with magnitudes or biases."""
    method = draw(st.sampled_from(kinds))
    width, count = draw(st.integers(2, 140)), draw(st.integers(1, 3))
    fields: dict[str, Any] = {}
    own: list[TensorSpec] = []
    if method == "lora":
        modules = tuple(
            ModuleSpec(f"layer.{i}.query", width, width + i, draw(st.integers(1, 2)), 4.0)
            for i in range(count)
        )
        fields["modules"], settings_ = modules, {}
        if draw(st.booleans()):
            settings_["use_dora"] = True
            own += [TensorSpec(f"{m.name}.lora_magnitude_vector", (m.d_out,)) for m in modules]
        if draw(st.booleans()):
            settings_["bias"] = "lora_only"
            own += [TensorSpec(f"{m.name}.base_layer.bias", (m.d_out,)) for m in modules]
        fields["settings"] = tuple(settings_.items())
    elif method == "ia3":
        shapes = [(width, 1), (1, width + 2)]
        own = [TensorSpec(f"layer.{i}.ia3_l", shapes[i % 2]) for i in range(count)]
        fields["settings"] = (("fan_in_fan_out", draw(st.booleans())),)
    elif method == "bottleneck":
        units = draw(st.integers(1, 5))
        for i in range(count):
            own.append(TensorSpec(f"layer.{i}.peanut_A.weight", (units, width + i)))
            own.append(TensorSpec(f"layer.{i}.peanut_B.weight", (width + i, units)))
        activation = draw(st.sampled_from(peft_types.ACTIVATIONS))
        fields["settings"] = (("activation", activation), ("scaling_micro", 500_000))
    else:
        parts = 1 if method == "prompt" else 2 * count
        shape = (draw(st.integers(1, 6)), parts * 2 * width)
        own = [TensorSpec(peft_types.PROMPT_NAME, shape)]
        fields["settings"] = (("layers", count), ("heads", 2))
    others = (*own, *(HEAD if draw(st.booleans()) else ()))
    return AdapterSpec(BASE, others=others, peft_type=peft_types.METHODS[method], **fields)


SPECS: dict[str, AdapterSpec] = {
    "ia3": AdapterSpec(
        BASE,
        others=(
            TensorSpec("layer.key.ia3_l", (6, 1)),
            TensorSpec("layer.out.ia3_l", (1, 9)),
            *HEAD,
        ),
        peft_type="IA3",
        settings=(("fan_in_fan_out", False),),
    ),
    "prompt": AdapterSpec(
        BASE,
        others=(TensorSpec(peft_types.PROMPT_NAME, (4, 6)), *HEAD),
        peft_type="PROMPT_TUNING",
        settings=(("heads", 2), ("layers", 3)),
    ),
    "prefix": AdapterSpec(
        BASE,
        others=(TensorSpec(peft_types.PROMPT_NAME, (4, 36)), *HEAD),
        peft_type="PREFIX_TUNING",
        settings=(("heads", 2), ("layers", 3)),
    ),
    "bottleneck": AdapterSpec(
        BASE,
        others=(
            TensorSpec("layer.key.peanut_A.weight", (2, 6)),
            TensorSpec("layer.key.peanut_B.weight", (6, 2)),
            *HEAD,
        ),
        peft_type="PEANUT",
        settings=(("activation", "relu"), ("scaling_micro", 1_000_000)),
    ),
}


# --- as values ------------------------------------------------------------------------------------


@FEW
@given(named_specs())
def test_specifications_go_to_json_and_back(spec: AdapterSpec) -> None:
    again = AdapterSpec.from_json(spec.to_json())
    assert again == spec
    assert again.digest == spec.digest
    plain = spec.peft_type == "LORA" and not spec.settings
    assert json.loads(spec.to_json())["schema"] == (1 if plain else 2)
    assert set(spec.own) | set(spec.whole) == set(spec.others)
    keys = [peft_types.file_key(spec, key) for key in spec.shapes()]
    assert len(set(keys)) == len(keys)
    back = [peft_types.key_in_file(spec.peft_type, key) for key in keys]
    assert back == list(spec.shapes())


def test_plain_lora_has_the_json_that_it_always_had() -> None:
    text = plain_spec().to_json()
    assert set(json.loads(text)) == {
        "base_digest", "labels", "modules", "others", "peft_type", "schema", "task", "use_rslora",
    }  # fmt: skip
    assert json.loads(text)["schema"] == 1
    assert hashlib.sha256(text.encode()).hexdigest().startswith(PLAIN)


PLAIN = "9660f362ce507cec"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"fan_in_fan_out": False, "more": 1}}, "settings are"),
        ({"settings": {}}, "settings are"),
        ({"settings": {"fan_in_fan_out": 0}}, "must be bool"),
        ({"settings": []}, "expected dict"),
        ({"schema": 1}, "exactly the fields"),
        ({"schema": 3}, "neither 1 nor 2"),
        ({"schema": True}, "neither 1 nor 2"),
        ({"peft_type": "VERA"}, "not supported"),
        ({"peft_type": "LORA", "settings": {}}, "schema 2"),
        ({"use_rslora": True}, "no use_rslora"),
        ({"others": [{"name": "head.weight", "shape": [3, 5]}]}, "none of the tensors"),
        ({"others": [{"name": "a.ia3_l", "shape": [3, 5]}]}, "is not"),
    ],
)
def test_a_specification_is_closed(change: dict[str, Any], message: str) -> None:
    document = {**json.loads(SPECS["ia3"].to_json()), **change}
    with pytest.raises(SpecError, match=message):
        AdapterSpec.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("method", "others", "message"),
    [
        ("prefix", (TensorSpec(peft_types.PROMPT_NAME, (4, 35)),), "multiple of 12"),
        ("prompt", (TensorSpec(peft_types.PROMPT_NAME, (2000, 6)),), "at most 1024"),
        ("bottleneck", (TensorSpec("a.peanut_A.weight", (2, 6)),), "not .r, d_out."),
        (
            "bottleneck",
            (
                *SPECS["bottleneck"].own,
                TensorSpec("b.peanut_A.weight", (3, 6)),
                TensorSpec("b.peanut_B.weight", (6, 3)),
            ),
            "sizes .2, 3.",
        ),
    ],
)
def test_tensors_must_be_those_of_the_type(
    method: str, others: tuple[TensorSpec, ...], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        dataclasses.replace(SPECS[method], others=others)


# --- as bytes -------------------------------------------------------------------------------------


@FEW
@given(named_specs(), st.integers(0, 99), st.sampled_from(["bf16", "f32", "int8"]))
def test_payloads_hold_every_type_and_never_round_what_multiplies(
    spec: AdapterSpec, seed: int, dtype: Any
) -> None:
    adapter = random_adapter(spec, seed)
    made = encode(adapter, dtype=dtype)
    again = decode(made.data, spec_digest=spec.digest, adapter_digest=made.adapter_digest)
    assert made.plain_length == packed_length(spec, dtype)
    for key, value in adapter:
        exact = dtype == "f32" or key in peft_types.scales(spec)
        rounding = 2**-8 * np.abs(value) if dtype == "bf16" else np.abs(value).max() / 127 * 0.501
        limit = 0.0 if exact else rounding + 1e-12
        assert (np.abs(again.tensors[key] - value) <= limit).all(), key
    assert encode(again, dtype=dtype).adapter_digest == again.digest


@pytest.mark.parametrize("method", SPECS)
def test_no_cut_payload_gets_through(method: str) -> None:
    spec = SPECS[method]
    made = encode(random_adapter(spec, 0))
    for position in range(0, len(made.data), 29):
        with pytest.raises(PayloadError):
            decode(
                made.data[:position],
                spec_digest=spec.digest,
                adapter_digest=made.adapter_digest,
            )


# --- aggregated -----------------------------------------------------------------------------------


@FEW
@given(
    named_specs(("ia3", "prompt", "prefix", "bottleneck")),
    st.lists(st.floats(0.1, 10), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_the_weighted_mean_of_named_tensors(
    spec: AdapterSpec, weights: list[float], seed: int
) -> None:
    start = initial_adapter(spec, seed)
    reduction = recipe("fedit").begin(initial_state(start))
    trained = [moved(start, seed + k) for k in range(len(weights))]
    for k, (adapter, weight) in enumerate(zip(trained, weights, strict=True)):
        reduction.add(update(f"c{k}", start, adapter, weight))
    state, report = reduction.finish()
    for key, value in state.adapter:
        parts = [
            w * a.tensors[key].astype(np.float64) for w, a in zip(weights, trained, strict=True)
        ]
        assert relative(value, sum(parts) / sum(weights)) < 1e-6
    assert report.modules == {}
    assert report.used == len(weights)
    assert GlobalState.from_bytes(state.to_bytes()).adapter.digest == state.adapter.digest
    again = recipe("fedit").begin(state)
    again.add(update("c", state.adapter, state.adapter))
    assert again.finish()[0].adapter.digest == state.adapter.digest  # nobody moves, nothing moves


def test_a_coordinate_rule_ignores_a_liar() -> None:
    start = initial_adapter(SPECS["ia3"], 0)
    reduction = recipe("median").begin(initial_state(start))
    for k in range(4):
        reduction.add(update(f"c{k}", start, moved(start, k)))
    reduction.add(update("liar", start, moved(start, 9, 1e4)))
    state, _ = reduction.finish()
    for key, value in state.adapter:
        assert np.abs(value - start.tensors[key]).max() < 1.0


@pytest.mark.parametrize("method", SPECS)
def test_a_recipe_for_lora_only_refuses_every_other_type(method: str) -> None:
    state = initial_state(initial_adapter(SPECS[method], 0))
    refusals = {name: objection(chosen, SPECS[method]) for name, chosen in RECIPES.items()}
    taken = {name for name, reason in refusals.items() if not reason}
    for name in RECIPES.keys() - taken:
        chosen = RECIPES[name]
        with pytest.raises(RecipeError, match=f"recipe {name}: .* LoRA only.*choose fedit"):
            chosen.begin(state, trusted="t" if chosen.reduce.trusts else "")
    assert {"fedit", "median", "trimmed-mean"} <= taken
    for name in taken:
        chosen = RECIPES[name]
        assert chosen.refactor.kind == "keep"
        assert chosen.reduce.kind == "factor-mean" or chosen.reduce.coordinate_wise
    refused = {"svd-warm-start", "flora", "ffa-lora", "rolora", "rfa", "fedsa-lora", "feddpa"}
    assert not refused & taken


def test_every_recipe_that_takes_named_tensors_moves_them() -> None:
    """Server optimisers, too: each tensor goes where most clients went."""
    start = initial_adapter(SPECS["ia3"], 0)
    for chosen in RECIPES.values():
        if objection(chosen, SPECS["ia3"]):
            continue
        reduction = chosen.begin(initial_state(start))
        step = {key: 0.01 * np.ones_like(value) for key, value in start}
        trained = Adapter(start.spec, {key: value + step[key] for key, value in start})
        for k in range(7):
            reduction.add(update(f"c{k}", start, trained))
        state, _ = reduction.finish()
        for key, value in state.adapter:
            assert (value > start.tensors[key]).all(), (chosen.name, key)


def test_a_head_alone_is_no_lora_either() -> None:
    spec = AdapterSpec(BASE, others=HEAD)
    with pytest.raises(RecipeError, match="recipe svd-warm-start: reduce=product-sum"):
        recipe("svd-warm-start").begin(initial_state(initial_adapter(spec, 0)))


def test_adapters_of_other_types_and_settings_never_meet() -> None:
    start = initial_adapter(SPECS["prompt"], 0)
    other = dataclasses.replace(SPECS["prompt"], settings=(("heads", 3), ("layers", 3)))
    reduction = recipe("fedit").begin(initial_state(start))
    with pytest.raises(UpdateError, match="settings"):
        reduction.add(update("c", start, random_adapter(other, 1)))
    with pytest.raises(UpdateError, match=r"tensors|peft_type"):
        reduction.add(update("d", start, random_adapter(SPECS["ia3"], 1)))


# --- off line, with real peft models --------------------------------------------------------------


def dora_folders(folder: Path, count: int) -> list[Path]:
    import peft
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    weights = BertForSequenceClassification(config).state_dict()
    out = []
    for number in range(count):
        base = BertForSequenceClassification(config)
        base.load_state_dict(weights)
        lora = peft.LoraConfig(r=2, target_modules=["query", "value"], use_dora=True)
        model = peft.get_peft_model(base, lora)
        torch.manual_seed(number + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        model.save_pretrained(folder / f"c{number}")
        out.append(folder / f"c{number}")
    return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["fedit", "svd-warm-start", "flexlora"])
def test_dora_folders_are_combined_off_line(name: str, tmp_path: Path) -> None:
    folders, weights = dora_folders(tmp_path, 3), [1.0, 2.0, 5.0]
    members = offline.read_members(folders, weights, BASE)
    combined = offline.combine(recipe(name), members)
    offline.write(tmp_path / "out", combined, members)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "airpeft.json",
    ]  # fmt: skip
    after = peft_layout.read(tmp_path / "out")
    theirs = [m.adapter for m in members.members]
    shares = [w / sum(weights) for w in weights]
    for tensor in after.spec.own:
        assert tensor.name.endswith(".lora_magnitude_vector")
        mean = sum(p * a.tensors[tensor.key] for p, a in zip(shares, theirs, strict=True))
        assert relative(after.tensors[tensor.key], mean) < 1e-6
    for module, matrix in products(after).items():
        exact = sum(p * products(a)[module] for p, a in zip(shares, theirs, strict=True))
        if name == "fedit":
            left = sum(p * a.factors(module)[0] for p, a in zip(shares, theirs, strict=True))
            right = sum(p * a.factors(module)[1] for p, a in zip(shares, theirs, strict=True))
            expected = after.spec.scale(module) * left @ right
        else:
            u, s, v = np.linalg.svd(exact)
            expected = (u[:, :2] * s[:2]) @ v[:2]
        assert relative(matrix, expected) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_what_would_lie_beside_dora_is_refused(tmp_path: Path) -> None:
    members = offline.read_members(dora_folders(tmp_path, 2), None, BASE)
    for name in ("flora", "fedex-lora", "fedmomentum"):
        with pytest.raises(RecipeError, match="magnitudes do not reach"):
            offline.combine(recipe(name), members)


def test_named_tensors_are_combined_off_line_and_kinds_are_not_mixed(tmp_path: Path) -> None:
    adapters = [random_adapter(SPECS["prefix"], k) for k in range(3)]
    folders = [tmp_path / f"c{k}" for k in range(3)]
    for folder, adapter in zip(folders, adapters, strict=True):
        peft_layout.write(folder, adapter, base_name="some/base")
    members = offline.read_members(folders, [1.0, 1.0, 2.0])
    combined = offline.combine(recipe("fedit"), members)
    assert combined.residual == ()
    for key, value in combined.adapter:
        mean = sum(w * a.tensors[key] for w, a in zip((0.25, 0.25, 0.5), adapters, strict=True))
        assert relative(value, mean) < 1e-6
    with pytest.raises(RecipeError, match="choose fedit"):
        offline.combine(recipe("svd-warm-start"), members)
    peft_layout.write(tmp_path / "ia3", random_adapter(SPECS["ia3"], 0), base_name="some/base")
    with pytest.raises(OfflineError, match="missing"):
        offline.read_members([folders[0], tmp_path / "ia3"], None)


def test_an_adapter_of_named_tensors_has_no_factors() -> None:
    with pytest.raises(SpecError, match="no module"):
        Adapter.zeros(SPECS["ia3"]).factors("layer.key")
