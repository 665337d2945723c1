"""Weights: what a client counts, and what does not go together with weights like these."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from aggregation import choices
from aggregation.distributing import Cut, Same
from aggregation.errors import RecipeError
from aggregation.padded_mean import PaddedMean
from aggregation.pieces import FactorNoise
from aggregation.recipe import Recipe
from aggregation.recipes import RECIPES, recipe
from aggregation.reducing import FactorMean, RankMean
from aggregation.refactoring import Keep, Svd
from aggregation.robust import GeometricMedian
from aggregation.sketching import Sketch
from aggregation.spec import AdapterSpec
from aggregation.state import initial_state
from aggregation.train import AlternateSelect, OnlyB, ShareA
from aggregation.weighing import ByExamples, Frobenius, Staleness, Uniform
from tests.aggregation.adapters import (
    FEW,
    SEEDS,
    moved,
    plain_spec,
    products,
    random_adapter,
    relative,
    specs,
    update,
)


@FEW
@given(specs(), SEEDS)
def test_the_frobenius_weight_is_the_norm_of_the_scaled_products(
    spec: AdapterSpec, seed: int
) -> None:
    adapter = random_adapter(spec, seed)
    exact = np.sqrt(sum(np.linalg.norm(m) ** 2 for m in products(adapter).values()))
    assert Frobenius().weight(update("c", adapter, adapter, 7.0)) == pytest.approx(exact, rel=1e-6)


def test_frobenius_weights_enter_the_mean_and_an_empty_product_has_no_say() -> None:
    spec = plain_spec()
    state = initial_state(random_adapter(spec, 0))
    trained = [moved(state.adapter, k, 0.5) for k in range(3)]
    empty = type(state.adapter)(
        spec,
        {k: np.zeros_like(v) if "lora_B" in k else v for k, v in moved(state.adapter, 9)},
    )
    chosen = Recipe("x", weigh=Frobenius(), reduce=FactorMean(), refactor=Keep(), distribute=Same())
    reduction = chosen.begin(state)
    for k, adapter in enumerate([*trained, empty]):
        reduction.add(update(f"c{k}", state.adapter, adapter, 100.0**k))
    after, report = reduction.finish()
    norms = [Frobenius().weight(update("c", t, t)) for t in trained]
    for key, value in after.adapter:
        mean = sum(n * t.tensors[key] for n, t in zip(norms, trained, strict=True)) / sum(norms)
        assert relative(value, mean) < 1e-6
    assert report.influence["c3"] == 0.0
    assert report.weight == pytest.approx(sum(norms))


def test_if_every_product_is_empty_nothing_happens() -> None:
    spec = plain_spec()
    state = initial_state(random_adapter(spec, 0))
    empty = type(state.adapter)(
        spec, {k: np.zeros_like(v) if "lora_B" in k else v for k, v in state.adapter}
    )
    reduction = recipe("hetlora").begin(state)
    reduction.add(update("c", state.adapter, empty))
    after, _ = reduction.finish()
    assert after.adapter.digest == state.adapter.digest


def test_the_discount_is_a_power_of_the_delay() -> None:
    assert [Staleness().discount(tau) for tau in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert Staleness(exponent=0.0).discount(9) == 1.0
    assert [w().discount(5) for w in (ByExamples, Uniform, Frobenius)] == [1.0] * 3
    one = update("c", random_adapter(plain_spec(), 0), random_adapter(plain_spec(), 0), 7.0)
    assert (Staleness().weight(one), Staleness(equal=True).weight(one)) == (7.0, 1.0)
    equal = [w.equal for w in (ByExamples(), Uniform(), Frobenius(), Staleness())]
    assert (*equal, Staleness(equal=True).equal) == (False, True, False, False, True)


def test_settings_are_read_back_and_refused_out_of_bounds() -> None:
    for piece, value in (
        ("weigh", Staleness(exponent=1.0, max_staleness=3, equal=True)),
        ("reduce", PaddedMean(delta=False)),
        ("reduce", Sketch(width=12, probes=0, seed=5)),
        ("private", FactorNoise(noise_multiplier=0.5, clip=2.0)),
    ):
        assert choices.read(piece, str(value)) == value
    for make, field in (
        (lambda: Staleness(exponent=-1.0), "exponent=-1"),
        (lambda: Staleness(exponent=float("nan")), "exponent=nan"),
        (lambda: Staleness(max_staleness=-1), "max_staleness=-1"),
        (lambda: FactorNoise(clip=0.0), "clip=0"),
        (lambda: FactorNoise(noise_multiplier=float("inf")), "noise_multiplier=inf"),
        (lambda: Sketch(width=-1), "width=-1"),
    ):
        with pytest.raises(RecipeError, match=field):
            make()


MEAN = {"reduce": FactorMean(), "refactor": Keep(), "distribute": Same()}
LATE = {"weigh": Staleness()}
UNSOUND: dict[str, tuple[dict[str, object], str]] = {
    "staleness in a sketch": ({**LATE, "reduce": Sketch()}, "choose reduce=product-sum"),
    "staleness beside": (
        {**LATE, "refactor": choices.read("refactor", "svd-fold")},
        "choose refactor=svd",
    ),
    "staleness per index": ({**LATE, "reduce": RankMean()}, "choose reduce=product-sum"),
    "staleness in a robust rule": ({**LATE, "reduce": GeometricMedian()}, "weigh=examples"),
    "measured weight of a sketch": (
        {"weigh": Frobenius(), "reduce": Sketch()},
        "choose weigh=examples",
    ),
    "measured weight, robust": (
        {"weigh": Frobenius(), "reduce": GeometricMedian()},
        "choose weigh=uniform",
    ),
    "prefixes of an SVD per client": (
        {"reduce": PaddedMean(), "refactor": Keep()},
        "choose distribute=cut",
    ),
    "indices that turn": (
        {"reduce": PaddedMean(), "refactor": Svd(), "distribute": Cut()},
        "choose refactor=keep",
    ),
    "sketch of A alone": ({"train": ShareA(), "reduce": Sketch()}, "choose train=both"),
    "sketch of some indices": ({"train": AlternateSelect(), "reduce": Sketch()}, "train=only-b"),
    "sketch in int8": (
        {"codec": choices.read("codec", "int8"), "reduce": Sketch()},
        "choose codec=float32",
    ),
    "noise on B alone": ({**MEAN, "train": OnlyB(), "private": FactorNoise()}, "choose train=both"),
    "noise on no factor": ({"reduce": Sketch(), "private": FactorNoise()}, "reduce=product-sum"),
    "zeros for what was not handed out": (
        {
            "reduce": PaddedMean(delta=False),
            "refactor": Keep(),
            "distribute": choices.read("distribute", "sparse"),
        },
        "choose reduce=factor-mean",
    ),
}


@pytest.mark.parametrize("what", UNSOUND)
def test_unsound_products_cannot_be_built_and_say_what_could(what: str) -> None:
    pieces, remedy = UNSOUND[what]
    with pytest.raises(RecipeError, match=remedy):
        Recipe("x", **pieces)  # type: ignore[arg-type]


def test_the_control_warns_and_says_what_clients_add() -> None:
    chosen = recipe("dp-fedlora", {"private": "factor-noise(noise_multiplier=0.5, clip=2)"})
    asked = chosen.assignment(1, plain_spec())
    assert (asked.noise_multiplier, asked.clip) == (0.5, 2.0)
    for name, one in RECIPES.items():
        assert bool(one.warning) == (name == "dp-fedlora")
        assert one.describe()["warning"] == one.warning
    assert "sigma^4 r d_out d_in" in chosen.warning


def test_noise_on_both_factors_grows_with_the_fourth_power() -> None:
    """The formula of the warning, by experiment."""
    rng = np.random.default_rng(0)
    d_out, d_in, rank, sigma = 60, 50, 8, 0.5
    left, right = rng.standard_normal((d_out, rank)), rng.standard_normal((rank, d_in))
    found = []
    for _ in range(200):
        noisy = (left + sigma * rng.standard_normal(left.shape)) @ (
            right + sigma * rng.standard_normal(right.shape)
        )
        found.append(np.linalg.norm(noisy - left @ right) ** 2)
    linear = sigma**2 * (d_out * np.sum(right**2) + d_in * np.sum(left**2))
    assert np.mean(found) == pytest.approx(linear + sigma**4 * rank * d_out * d_in, rel=0.03)
    assert np.mean(found) > 1.1 * linear
