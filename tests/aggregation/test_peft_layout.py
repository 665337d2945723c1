"""Against real peft models: what we compute and write is what peft computes and reads."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from aggregation import peft_layout
from aggregation.adapter import Adapter
from aggregation.low_rank import LowRank
from aggregation.peft_layout import LayoutError
from aggregation.recipes import recipe
from aggregation.spec import Orientation
from aggregation.state import initial_state
from tests.aggregation.adapters import BASE, moved, plain_spec, random_adapter, relative, update

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.arange(12).reshape(2, 6)


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=16, num_labels=3, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config).eval()


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


CASES: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]] = {
    "conv1d-embedding-rslora": (
        gpt2,
        {
            "task_type": "SEQ_CLS",
            "r": 2,
            "target_modules": ["wte", "c_attn", "c_proj"],
            "rank_pattern": {"wte": 3, "h.1.attn.c_attn": 4},
            "alpha_pattern": {"h.0.attn.c_attn": 5},
            "use_rslora": True,
            "fan_in_fan_out": True,
        },
    ),
    "linear-embedding": (
        llama,
        {
            "task_type": "CAUSAL_LM",
            "r": 2,
            "lora_alpha": 12,
            "target_modules": ["embed_tokens", "q_proj", "down_proj"],
            "rank_pattern": {"embed_tokens": 3, "^model.layers.1.mlp.down_proj": 1},
            "alpha_pattern": {"q_proj": 5},
        },
    ),
    "linear-and-conv1d-head": (
        gpt2,
        {
            "r": 2,
            "target_modules": ["c_fc"],
            "modules_to_save": ["score"],
            "fan_in_fan_out": True,
        },
    ),
}


def peft_model(case: str) -> tuple[torch.nn.Module, PeftModel]:
    make, settings = CASES[case]
    base = make()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return base, model


def delta_weights(model: PeftModel, names: list[str]) -> dict[str, np.ndarray]:
    return {
        name: model.base_model.model.get_submodule(name)
        .get_delta_weight("default")
        .detach()
        .double()
        .numpy()
        for name in names
    }


@pytest.mark.parametrize("case", CASES)
def test_reads_what_peft_wrote_and_writes_what_peft_reads(case: str, tmp_path: Path) -> None:
    base, model = peft_model(case)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    adapter = peft_layout.read(tmp_path / "theirs", base_digest=BASE)
    truth = delta_weights(model, [m.name for m in adapter.spec.modules])
    assert len(truth) == len(adapter.spec.modules) > 0
    for module in adapter.spec.modules:
        matrix = LowRank.of(adapter, module.name).dense()
        if module.orientation is not Orientation.LINEAR:
            matrix = matrix.T
        assert relative(matrix, truth[module.name]) < 1e-6

    peft_layout.write(tmp_path / "ours", adapter, base_name="some/base", card="# A card\n")
    assert peft_layout.read(tmp_path / "ours", base_digest=BASE).digest == adapter.digest
    (tmp_path / "ours" / "airpeft.json").unlink()  # a stranger's tools drop unknown files
    stranger = peft_layout.read(tmp_path / "ours", base_digest=BASE)
    assert {m: stranger.spec.scale(m.name) for m in stranger.spec.modules} == {
        m: adapter.spec.scale(m.name) for m in adapter.spec.modules
    }
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
        assert not torch.allclose(base(TOKENS).logits, model(TOKENS).logits, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_an_aggregated_adapter_is_the_mean_by_peft_s_own_arithmetic(
    case: str, tmp_path: Path
) -> None:
    """Three clients; peft loads the result and its delta weights are the mean of theirs."""
    base, model = peft_model(case)
    model.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    start = peft_layout.read(tmp_path / "start", base_digest=BASE)
    state = initial_state(start)
    names = [m.name for m in start.spec.modules]
    weights, expected = (1.0, 2.0, 5.0), dict.fromkeys(names, 0.0)
    reduction = recipe("svd-warm-start").begin(state)
    for k, weight in enumerate(weights):
        trained = moved(start, k, 0.3)
        reduction.add(update(f"c{k}", start, trained, weight))
        peft_layout.write(tmp_path / f"c{k}", trained, base_name="some/base")
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"c{k}")
        for name, matrix in delta_weights(theirs, names).items():
            expected[name] = expected[name] + weight / sum(weights) * matrix
    after, report = reduction.finish()
    peft_layout.write(tmp_path / "after", after.adapter, base_name="some/base")
    ours = delta_weights(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "after"), names)
    for module in start.spec.modules:
        residual = after.residual[module.name].dense()
        if module.orientation is not Orientation.LINEAR:
            residual = residual.T
        truth = expected[module.name]
        assert relative(ours[module.name] + residual, truth) < 1e-5
        error = np.linalg.norm(ours[module.name] - truth) / np.linalg.norm(truth)
        assert report.modules[module.name].error == pytest.approx(error, abs=1e-5)


def test_the_folder_is_the_same_bytes_every_time_and_holds_what_was_asked(tmp_path: Path) -> None:
    adapter = random_adapter(plain_spec(), 0)
    for name in ("one", "two"):
        peft_layout.write(
            tmp_path / name, adapter, base_name="x/y", card="# Hi\n", extra={"privacy.json": b"{}"}
        )
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "airpeft.json",
        "privacy.json",
    ]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for path in ("/home/me/model", "./model", "C:\\model"):
        with pytest.raises(LayoutError, match="a path"):
            peft_layout.write(tmp_path / "three", adapter, base_name=path)
    for extra in ("README.md/..", "../outside", "adapter_config.json"):
        with pytest.raises(LayoutError, match="taken or leaves"):
            peft_layout.write(tmp_path / "three", adapter, base_name="x", extra={extra: b""})


def edited(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def poisoned(folder: Path) -> None:
    spec = plain_spec()
    tensors = dict(random_adapter(spec, 0).tensors)
    key = next(iter(tensors))
    tensors[key] = np.full(spec.shapes()[key], np.nan, np.float32)
    peft_layout.write(folder, Adapter(spec, tensors), base_name="x")


def halved(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    del tensors["base_model.model.layer.0.query.lora_A.weight"]
    safetensors.numpy.save_file(tensors, path)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no configuration": (remove("adapter_config.json"), "adapter_config.json"),
    "no tensors": (remove("adapter_model.safetensors"), "adapter_model.safetensors"),
    "pickle": (pickled, "pickle"),
    "cut short": (cut, "bad-layout"),
    "not finite": (poisoned, "NaN"),
    "another type": (edited(peft_type="IA3"), "peft_type"),
    "another alpha": (edited(lora_alpha=3), "lora_alpha"),
    "another rank": (edited(r=3), "r is 3"),
}
PLAIN: dict[str, tuple[Callable[[Path], None], str]] = {
    "dora": (edited(use_dora=True), "use_dora"),
    "bias": (edited(bias="some"), "bias=.some. is not one of"),
    "pissa": (edited(init_lora_weights="pissa"), "init_lora_weights"),
    "regular expression": (edited(alpha_pattern={"(a+)+$": 2}), "regular expression"),
    "alpha is text": (edited(lora_alpha="8"), "expected a number"),
    "alpha is zero": (edited(lora_alpha=0), "alpha=0"),
    "alpha has no float": (edited(lora_alpha=10**400), "lora_alpha for layer.0.query is 1000"),
    "half a module": (halved, r"tensor base_model.model.layer.0.query.lora_A.weight is missing"),
    "rank mismatch": (edited(r=3), "rank"),
    "moe": (edited(target_parameters=["x"]), "target_parameters"),
}


@pytest.mark.parametrize("what", [*BROKEN, *PLAIN])
def test_a_folder_that_is_not_right_is_refused_by_name(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    peft_layout.write(folder, random_adapter(plain_spec(), 0), base_name="x")
    breaking, message = (BROKEN | PLAIN)[what]
    if what in PLAIN:
        (folder / "airpeft.json").unlink()
    breaking(folder)
    with pytest.raises(LayoutError, match=message) as error:
        peft_layout.read(folder, base_digest=BASE)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("alpha", [16 / 3, 8 * math.sqrt(2), 1 / 0.3])
def test_an_alpha_that_is_no_whole_number_counts_to_the_precision_of_float32(
    alpha: float, tmp_path: Path
) -> None:
    spec = plain_spec()
    peft_layout.write(tmp_path / "a", random_adapter(spec, 0), base_name="x")
    (tmp_path / "a" / "airpeft.json").unlink()
    edited(lora_alpha=alpha, use_rslora=1)(tmp_path / "a")
    found = peft_layout.read(tmp_path / "a", base_digest=BASE).spec
    for module in spec.modules:
        assert found.scale(module.name) == pytest.approx(alpha / math.sqrt(module.rank), rel=5e-7)


def test_the_base_has_to_be_known_and_the_same(tmp_path: Path) -> None:
    peft_layout.write(tmp_path / "a", random_adapter(plain_spec(), 0), base_name="x")
    with pytest.raises(LayoutError, match="is for base"):
        peft_layout.read(tmp_path / "a", base_digest="sha256:" + "1" * 64)
    (tmp_path / "a" / "airpeft.json").unlink()
    with pytest.raises(LayoutError, match="base_digest must be given"):
        peft_layout.read(tmp_path / "a")
    with pytest.raises(LayoutError, match="No such file"):
        peft_layout.read(tmp_path / "nowhere", base_digest=BASE)


def test_half_precision_folders_are_read(tmp_path: Path) -> None:
    _, model = peft_model("linear-embedding")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half", save_embedding_layers=False)
    adapter = peft_layout.read(tmp_path / "half", base_digest=BASE)
    module = adapter.spec.modules[-1]
    theirs = model.base_model.model.get_submodule(module.name).lora_A["default"].weight
    assert np.array_equal(adapter.factors(module.name)[1], theirs.detach().float().numpy())
