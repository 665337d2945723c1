"""``airpeft aggregate`` and ``airpeft recipes``, with peft's own arithmetic as the truth."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

import airpeft
from aggregation import peft_layout
from aggregation.adapter import Adapter
from aggregation.offline_clients import sent
from aggregation.recipes import RECIPES
from aggregation.spec import TensorSpec
from tests.aggregation.adapters import plain_spec, products, random_adapter, relative

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = (3.0, 1.0, 7.0)


def command(*words: object) -> Result:
    return CliRunner().invoke(airpeft.app, [str(word) for word in words])


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(
        GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=16, num_labels=3,
                   pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ).eval()  # fmt: skip


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=1)
    ).eval()  # fmt: skip


CASES: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]] = {
    "conv1d-embedding-head": (
        gpt2,
        {
            "target_modules": ["wte", "c_attn", "c_proj"],
            "modules_to_save": ["score"],
            "fan_in_fan_out": True,
        },
    ),
    "linear-embedding": (
        llama,
        {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens", "q_proj", "down_proj"]},
    ),
}


def save(case: str, folder: Path, seed: int, *, one_a: bool = False, **settings: Any) -> PeftModel:
    make, targets = CASES[case]
    model = get_peft_model(make(), LoraConfig(**targets, **settings)).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    for name, parameter in model.named_parameters():
        if one_a and ("lora_A" in name or "embedding_A" in name):
            with torch.no_grad():
                parameter.copy_(torch.cos(torch.arange(parameter.numel())).view_as(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def deltas(model: PeftModel, adapter: str = "default") -> dict[str, np.ndarray]:
    return {
        name: module.get_delta_weight(adapter).detach().double().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
        and adapter in {**module.lora_A, **dict(module.lora_embedding_A)}
    }


def whole(case: str, out: Path) -> dict[str, np.ndarray]:
    """What peft applies with the result and all of its residuals loaded and active."""
    model = PeftModel.from_pretrained(CASES[case][0](), out)
    names = ["default"]
    for folder in sorted(out.glob("residual*")):
        model.load_adapter(folder, adapter_name=folder.name)
        names.append(folder.name)
    total: dict[str, np.ndarray] = {}
    for name in names:
        for module, matrix in deltas(model, name).items():
            total[module] = total.get(module, 0.0) + matrix
    return total


@pytest.mark.parametrize(
    ("recipe", "mixed"),
    [
        (name, mixed)
        for name, told in ((name, recipe.describe()) for name, recipe in RECIPES.items())
        if RECIPES[name].train.assignment(1).sends == "both"  # the others need a factor in common
        for mixed in (False, True)
        if told["exact"] and (told["mixed_ranks"] or not mixed)
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_the_result_and_its_residual_are_the_exact_mean_by_peft_s_arithmetic(
    case: str, mixed: bool, recipe: str, tmp_path: Path
) -> None:
    expected: dict[str, np.ndarray] = {}
    head = 0.0
    ranks = ((2, 8, False), (4, 5, True), (3, 16, False)) if mixed else ((2, 8, True),) * 3
    for k, (rank, alpha, rslora) in enumerate(ranks):
        frozen = RECIPES[recipe].train.assignment(1).trains == "B"
        model = save(
            case, tmp_path / f"c{k}", k, one_a=frozen, r=rank, lora_alpha=alpha, use_rslora=rslora
        )
        share = WEIGHTS[k] / sum(WEIGHTS)
        for name, matrix in deltas(model).items():
            expected[name] = expected.get(name, 0.0) + share * matrix
        if "modules_to_save" in CASES[case][1]:
            saved = model.base_model.model.score.modules_to_save["default"].weight
            head = head + share * saved.detach().double().numpy()
    folders = [tmp_path / f"c{k}" for k in range(3)]
    out = tmp_path / "out"
    result = command("aggregate", *folders, "--weights", "3,1,7", "--recipe", recipe, "--out", out)
    assert result.exit_code == 0, result.output
    got = whole(case, out)
    assert set(got) == set(expected)
    assert len(expected) > 1
    for name, matrix in expected.items():
        assert relative(got[name], matrix) < 1e-5, name
    assert not (out / "airpeft.json").exists()  # nobody said what the base is
    if "modules_to_save" in CASES[case][1]:
        loaded = PeftModel.from_pretrained(CASES[case][0](), out)
        saved = loaded.base_model.model.score.modules_to_save["default"].weight
        assert relative(saved.detach().double().numpy(), head) < 1e-6


def test_a_model_with_both_adapters_active_gives_the_logits_of_the_merged_mean(
    tmp_path: Path,
) -> None:
    models = [save("linear-embedding", tmp_path / f"c{k}", k, r=2) for k in range(3)]
    out = tmp_path / "out"
    assert (
        command("aggregate", *(tmp_path / f"c{k}" for k in range(3)), "--out", out).exit_code == 0
    )
    merged = llama()
    for model in models:
        for name, matrix in deltas(model).items():
            weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
            weight.data += torch.from_numpy(matrix / 3).float()
    loaded = PeftModel.from_pretrained(llama(), out)
    loaded.load_adapter(out / "residual", adapter_name="residual")
    loaded.base_model.set_adapter(["default", "residual"])
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(tokens).logits, merged(tokens).logits, atol=1e-5)


def folders(tmp_path: Path, count: int = 3, **ranks: int) -> list[Path]:
    made = []
    for k in range(count):
        made.append(tmp_path / f"c{k}")
        peft_layout.write(made[-1], random_adapter(plain_spec(), k), base_name="some/base")
    return made


def test_our_own_folders_need_no_digest_and_the_result_is_one_of_them(tmp_path: Path) -> None:
    made, out = folders(tmp_path), tmp_path / "out"
    result = command("aggregate", *made, "--out", out, "--report", "--format", "json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["schema"] == "airpeft.v1.aggregation"
    adapter = peft_layout.read(out)
    residual = peft_layout.read(out / "residual")
    assert not residual.spec.others
    for name, module in said["data"]["modules"].items():
        exact = sum(products(peft_layout.read(f))[name] for f in made) / 3
        trained = products(adapter)[name]
        error = np.linalg.norm(exact - trained) / np.linalg.norm(exact)
        assert module["error"] == pytest.approx(error, rel=1e-4)
        assert module["energy"] == pytest.approx(1 - error**2, rel=1e-4)
        assert (module["rank"], module["residual_rank"]) == (4, 8)
        assert relative(trained + products(residual)[name], exact) < 1e-6
    assert said["data"]["bytes"] == adapter.nbytes
    assert said["data"]["residual_bytes"] == residual.nbytes
    assert said["data"]["bytes_in"] == 3 * adapter.nbytes
    written = json.loads((out / "report.json").read_text())
    assert written["modules"] == said["data"]["modules"]
    table = command("aggregate", *made, "--out", tmp_path / "again").stdout
    assert "layer.0.query" in table
    assert str(tmp_path / "again" / "residual") in table


def test_fedit_hands_out_the_mean_of_the_factors(tmp_path: Path) -> None:
    made, out = folders(tmp_path), tmp_path / "out"
    assert command("aggregate", *made, "--recipe", "fedit", "--out", out).exit_code == 0
    adapters = [peft_layout.read(folder) for folder in made]
    for key, value in peft_layout.read(out):
        assert relative(value, sum(a.tensors[key] for a in adapters) / 3) < 1e-6
    assert not (out / "residual").exists()


def test_one_folder_comes_back_and_a_weight_of_zero_leaves_one_out(tmp_path: Path) -> None:
    made = folders(tmp_path, 2)
    assert command("aggregate", made[0], "--out", tmp_path / "one").exit_code == 0
    done = command("aggregate", *made, "--weights", "2,0", "--out", tmp_path / "zero")
    assert done.exit_code == 0
    for out in ("one", "zero"):
        for name, matrix in products(peft_layout.read(made[0])).items():
            assert relative(products(peft_layout.read(tmp_path / out))[name], matrix) < 1e-6
        assert not (tmp_path / out / "residual").exists()


def test_a_residual_of_a_rank_above_what_a_folder_takes_is_split(tmp_path: Path) -> None:
    spec = plain_spec((160,), width=600)
    made = [tmp_path / f"c{k}" for k in range(3)]
    for k, folder in enumerate(made):
        peft_layout.write(folder, random_adapter(spec, k), base_name="x")
    assert command("aggregate", *made, "--out", tmp_path / "out").exit_code == 0
    parts = [tmp_path / "out", tmp_path / "out/residual", tmp_path / "out/residual-2"]
    adapters = [peft_layout.read(part) for part in parts]
    assert [a.spec.modules[0].rank for a in adapters] == [160, 256, 64]
    got = sum(products(a)["layer.0.query"] for a in adapters)
    exact = sum(products(peft_layout.read(f))["layer.0.query"] for f in made) / 3
    assert relative(got, exact) < 1e-6


def test_florist_chooses_the_rank_by_energy_and_the_folder_has_that_rank(tmp_path: Path) -> None:
    made, out = folders(tmp_path), tmp_path / "out"
    result = command("aggregate", *made, "--recipe", "florist", "--out", out, "--format", "json")
    assert result.exit_code == 0, result.output
    adapter, said = peft_layout.read(out), json.loads(result.stdout)["data"]
    for module in adapter.spec.modules:
        exact = sum(products(peft_layout.read(f))[module.name] for f in made) / 3
        values = np.linalg.svd(exact, compute_uv=False)
        smallest = int(np.argmax(np.cumsum(values**2) >= 0.9 * np.sum(values**2))) + 1
        assert module.rank == said["modules"][module.name]["rank"] == smallest > 4
        missed = np.linalg.norm(exact - products(adapter)[module.name])
        assert missed == pytest.approx(np.linalg.norm(values[smallest:]), rel=1e-5)
        assert said["modules"][module.name]["energy"] >= 0.9
    assert said["bytes"] == adapter.nbytes
    assert not (out / "residual").exists()


def another_base(folder: Path) -> None:
    path = folder / "airpeft.json"
    path.write_text(path.read_text().replace("0" * 64, "1" * 64))


def changed(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        spec = plain_spec(**changes)
        peft_layout.write(folder, random_adapter(spec, 9), base_name="some/base")

    return apply


def with_extra(folder: Path) -> None:
    spec = plain_spec()
    spec = type(spec)(spec.base_digest, spec.modules, (*spec.others, TensorSpec("head.bias", (3,))))
    peft_layout.write(folder, random_adapter(spec, 9), base_name="some/base")


def poisoned(folder: Path) -> None:
    spec = plain_spec()
    tensors = dict(random_adapter(spec, 0).tensors)
    key = spec.modules[0].keys[0]
    tensors[key] = np.full(spec.shapes()[key], np.nan, np.float32)
    peft_layout.write(folder, Adapter(spec, tensors), base_name="x")


def without(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (another_base, ("is for base sha256:1111",)),
        (changed(ranks=(4,)), ("layer.1.query.lora_A.weight", "missing")),
        (changed(ranks=(4, 4, 4)), ("layer.2.query.lora_A.weight", "extra")),
        (with_extra, ("head.bias", "extra")),
        (changed(width=20), ("layer.0.query", "20 x 20", "expected 24 x 24")),
        (poisoned, ("layer.0.query.lora_A.weight", "NaN")),
        (without, ("adapter_config.json",)),
    ],
    ids=["base", "missing", "extra", "head", "shape", "nan", "empty"],
)
def test_a_folder_that_does_not_fit_is_named_with_its_tensor(
    spoil: Callable[[Path], None], words: tuple[str, ...], tmp_path: Path
) -> None:
    made = folders(tmp_path)
    spoil(made[1])
    result = command("aggregate", *made, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert str(made[1]) in result.stderr
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    made, out = folders(tmp_path), tmp_path / "out"
    for words, message in (
        (["--weights", "1,2"], "2 weights for 3 folders"),
        (["--weights", "1,-2,1"], f"{made[1]}: weight=-2"),
        (["--weights", "1,nan,1"], f"{made[1]}: weight=nan"),
        (["--weights", "1,1e-320,1"], f"{made[1]}: weight=9.99989e-321 must be 0 or lie in"),
        (["--weights", "1,1,1e300"], "only ratios count"),
        (["--weights", "0,0,0"], "sum to 0"),
        (["--weights", "1;2"], "not numbers with commas"),
        (["--recipe", "fedlt"], "did you mean 'fedit'"),
        (["--base-name", "/home/me/model"], "a path"),
    ):
        result = command("aggregate", *made, "--out", out, *words)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
        assert not out.exists()
    assert "no folders" in command("aggregate", "--out", out).stderr
    assert "no --out" in command("aggregate", *made).stderr
    assert "given twice" in command("aggregate", made[0], made[0], "--out", out).stderr
    taken = command("aggregate", *made, "--out", made[0])
    assert taken.exit_code == 2
    assert "already there" in taken.stderr


def test_what_is_there_once_is_not_held_twice() -> None:
    """One start for all folders, and no second copy of what arrives as it is."""
    members = [(f"site-{k}", random_adapter(plain_spec(width=2000), k), 1.0) for k in range(6)]
    tracemalloc.start()
    try:
        arrived, _ = sent(RECIPES["fedit"], members)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert all(one.adapter is member[1] for one, member in zip(arrived, members, strict=True))
    assert held < 1.5 * members[0][1].nbytes


def test_mixed_ranks_under_a_plain_mean_are_refused_by_folder_and_module(tmp_path: Path) -> None:
    made = folders(tmp_path)
    changed(ranks=(2, 4))(made[2])
    result = command("aggregate", *made, "--recipe", "fedit", "--out", tmp_path / "out")
    assert result.exit_code == 2
    for word in ("layer.0.query", "rank"):
        assert word in result.stderr


def test_plain_folders_are_told_apart_by_the_name_of_their_base(tmp_path: Path) -> None:
    made = folders(tmp_path)
    for k, folder in enumerate(made):
        (folder / "airpeft.json").unlink()
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "/models/one" if k < 2 else "/models/two"
        (folder / "adapter_config.json").write_text(json.dumps(config))
    result = command("aggregate", *made, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{made[2]}: its base model is '/models/two'" in result.stderr
    digest = "sha256:" + "5" * 64
    done = command("aggregate", *made, "--out", tmp_path / "out", "--base-digest", digest)
    assert done.exit_code == 0, done.output
    assert peft_layout.read(tmp_path / "out").spec.base_digest == digest
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "one"  # never a path
    two = command("aggregate", *made[:2], "--out", tmp_path / "two", "--base-name", "org/one")
    assert two.exit_code == 0, two.output
    written = json.loads((tmp_path / "two/residual/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "org/one"


def test_recipes_are_listed_with_their_properties() -> None:
    table = command("recipes")
    assert table.exit_code == 0
    assert max(map(len, table.stdout.splitlines())) <= 100
    data = json.loads(command("recipes", "--format", "json").stdout)
    assert data["schema"] == "airpeft.v1.recipes"
    assert [row["name"] for row in data["data"]] == list(RECIPES)
    for row in data["data"]:
        assert row["name"] in table.stdout
        for key in ("exact", "mixed_ranks", "secure_sum", "dp_friendly", "personal"):
            assert isinstance(row[key], bool)
        for key in ("trains", "up", "down", "reference"):
            assert row[key]


@pytest.mark.parametrize("name", RECIPES)
def test_one_recipe_is_shown_with_its_pieces_and_what_each_means(name: str) -> None:
    shown = command("recipes", name)
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines())) <= 100
    data = json.loads(command("recipes", name, "--format", "json").stdout)["data"]
    assert data["reference"].split()[0] in shown.stdout
    for piece, detail in data["details"].items():
        assert detail["choice"] == str(getattr(RECIPES[name], piece))
        assert detail["choice"] in shown.stdout
        assert detail["means"]
        for setting in detail["settings"].values():
            assert setting["means"], (piece, detail)  # every setting says what it is
    unknown = command("recipes", "fedlt")
    assert unknown.exit_code == 2
    assert "did you mean 'fedit'" in unknown.stderr
