"""Every PEFT type through a whole run: rounds, privacy, report, a folder that peft opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from aggregation import payload, peft_layout, peft_types
from clients.base import find_base
from clients.model import attach, build, load_tensors, tokenizer
from simulations.run import simulate
from simulations.scenario import ScenarioError, load
from tests.simulations.world import world_scenario

pytestmark = pytest.mark.filterwarnings("ignore")
# The scenario of the tests adapts one layer with LoRA of rank 2.
SETTINGS = {
    "ia3": [],
    "prompt": ["train.virtual_tokens=3"],
    "prefix": ["train.virtual_tokens=3"],
    "bottleneck": ["train.bottleneck=4"],
}
SAID = {
    "ia3": "IA3, 3 vectors",
    "prompt": "Prompt, 3 virtual tokens",
    "prefix": "Prefix, 3 virtual tokens in 1 layers",
    "bottleneck": "PEANuT, 4 units in the middle",
}


def overrides(method: str, recipe: str = "fedit") -> list[str]:
    return [
        f"train.method={method}",
        f"federation.recipe={recipe}",
        "federation.rounds=2",
        *SETTINGS[method],
    ]


@pytest.mark.parametrize("method", SETTINGS)
def test_a_private_run_of_each_type_ends_in_a_folder_that_peft_opens(
    method: str, world: Path, tmp_path: Path
) -> None:
    result = simulate(world_scenario(world, *overrides(method)), tmp_path / "run")
    lines = result.metrics
    assert [line["used"] for line in lines] == [0, 3, 3]
    assert lines[-1]["epsilon_max"] > 0
    assert lines[-1]["bytes_up"] == 3 * result.adapter.nbytes
    spec = result.adapter.spec
    assert spec.peft_type == peft_types.METHODS[method]
    start = peft_layout.read(result.out / "adapter")
    assert start.digest == result.adapter.digest
    base = find_base(world.parent / "tiny-base")
    theirs = PeftModel.from_pretrained(build(base, 2), result.adapter_folder).eval()
    ours = attach(build(base, 2), spec)
    load_tensors(ours, result.adapter)
    rows = tokenizer(base)(["the film was good", "bad plot"], padding=True, return_tensors="pt")
    batch = {key: rows[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.allclose(theirs(**batch), ours(**batch), atol=2e-6)
        assert float(ours(**batch).abs().max()) > 1e-3
    card = (result.adapter_folder / "README.md").read_text()
    assert SAID[method] in card
    assert "LoRA" not in card
    assert "Federated LoRA" not in result.report.read_text()
    sent = payload.encode(result.adapter)
    again = payload.decode(sent.data, spec_digest=spec.digest, adapter_digest=sent.adapter_digest)
    for key in peft_types.scales(spec):  # what multiplies is never rounded
        assert np.array_equal(again.tensors[key], result.adapter.tensors[key])


def test_every_tensor_of_every_type_learns(world: Path, tmp_path: Path) -> None:
    from aggregation.init import initial_adapter

    for method in SETTINGS:
        chosen = world_scenario(world, *overrides(method), seed=3)
        chosen = chosen.model_copy(update={"privacy": None})
        result = simulate(chosen, tmp_path / method)
        start = initial_adapter(result.adapter.spec, 3)
        for key, value in result.adapter:
            assert np.abs(value - start.tensors[key]).max() > 1e-4, key
        assert result.metrics[-1]["loss"] < result.metrics[0]["loss"], method


def test_a_coordinate_rule_takes_named_tensors_and_products_do_not(
    world: Path, tmp_path: Path
) -> None:
    result = simulate(world_scenario(world, *overrides("ia3", "median")), tmp_path / "median")
    assert result.metrics[-1]["used"] == 3
    for recipe in ("svd-warm-start", "rolora", "rfa"):
        with pytest.raises(ScenarioError, match=r"makes sense for LoRA only.*choose fedit"):
            simulate(world_scenario(world, *overrides("ia3", recipe)), tmp_path / recipe)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["train.method=ia3", "train.rank=4"], "rank is of no use to method 'ia3', only to lora"),
        (["train.method=prompt", "train.layers=1"], "layers is of no use"),
        (["train.virtual_tokens=4"], "virtual_tokens is of no use to method 'lora'"),
        (["train.method=adapters"], "train.method"),
        (
            ["train.method=prefix", 'train.targets=["key"]'],
            "targets is of no use to method 'prefix', only to lora and bottleneck",
        ),
    ],
)
def test_settings_of_another_method_are_refused(
    given: list[str], message: str, world: Path
) -> None:
    with pytest.raises(ScenarioError, match=message):
        world_scenario(world, *given)


def test_a_method_in_the_file_is_taken_at_its_word(world: Path) -> None:
    """On the command line it replaces what the file says of LoRA; in the file it contradicts."""
    there = world_scenario(world, "train.method=bottleneck")
    assert (there.train.rank, there.train.targets) == (8, ("query", "value"))
    path = world.with_name("contradicting.toml")
    path.write_text(world.read_text().replace("[train]", '[train]\nmethod = "ia3"'))
    with pytest.raises(ScenarioError, match="rank is of no use to method 'ia3'"):
        load(path)


def test_a_scenario_without_a_method_has_the_digest_that_it_always_had(world: Path) -> None:
    plain = world_scenario(world)
    assert plain.digest == world_scenario(world, "train.method=lora").digest
    assert plain.digest != world_scenario(world, "train.method=ia3").digest
