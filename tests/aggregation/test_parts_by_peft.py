"""Cut clients, sketched means and late updates, judged by peft's own arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from aggregation import peft_layout
from aggregation.adapter import Adapter
from aggregation.distributing import Cut
from aggregation.recipe import Recipe
from aggregation.recipes import recipe
from aggregation.sketching import Sketch
from aggregation.state import GlobalState
from aggregation.update import Update
from tests.aggregation.adapters import BASE, relative
from tests.aggregation.test_offline import CASES, deltas, save

pytestmark = pytest.mark.filterwarnings("ignore")


def read(folder: Path) -> Adapter:
    return peft_layout.read(folder, base_digest=BASE)


def by_peft(case: str, adapter: Adapter, folder: Path) -> dict[str, np.ndarray]:
    """What peft applies with an adapter of ours."""
    peft_layout.write(folder, adapter, base_name="tiny")
    return deltas(PeftModel.from_pretrained(CASES[case][0](), folder))


@pytest.mark.parametrize("case", CASES)
def test_a_cut_client_applies_the_first_terms_of_what_the_server_has(
    case: str, tmp_path: Path
) -> None:
    model = save(case, tmp_path / "global", 0, r=4, lora_alpha=6)
    save(case, tmp_path / "small", 1, r=3, lora_alpha=16, use_rslora=True)
    state = GlobalState(read(tmp_path / "global"))
    theirs = read(tmp_path / "small").spec
    loaded = Cut().adapter(state, theirs)
    got = by_peft(case, loaded, tmp_path / "loaded")
    with torch.no_grad():  # the fourth index out of the server's own model
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_embedding_A" in name:
                parameter[3:] = 0
    expected = deltas(model)
    assert set(got) == set(expected)
    for name, matrix in expected.items():
        assert np.linalg.norm(matrix) > 0
        assert relative(got[name], matrix) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_a_sketched_and_a_late_mean_are_exact(case: str, tmp_path: Path) -> None:
    """Ranks 2, 4 and 3, other alphas, rsLoRA or not; the second client is three versions late."""
    expected: dict[str, np.ndarray] = {}
    sketched: dict[str, np.ndarray] = {}
    adapters, weights = [], (3.0, 1.0, 7.0)
    settings = ((2, 8, False), (4, 5, True), (3, 16, False))
    for k, (rank, alpha, rslora) in enumerate(settings):
        model = save(case, tmp_path / f"c{k}", k, r=rank, lora_alpha=alpha, use_rslora=rslora)
        adapters.append(read(tmp_path / f"c{k}"))
        for name, matrix in deltas(model).items():
            share = weights[k] / sum(weights)
            sketched[name] = sketched.get(name, 0.0) + share * matrix
            discount = 0.5 if k == 1 else 1.0
            expected[name] = expected.get(name, 0.0) + discount * share * matrix
    # Room for all of the result, so that peft can show it whole.
    spec = adapters[1].spec.with_ranks(
        {m.name: min(m.d_in, m.d_out) for m in adapters[1].spec.modules}
    )
    zeros = {a.spec.digest: Adapter.zeros(a.spec) for a in adapters}
    cases = (
        (Recipe("wide", reduce=Sketch(width=16)), sketched, (4, 4, 4)),
        (recipe("fedbuff"), expected, (4, 1, 4)),
    )
    for chosen, exact, rounds in cases:
        reduction = chosen.begin(
            GlobalState(Adapter.zeros(spec), round=3),
            starts={zero.digest: zero for zero in zeros.values()},
        )
        for k, (adapter, number) in enumerate(zip(adapters, rounds, strict=True)):
            start = zeros[adapter.spec.digest].digest
            reduction.add(Update(f"c{k}", number, start, adapter, weights[k]))
        state, _ = reduction.finish()
        got = by_peft(case, state.adapter, tmp_path / chosen.name)
        for name, matrix in exact.items():
            assert relative(got[name], matrix) < 1e-5
