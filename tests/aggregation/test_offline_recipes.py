"""Every recipe off line: it combines folders as it says, or it says why it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

import airpeft
from aggregation import peft_layout
from aggregation.adapter import Adapter
from aggregation.core_basis import with_core
from aggregation.recipes import RECIPES
from aggregation.spec import AdapterSpec, TensorSpec
from tests.aggregation.adapters import BASE, plain_spec, products, random_adapter, relative

REFUSED = {"fedsa-lora", "feddpa", "dp-fedlora", "fedadam", "fedyogi", "fedadagrad"}
COUNT = 7
WEIGHTS = np.arange(1.0, COUNT + 1) / sum(range(1, COUNT + 1))


def command(*words: object) -> Result:
    return CliRunner().invoke(airpeft.app, ["aggregate", *[str(word) for word in words]])


def fitting(name: str, spec: AdapterSpec) -> list[Adapter]:
    """Adapters as a run of the recipe would leave them."""
    asked = RECIPES[name].train.assignment(1)
    found = []
    for k in range(COUNT):
        adapter = random_adapter(spec, k)
        if asked.trains == "core":
            rng = np.random.default_rng(k)
            cores = {m.name: rng.normal(size=(m.rank, m.rank)) for m in spec.modules}
            adapter = with_core(spec, cores, asked.seed, adapter.tensors)
        elif asked.trains == "B":
            shared = {m.keys[0]: random_adapter(spec, 99).tensors[m.keys[0]] for m in spec.modules}
            adapter = Adapter(spec, {**adapter.tensors, **shared})
        found.append(adapter)
    return found


def write(adapters: list[Adapter], folder: Path) -> list[Path]:
    places = [folder / f"site-{k}" for k in range(len(adapters))]
    for place, adapter in zip(places, adapters, strict=True):
        peft_layout.write(place, adapter, base_name="some/base")
    return places


def mean(adapters: list[Adapter], weights: np.ndarray = WEIGHTS) -> dict[str, np.ndarray]:
    return {
        m.name: sum(
            w * products(a)[m.name] for w, a in zip(weights, adapters, strict=True)
        )
        for m in adapters[0].spec.modules
    }  # fmt: skip


def whole(out: Path) -> dict[str, np.ndarray]:
    total = products(peft_layout.read(out))
    for place in sorted(out.glob("residual*")):
        for name, matrix in products(peft_layout.read(place)).items():
            total[name] = total[name] + matrix
    return total


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_combines_folders_or_says_why_it_needs_clients(
    name: str, tmp_path: Path
) -> None:
    adapters = fitting(name, plain_spec())
    words = [*write(adapters, tmp_path), "--recipe", name, "--out", tmp_path / "out"]
    words += ["--weights", ",".join(str(k + 1) for k in range(COUNT)), "--format", "json"]
    if RECIPES[name].reduce.trusts:
        words += ["--trusted", tmp_path / "site-0"]
    result = command(*words)
    if name in REFUSED:
        assert result.exit_code == 2
        assert "choose" in result.stderr
        assert not (tmp_path / "out").exists()
        return
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["data"]
    shares = [said["influence"][str(tmp_path / f"site-{k}")] for k in range(COUNT)]
    if RECIPES[name].weigh.kind == "examples" and RECIPES[name].reduce.weighted:
        assert shares == pytest.approx(list(WEIGHTS))
    exact = mean(adapters, np.array(shares))
    if said["error"] < 1e-6 and RECIPES[name].reduce.weighted:
        for module, matrix in exact.items():
            assert relative(whole(tmp_path / "out")[module], matrix) < 1e-5
    if RECIPES[name].reduce.weighted:
        for module, told in said["modules"].items():
            handed = products(peft_layout.read(tmp_path / "out"))[module]
            error = np.linalg.norm(handed - exact[module]) / np.linalg.norm(exact[module])
            assert told["error"] == pytest.approx(error, rel=1e-4, abs=1e-6), module
    assert sum(said["influence"].values()) == pytest.approx(1.0, abs=0.8)
    assert np.isfinite(said["error"])


@pytest.mark.parametrize(
    ("name", "factor"), [("ffa-lora", "A"), ("fedsvd", "A"), ("median", "A"), ("rolora", "A")]
)
def test_folders_that_differ_in_what_a_recipe_freezes_are_named_with_the_tensor(
    name: str, factor: str, tmp_path: Path
) -> None:
    adapters = fitting(name, plain_spec())
    adapters[2] = random_adapter(plain_spec(), 50)
    result = command(*write(adapters, tmp_path), "--recipe", name, "--out", tmp_path / "out")
    assert result.exit_code == 2
    key = plain_spec().modules[0].keys["AB".index(factor)]
    for word in (str(tmp_path / "site-2"), key, str(tmp_path / "site-0"), "svd-warm-start"):
        assert word in result.stderr


def test_rolora_takes_the_folders_of_a_round_that_trained_a(tmp_path: Path) -> None:
    spec = plain_spec()
    shared = {m.keys[1]: random_adapter(spec, 99).tensors[m.keys[1]] for m in spec.modules}
    adapters = [Adapter(spec, {**random_adapter(spec, k).tensors, **shared}) for k in range(COUNT)]
    words = ["--recipe", "rolora", "--out", tmp_path / "out"]
    assert command(*write(adapters, tmp_path), *words).exit_code == 0
    for module, matrix in mean(adapters, np.full(COUNT, 1 / COUNT)).items():
        assert relative(whole(tmp_path / "out")[module], matrix) < 1e-5


def test_fed_sb_takes_only_folders_of_its_public_basis(tmp_path: Path) -> None:
    adapters = fitting("fed-sb", plain_spec())
    adapters[3] = random_adapter(plain_spec(), 3)
    for k in (0, 3):  # the first folder too: it is no measure of the others
        adapters[k] = random_adapter(plain_spec(), 3)
    result = command(*write(adapters, tmp_path), "--recipe", "fed-sb", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "site-" in result.stderr
    alone = command(tmp_path / "site-0", "--recipe", "fed-sb", "--out", tmp_path / "out")
    assert "public basis of seed 0" in alone.stderr


def test_a_sketch_that_is_wide_enough_gives_the_exact_mean(tmp_path: Path) -> None:
    adapters = fitting("fedask", plain_spec())
    words = ["--piece", "reduce=sketch(width=24)", "--piece", "refactor=svd(residual_rank=64)"]
    out = tmp_path / "out"
    result = command(*write(adapters, tmp_path), "--recipe", "fedask", *words, "--out", out)
    assert result.exit_code == 0, result.output
    for module, matrix in mean(adapters, np.full(COUNT, 1 / COUNT)).items():
        assert relative(whole(out)[module], matrix) < 1e-5


def test_a_codec_costs_what_it_costs_in_rounds(tmp_path: Path) -> None:
    adapters = fitting("fedit", plain_spec())
    places = write(adapters, tmp_path)
    said = {}
    for codec in ("float32", "int8", "int4"):
        words = ["--piece", f"codec={codec}", "--out", tmp_path / codec, "--format", "json"]
        result = command(*places, *words)
        assert result.exit_code == 0, result.output
        said[codec] = json.loads(result.stdout)["data"]
        exact = mean(adapters, np.full(COUNT, 1 / COUNT))
        for module, told in said[codec]["modules"].items():
            left = whole(tmp_path / codec)[module] - exact[module]
            missed = np.linalg.norm(left) / np.linalg.norm(exact[module])
            assert told["error_with_residual"] == pytest.approx(missed, rel=1e-3, abs=1e-6)
    assert said["float32"]["bytes_in"] == sum(a.nbytes for a in adapters)
    assert said["int8"]["bytes_in"] < 0.3 * said["float32"]["bytes_in"]
    assert said["int4"]["bytes_in"] < 0.6 * said["int8"]["bytes_in"]
    errors = [max(m["error_with_residual"] for m in said[c]["modules"].values()) for c in said]
    assert errors[0] < 1e-6 < errors[1] < 0.02 < errors[2]


def test_the_trusted_folder_may_be_a_further_one_and_is_not_in_the_mean(tmp_path: Path) -> None:
    adapters = fitting("fltrust", plain_spec())
    places = write(adapters, tmp_path)
    words = ["--recipe", "fltrust", "--format", "json"]
    inside = command(*places, *words, "--trusted", places[0], "--out", tmp_path / "a")
    outside = command(*places[1:], *words, "--trusted", places[0], "--out", tmp_path / "b")
    assert inside.exit_code == outside.exit_code == 0, inside.output + outside.output
    one, two = (json.loads(r.stdout)["data"] for r in (inside, outside))
    assert one["influence"][str(places[0])] == 0
    assert one["influence"] == two["influence"]
    for module, matrix in whole(tmp_path / "a").items():
        assert relative(whole(tmp_path / "b")[module], matrix) < 1e-6
    nobody = command(*places, "--recipe", "fltrust", "--out", tmp_path / "c")
    assert (nobody.exit_code, "trusted" in nobody.stderr) == (2, True)
    nothing = command(*places, "--trusted", places[0], "--out", tmp_path / "c")
    assert (nothing.exit_code, "fltrust" in nothing.stderr) == (2, True)


def test_liars_are_kept_out_of_the_folders(tmp_path: Path) -> None:
    adapters = fitting("krum", plain_spec())
    key = plain_spec().modules[0].keys[1]
    loud = {**adapters[0].tensors, key: 1e3 * adapters[0].tensors[key]}
    adapters[5] = Adapter(plain_spec(), loud)
    words = ["--recipe", "krum", "--piece", "reduce=krum(liars=2)", "--format", "json"]
    result = command(*write(adapters, tmp_path), *words, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    influence = json.loads(result.stdout)["data"]["influence"]
    assert influence[str(tmp_path / "site-5")] == 0
    assert sorted(influence.values())[-2:] == [0, 1]
    few = command(*write(adapters[:6], tmp_path), *words, "--out", tmp_path / "few")
    assert (few.exit_code, "2 f + 3" in few.stderr) == (2, True)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("codec", "not PIECE=CHOICE"),
        ("codec=int9", "did you mean int"),
        ("codek=int8", "no piece 'codek'"),
        ("reduce=factor-mean", "rank"),
        ("train=share-a", "one model for each client"),
    ],
)
def test_a_wrong_piece_is_named(piece: str, message: str, tmp_path: Path) -> None:
    places = write(fitting("fedit", plain_spec())[:2], tmp_path)
    result = command(*places, "--piece", piece, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    twice = ["--piece", "codec=int8", "--piece", "codec=int4", "--out", tmp_path / "out"]
    assert "given twice" in command(*places, *twice).stderr


def test_mixed_ranks_off_line_for_recipes_that_order_their_rank_indices(tmp_path: Path) -> None:
    adapters = [random_adapter(plain_spec(ranks), k) for k, ranks in enumerate([(2, 4), (4, 2)])]
    for name in ("hetlora", "fed-plora"):
        places = write(adapters, tmp_path)
        result = command(*places, "--recipe", name, "--out", tmp_path / name)
        if RECIPES[name].reduce.mixed_ranks and RECIPES[name].distribute.mixed_ranks:
            assert result.exit_code == 0, result.output
            assert [m.rank for m in peft_layout.read(tmp_path / name).spec.modules] == [4, 4]


def test_dora_and_rslora_folders_are_combined(tmp_path: Path) -> None:
    spec = replace(plain_spec(), use_rslora=True)
    adapters = [random_adapter(spec, k) for k in range(3)]
    assert command(*write(adapters, tmp_path), "--out", tmp_path / "out").exit_code == 0
    for module, matrix in mean(adapters, np.full(3, 1 / 3)).items():
        assert relative(whole(tmp_path / "out")[module], matrix) < 1e-5


def test_flora_begins_the_factors_afresh_and_keeps_trained_biases(tmp_path: Path) -> None:
    plain = plain_spec()
    bias = TensorSpec("layer.0.query.base_layer.bias", (plain.modules[0].d_out,))
    spec = replace(plain, others=(bias,), settings=(("bias", "lora_only"),))
    adapters = [random_adapter(spec, k) for k in range(3)]
    result = command(*write(adapters, tmp_path), "--recipe", "flora", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    mean = np.mean([adapter.tensors[bias.key] for adapter in adapters], axis=0)
    found = peft_layout.read(tmp_path / "out")
    assert relative(found.tensors[bias.key], mean) < 1e-6
    assert not any(found.factors(module.name)[0].any() for module in spec.modules)


def test_what_is_said_of_the_error_is_true_of_tensors_without_modules_too(tmp_path: Path) -> None:
    own = TensorSpec("layer.key.ia3_l", (24, 1))
    spec = AdapterSpec(BASE, others=(own,), peft_type="IA3", settings=(("fan_in_fan_out", False),))
    adapters = [random_adapter(spec, k) for k in range(COUNT)]
    made = write(adapters, tmp_path)
    exact = np.mean([adapter.tensors[own.key] for adapter in adapters], axis=0, dtype=np.float64)
    for name, pieces in (("fedit", ()), ("fedit", ("--piece", "codec=int4")), ("median", ())):
        out = tmp_path / f"{name}{len(pieces)}"
        words = [*made, "--recipe", name, *pieces, "--out", out]
        said = json.loads(command(*words, "--format", "json").stdout)["data"]
        error = relative(peft_layout.read(out).tensors[own.key], exact)
        assert (error > 1e-3) == (out.name != "fedit0")
        assert said["tensors"][own.name] == {"error": pytest.approx(error, abs=1e-9), "bytes": 96}
        assert said["error"] == said["tensors"][own.name]["error"]
        assert said["against"] == "the exact mean"
    made = write([random_adapter(plain_spec(), k) for k in range(COUNT)], tmp_path / "lora")
    shown = command(*made, "--recipe", "krum", "--out", tmp_path / "krum").stdout
    assert "against the updates as the rule weighs them" in shown
    assert "head.weight" in shown
