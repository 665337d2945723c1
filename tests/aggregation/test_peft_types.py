"""IA3, prompts, prefixes, bottlenecks, DoRA and trained biases, against real peft models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from aggregation import peft_layout, peft_types
from aggregation.adapter import Adapter
from aggregation.peft_layout import LayoutError
from aggregation.spec import AdapterSpec
from aggregation.values import bf16_bits
from tests.aggregation.adapters import BASE

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.arange(2, 14).reshape(2, 6)


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=32, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


CASES: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], peft.PeftConfig], str]] = {
    "ia3": (
        bert,
        lambda: peft.IA3Config(
            task_type="SEQ_CLS",
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
        ),
        "IA3",
    ),
    "ia3-conv1d": (
        gpt2,
        lambda: peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
        "IA3",
    ),
    "prompt": (
        bert,
        lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        "PROMPT_TUNING",
    ),
    "prompt-causal": (
        gpt2,
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "PROMPT_TUNING",
    ),
    "prefix": (
        gpt2,
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "PREFIX_TUNING",
    ),
    "prefix-projected": (
        gpt2,
        lambda: peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=3,
            prefix_projection=True,
            encoder_hidden_size=5,
        ),
        "PREFIX_TUNING",
    ),
    "bottleneck": (
        bert,
        lambda: peft.PeanutConfig(
            task_type="SEQ_CLS", r=3, target_modules=["query"], act_fn="gelu", scaling=0.5
        ),
        "PEANUT",
    ),
    "dora": (
        bert,
        lambda: peft.LoraConfig(
            task_type="SEQ_CLS",
            r=2,
            target_modules=["query", "word_embeddings"],
            use_dora=True,
        ),
        "LORA",
    ),
    "dora-conv1d": (
        gpt2,
        lambda: peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=2,
            target_modules=["c_attn"],
            use_dora=True,
            fan_in_fan_out=True,
        ),
        "LORA",
    ),
    "bias-of-adapted-layers": (
        bert,
        lambda: peft.LoraConfig(r=2, target_modules=["value"], bias="lora_only"),
        "LORA",
    ),
    "all-biases-and-a-head": (
        bert,
        lambda: peft.LoraConfig(
            task_type="SEQ_CLS", r=2, target_modules=["query", "value"], bias="all"
        ),
        "LORA",
    ),
    "norms": (
        bert,
        lambda: peft.LoraConfig(
            task_type="SEQ_CLS", r=2, target_modules=["query"], modules_to_save=["LayerNorm"]
        ),
        "LORA",
    ),
}


def trained(case: str, seed: int = 1) -> tuple[torch.nn.Module, PeftModel]:
    """A base, and a peft model on it whose every trainable tensor has been moved."""
    make, config, _ = CASES[case]
    base = make()
    model = get_peft_model(copy.deepcopy(base), config()).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return base, model


def saved(model: PeftModel, folder: Path) -> Adapter:
    model.save_pretrained(folder, save_embedding_layers=False)
    return peft_layout.read(folder, base_digest=BASE)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


@pytest.mark.parametrize("case", CASES)
def test_what_peft_wrote_is_read_and_what_we_write_gives_the_same_logits(
    case: str, tmp_path: Path
) -> None:
    base, model = trained(case)
    adapter = saved(model, tmp_path / "theirs")
    assert adapter.spec.peft_type == CASES[case][2]
    assert AdapterSpec.from_json(adapter.spec.to_json()) == adapter.spec
    peft_layout.write(tmp_path / "ours", adapter, base_name="some/base")
    assert peft_layout.read(tmp_path / "ours").digest == adapter.digest
    (tmp_path / "ours" / "airpeft.json").unlink()
    again = peft_layout.read(tmp_path / "ours", base_digest=BASE)
    assert again.tensors.keys() == adapter.tensors.keys()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
    before, after = logits(base), logits(model)  # a causal model also answers for virtual tokens
    assert not torch.allclose(before, after[:, -before.shape[1] :], rtol=1e-2, atol=1e-5)


def test_a_peft_model_saves_our_folder_again_beside_our_specification(tmp_path: Path) -> None:
    """peft writes sets in any order, and leaves airpeft.json where it is."""
    base, model = trained("ia3")
    adapter = saved(model, tmp_path / "theirs")
    peft_layout.write(tmp_path / "ours", adapter, base_name="some/base")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "ours")
    assert peft_layout.read(tmp_path / "ours").digest == adapter.digest


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_folders_are_read(case: str, tmp_path: Path) -> None:
    _, model = trained(case)
    adapter = saved(model, tmp_path / "whole")
    half = saved(model.to(torch.bfloat16), tmp_path / "half")
    assert half.spec == adapter.spec
    for key, value in half:
        # A projected prefix is computed in bfloat16, and not only rounded.
        assert np.allclose(value, adapter.tensors[key], rtol=2**-7, atol=2**-7), key
        assert np.array_equal(bf16_bits(value).astype(np.uint32) << 16, value.view(np.uint32))


def test_which_tensors_are_the_adapters_own_and_which_replace_the_base(tmp_path: Path) -> None:
    def split(case: str) -> tuple[set[str], set[str]]:
        spec = saved(trained(case)[1], tmp_path / case).spec
        return {t.name for t in spec.own}, {t.name for t in spec.whole}

    head = {"classifier.weight", "classifier.bias"}
    own, whole = split("ia3")
    assert (len(own), whole) == (8, head)
    assert split("prompt") == ({"prompt_encoder.embedding.weight"}, head)
    own, whole = split("all-biases-and-a-head")
    assert whole == head
    assert "bert.encoder.layer.0.attention.self.query.base_layer.bias" in own
    assert "bert.encoder.layer.0.output.LayerNorm.bias" in own
    assert all(name.endswith(".bias") for name in own)
    own, whole = split("norms")
    assert own == set()
    assert head < whole
    assert "bert.encoder.layer.1.output.LayerNorm.weight" in whole
    own, whole = split("dora")
    assert {name.rpartition(".")[2] for name in own} == {"lora_magnitude_vector"}
    assert len(own) == 3


def test_vectors_that_multiply_are_told_apart(tmp_path: Path) -> None:
    for case, count in (("ia3", 8), ("dora", 3), ("prompt", 0), ("all-biases-and-a-head", 0)):
        spec = saved(trained(case)[1], tmp_path / case).spec
        assert len(peft_types.scales(spec)) == count
        assert peft_types.scales(spec) <= spec.shapes().keys()


@pytest.mark.parametrize(
    ("case", "field", "value", "message"),
    [
        ("prompt", "num_attention_heads", None, "num_attention_heads is None"),
        ("prompt", "num_layers", "2", "num_layers is '2'"),
        ("prompt", "num_transformer_submodules", 2, "num_transformer_submodules is 2"),
        ("prompt", "task_type", "SEQ_2_SEQ_LM", "task_type is 'SEQ_2_SEQ_LM'"),
        ("prefix", "num_layers", 3, "multiple of 12"),
        ("bottleneck", "depth", 1, "depth is 1"),
        ("bottleneck", "act_fn", "mish", "activation='mish' is not one of relu"),
        ("bottleneck", "scaling", "big", "scaling is 'big'"),
        ("bottleneck", "scaling", 1e-7, "whole millionths"),
        ("bottleneck", "scaling", 0, "scaling_micro=0"),
        ("dora", "use_dora", False, "use_dora is not set"),
        ("bias-of-adapted-layers", "bias", "none", "neither a factor, a magnitude nor"),
        ("ia3", "peft_type", "LOHA", "allowed: LORA, IA3, PROMPT_TUNING, PREFIX_TUNING, PEANUT"),
        ("ia3", "peft_type", "PEANUT", "none of the tensors of its type"),
    ],
)
def test_a_configuration_that_is_not_supported_is_named(
    case: str, field: str, value: object, message: str, tmp_path: Path
) -> None:
    import json

    saved(trained(case)[1], tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(LayoutError, match=message) as error:
        peft_layout.read(tmp_path / "a", base_digest=BASE)
    assert str(tmp_path / "a") in str(error.value)
