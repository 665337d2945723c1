"""Client-level noise at the sum: what one client can do, what is released, what goes together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import choices
from aggregation.adapter import Adapter
from aggregation.client_dp import ClientDp, ClientDpFtrl
from aggregation.clipped_sum import (
    ClipError,
    ClippedSum,
    Release,
    VectorSum,
    clip_update,
    noisy,
    on_grid,
    step,
)
from aggregation.errors import RecipeError
from aggregation.init import initial_adapter
from aggregation.recipe import Recipe
from aggregation.recipes import RECIPES, recipe
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState
from aggregation.update import Update, UpdateError
from aggregation.weighing import Staleness, Uniform
from tests.aggregation.adapters import FEW, honest, plain_spec, products, random_adapter, update
from tests.aggregation.noise_sources import FreeNoise

FRIENDLY = ("ffa-lora", "fedsvd", "fed-sb", "rolora")
SPEC = plain_spec((3, 2), 12)


def noised(name: str, private: ClientDp | ClientDpFtrl | None = None) -> Recipe:
    return replace(RECIPES[name], private=private or ClientDp(), weigh=Uniform())


def open_sum(chosen: Recipe, state: GlobalState, noise: FreeNoise | None = None) -> ClippedSum:
    task = chosen.assignment(state.round + 1, state.adapter.spec)
    return chosen.private.open(state, task, noise or FreeNoise())  # type: ignore[no-any-return]


def liar(
    chosen: Recipe, state: GlobalState, seed: int, size: float, turn: Sequence[float]
) -> Adapter:
    """Trained factors of any size, turned into another gauge where both are sent."""
    trained = honest(chosen, state.adapter, seed, size, state.round + 1)
    if chosen.assignment(1, trained.spec).sends != "both":
        return trained
    tensors = dict(trained.tensors)
    for module in trained.spec.modules:
        key_a, key_b = module.keys
        gauge = np.diag(np.resize(np.asarray(turn), module.rank))
        tensors[key_b] = (tensors[key_b] @ gauge).astype(np.float32)
        tensors[key_a] = (np.linalg.inv(gauge) @ tensors[key_a]).astype(np.float32)
    return Adapter(trained.spec, tensors)


@given(
    name=st.sampled_from([*FRIENDLY, "fedit", "fedsa-lora"]),
    clip=st.sampled_from([1e-4, 0.3, 1.0, 7.0, 1e3]),
    size=st.sampled_from([0.0, 1e-6, 0.1, 1.0, 1e6]),
    turn=st.lists(st.floats(0.01, 100.0), min_size=3, max_size=3),
    others=st.integers(0, 4),
    seed=st.integers(0, 10_000),
)
@FEW
def test_one_client_moves_the_sum_by_at_most_the_clip(
    name: str, clip: float, size: float, turn: list[float], others: int, seed: int
) -> None:
    """Whatever it sends: exactly, in whole numbers, not up to rounding."""
    chosen = noised(name, ClientDp(clip=clip))
    state = chosen.start(random_adapter(SPEC, 1) if name != "fed-sb" else initial_adapter(SPEC, 1))
    without, with_liar = open_sum(chosen, state), open_sum(chosen, state)
    for number in range(others):
        for one in (without, with_liar):
            one.add(honest(chosen, state.adapter, seed + number, 2.0), state.adapter, 1.0)
    with_liar.add(liar(chosen, state, seed, size, turn), state.adapter, 1e9)
    moved = [int(x) for x in with_liar.vectors.total - without.vectors.total]
    assert sum(x * x for x in moved) <= (clip / step(clip)) ** 2
    assert abs(with_liar.vectors.balance - without.vectors.balance) == 1


@given(
    vector=st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=8),
    clip=st.floats(1e-6, 1e6),
)
@FEW
def test_clipping_is_a_projection_that_clients_may_do_themselves(
    vector: list[float], clip: float
) -> None:
    once = clip_update(np.array(vector), clip)
    assert np.linalg.norm(once.vector) <= clip
    twice = clip_update(once.vector, clip)
    assert np.array_equal(twice.vector, once.vector)
    assert twice.within
    if once.within:
        assert np.array_equal(once.vector, np.array(vector))
    else:
        assert np.linalg.norm(once.vector) >= clip * (1 - 1e-9)


def test_rounding_to_the_grid_never_makes_a_vector_longer() -> None:
    """Ten thousand equal values whose nearest places on the grid all lie further out."""
    vector = np.full(10_000, 0.01)
    assert math.modf(0.01 / step(1.0))[0] > 0.7
    whole = [int(x) for x in on_grid(clip_update(vector, 1.0).vector, 1.0)]
    assert sum(x * x for x in whole) <= (1.0 / step(1.0)) ** 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_vector_is_refused_and_leaves_the_sum_as_it_was(bad: float) -> None:
    total = VectorSum(2, Release(1.0, 1.0, 1.0), 1, FreeNoise())
    total.add(np.array([0.5, 0.0]))
    before = total.inputs()
    with pytest.raises(ClipError, match="NaN or infinite"):
        total.add(np.array([0.0, bad]))
    with pytest.raises(ClipError, match="shape"):
        total.add(np.zeros(3))
    assert total.inputs() == before


@pytest.mark.parametrize("name", [*FRIENDLY, "fedit"])
def test_a_client_that_sends_nan_is_refused_and_the_others_count(name: str) -> None:
    chosen = noised(name)
    state = chosen.start(initial_adapter(SPEC, 1))
    trained = honest(chosen, state.adapter, 4)
    spoilt = trained.pack().copy()
    spoilt[-1] = np.nan
    results = []
    for rogue in (True, False):
        reduction = chosen.begin(state, noise=FreeNoise())
        if rogue:
            with pytest.raises(UpdateError, match="not-finite"):
                reduction.add(update("rogue", state.adapter, Adapter.unpack(SPEC, spoilt)))
        reduction.add(update("good", state.adapter, trained))
        results.append(reduction.finish()[0])
    assert results[0].adapter.digest == results[1].adapter.digest


def test_noise_is_rounded_to_the_grid_and_so_a_function_of_the_exact_mechanism() -> None:
    clip = 0.7
    rng = np.random.default_rng(0)
    vectors = [clip_update(rng.normal(size=50), clip).vector for _ in range(9)]
    totals = [on_grid(v, clip) for v in vectors]
    forward, backward = sum(totals), sum(reversed(totals))
    assert np.array_equal(forward, backward)
    noise = rng.normal(size=50) * 2.0
    released = noisy(forward, clip, noise)  # type: ignore[arg-type]
    size = step(clip)
    assert np.array_equal(released / size, np.rint(released / size))
    assert np.allclose(released, sum(vectors) + clip * noise, rtol=0, atol=10 * size)
    assert 2.0**-41 * clip < size <= 2.0**-40 * clip


def energy(before: Adapter, after: Adapter) -> float:
    old, new = products(before), products(after)
    return sum(float(np.sum((new[name] - old[name]) ** 2)) for name in old)


def slopes(name: str, spec: AdapterSpec) -> tuple[float, float]:
    """Log-log slope of the released energy against sigma, over all of it and at its end."""
    sigmas = np.geomspace(1e-3, 1.0, 7)
    logs = []
    for sigma in sigmas:
        chosen = noised(name, ClientDp(noise_multiplier=float(sigma)))
        state = chosen.start(initial_adapter(spec, 3))
        found = [
            energy(state.adapter, chosen.begin(state, noise=FreeNoise(seed=s)).finish()[0].adapter)
            for s in range(6)
        ]
        logs.append(math.log(sum(found)))
    x = np.log(sigmas)
    return float(np.polyfit(x, logs, 1)[0]), (logs[-1] - logs[-3]) / float(x[-1] - x[-3])


@pytest.mark.parametrize("name", [n for n in RECIPES if RECIPES[n].describe()["dp_friendly"]])
def test_noise_on_one_factor_enters_the_model_linearly(name: str) -> None:
    assert noised(name).warning == ""
    over_all, at_end = slopes(name, plain_spec((8, 8), 48))
    assert over_all == pytest.approx(2.0, abs=0.05)
    assert at_end == pytest.approx(2.0, abs=0.1)


def test_noise_on_both_factors_bends() -> None:
    """The control: what the test above measures can tell the two apart."""
    over_all, at_end = slopes("fedit", plain_spec((8, 8), 48))
    assert over_all > 2.4
    assert at_end > 3.6
    assert "fourth power" in noised("fedit").warning


def test_the_recipes_that_are_named_for_it_are_friendly() -> None:
    for name in FRIENDLY:
        assert noised(name).describe()["dp_friendly"], name
        assert not noised(name).describe()["exact"], name


@pytest.mark.parametrize("number", [1, 2])
def test_what_is_frozen_gets_no_noise(number: int) -> None:
    chosen = noised("rolora")
    state = replace(chosen.start(random_adapter(SPEC, 1)), round=number - 1)
    after = chosen.begin(state, noise=FreeNoise()).finish()[0]
    for module in SPEC.modules:
        key_a, key_b = module.keys
        sent, kept = (key_b, key_a) if number == 1 else (key_a, key_b)
        assert np.array_equal(after.adapter.tensors[kept], state.adapter.tensors[kept])
        assert not np.any(after.adapter.tensors[sent] == state.adapter.tensors[sent])
    head = SPEC.others[0].key
    assert not np.any(after.adapter.tensors[head] == state.adapter.tensors[head])


def test_the_divisor_is_the_expected_number_whoever_came() -> None:
    """Without noise, two clients of an expected eight make a quarter of their mean."""
    chosen = noised("ffa-lora", ClientDp(clip=1e6, cohort=8.0))
    state = chosen.start(random_adapter(SPEC, 1))
    reduction = chosen.begin(state, noise=FreeNoise(factor=0.0))
    both = [honest(chosen, state.adapter, seed) for seed in (1, 2)]
    for number, trained in enumerate(both):
        reduction.add(update(f"c{number}", state.adapter, trained, weight=1.0 + 99 * number))
    after, report = reduction.finish()
    expected = sum(t.pack().astype(float) - state.adapter.pack() for t in both) / 8
    assert np.allclose(after.adapter.pack() - state.adapter.pack(), expected, atol=1e-6)
    assert report.modules == {}
    assert report.used == 2


def test_a_round_that_nobody_came_to_releases_its_noise_all_the_same() -> None:
    noise = FreeNoise()
    chosen = noised("ffa-lora")
    state = chosen.start(initial_adapter(SPEC, 1))
    reduction = chosen.begin(state, noise=noise)
    assert reduction.in_any_case
    after, report = reduction.finish()
    assert after.round == 1
    assert report.used == 0
    assert after.adapter.digest != state.adapter.digest
    assert [number for number, _ in noise.paid] == [1]


def test_a_client_has_one_part_in_a_round_and_only_in_its_own() -> None:
    chosen = noised("ffa-lora")
    state = chosen.start(random_adapter(SPEC, 1))
    reduction = chosen.begin(state, noise=FreeNoise(), starts={"other": random_adapter(SPEC, 2)})
    reduction.add(update("a", state.adapter, honest(chosen, state.adapter, 1)))
    with pytest.raises(UpdateError, match="counts heads"):
        reduction.add(update("a", state.adapter, honest(chosen, state.adapter, 2)))
    late = Update("b", 7, state.adapter.digest, honest(chosen, state.adapter, 2), 1.0)
    with pytest.raises(UpdateError, match="stale"):
        reduction.add(late)


def test_nothing_is_released_before_it_is_paid_for_and_the_same_inputs_are_the_same() -> None:
    class Broke(FreeNoise):
        def pay(self, number: int, inputs: str) -> object:  # type: ignore[override]
            raise PermissionError

    chosen = noised("ffa-lora")
    state = chosen.start(random_adapter(SPEC, 1))
    reduction = chosen.begin(state, noise=Broke())
    with pytest.raises(PermissionError):
        reduction.finish()
    paid = []
    for seeds in ((1, 2), (2, 1), (1, 3)):
        noise = FreeNoise()
        reduction = chosen.begin(state, noise=noise)
        for seed in seeds:
            reduction.add(update(f"c{seed}", state.adapter, honest(chosen, state.adapter, seed)))
        reduction.finish()
        paid += noise.paid
    assert paid[0] == paid[1] != paid[2]  # the order in which updates came plays no part


def test_the_clip_follows_the_quantile_as_published() -> None:
    piece = ClientDp(clip=0.1, quantile=0.5, cohort=40.0, noise_multiplier=1.0, count_noise=2.0)
    # Andrew et al. 2021, theorem 1, and the round as one Gaussian of both parts.
    assert piece.multiplier == pytest.approx((1 - 1 / 16) ** -0.5)
    together = (1 / piece.multiplier) ** 2 + (0.5 / piece.count_std) ** 2
    assert together**-0.5 == pytest.approx(1.0)
    assert piece.next_clip(0.1, 1.0) == pytest.approx(0.1 * math.exp(-0.2 * 0.5))
    chosen = noised("ffa-lora", piece)
    state = chosen.start(random_adapter(SPEC, 1))
    norms = []
    for _ in range(60):
        reduction = chosen.begin(state, noise=FreeNoise(factor=0.0))
        for client in range(40):
            size = 0.02 * (1 + client / 40)
            reduction.add(
                Update(
                    f"c{client}",
                    state.round + 1,
                    state.adapter.digest,
                    honest(chosen, state.adapter, client, size),
                    1.0,
                )
            )
        state = reduction.finish()[0]
        norms.append(float(state.buffers["clip"][0]))
    assert GlobalState.from_bytes(state.to_bytes()).buffers["clip"][0] == norms[-1]
    start = chosen.start(random_adapter(SPEC, 1))
    lengths = [
        np.linalg.norm(
            open_vector(chosen, start, honest(chosen, start.adapter, c, 0.02 * (1 + c / 40)))
        )
        for c in range(40)
    ]
    assert norms[-1] == pytest.approx(float(np.median(lengths)), rel=0.05)


def open_vector(chosen: Recipe, state: GlobalState, trained: Adapter) -> np.ndarray:
    from aggregation.clipped_sum import transmitted

    return transmitted(trained, state.adapter, open_sum(chosen, state).keys)


def test_the_count_has_noise_of_its_own_and_one_client_moves_it_by_a_half() -> None:
    release = Release(1.0, 1.0, 10.0, count_std=3.0)
    shares = []
    for seed in range(400):
        total = VectorSum(1, release, 1, FreeNoise(seed=seed))
        total.add(np.array([0.5]))
        shares.append(total.mean()[1])
    assert np.mean(shares) == pytest.approx(0.5 + 0.5 / 10, abs=4 * 0.3 / 20)
    assert np.std(shares) == pytest.approx(0.3, rel=0.15)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("svd-warm-start", {}, "choose reduce=factor-mean"),
        ("krum", {}, "choose private=none, or reduce=factor-mean"),
        ("fedask", {}, "forms another mean; choose reduce=factor-mean"),
        ("fed-plora", {}, "choose reduce=factor-mean"),
        ("fedex-lora", {}, "choose refactor=keep"),
        ("ffa-lora", {"weigh": choices.read("weigh", "examples")}, "choose weigh=uniform"),
        ("ffa-lora", {"weigh": Staleness(equal=True)}, "choose weigh=uniform"),
        ("rolora", {"private": ClientDpFtrl()}, "choose train=only-b"),
        ("fedsvd", {"private": ClientDpFtrl()}, "choose refactor=keep"),
    ],
)
def test_what_does_not_go_together_is_refused(
    name: str, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        replace(recipe(name), **{"private": ClientDp(), "weigh": Uniform()} | changes)


@pytest.mark.parametrize(
    "text",
    [
        "client-dp(clip=0)",
        "client-dp(noise_multiplier=0)",
        "client-dp(noise_multiplier=nan)",
        "client-dp(cohort=0)",
        "client-dp(quantile=1)",
        "client-dp(count_noise=0.5)",
        "client-dp-ftrl(separation=0)",
        "client-dp-ftrl(participations=0)",
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="must "):
        choices.read("private", text)


def test_pieces_print_themselves_and_are_read_back() -> None:
    for piece in (
        ClientDp(clip=0.5, quantile=0.25, cohort=20.0, count_noise=3.0),
        ClientDpFtrl(separation=4, participations=3, restart=16),
    ):
        assert choices.read("private", str(piece)) == piece


def test_noise_has_to_come_from_somewhere_and_to_be_asked_for() -> None:
    chosen = noised("ffa-lora")
    state = chosen.start(initial_adapter(SPEC, 1))
    with pytest.raises(RecipeError, match=r"\[client_privacy\]"):
        chosen.begin(state)
    with pytest.raises(RecipeError, match="spend for nothing"):
        RECIPES["ffa-lora"].begin(state, noise=FreeNoise())
