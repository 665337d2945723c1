"""FedSVD's lossless SVD, LoRA-FAIR's ridge, what may be folded, and what protection rules out."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import choices, soundness
from aggregation.adapter import Adapter
from aggregation.combining import Reduction
from aggregation.distributing import Same
from aggregation.errors import RecipeError
from aggregation.folding import Fresh, MeanResidual, SvdFold
from aggregation.init import initial_adapter
from aggregation.piece import Piece
from aggregation.pieces import NoPrivacy
from aggregation.recipe import Recipe
from aggregation.recipes import recipe
from aggregation.reducing import FactorMean, Reduced
from aggregation.refactoring import Keep, Svd
from aggregation.ridge import Ridge
from aggregation.spec import AdapterSpec, ModuleSpec
from aggregation.state import initial_state
from aggregation.train import OnlyB
from aggregation.update import Update, UpdateError, UpdateReason
from aggregation.weighing import Frobenius, Uniform
from tests.aggregation.adapters import (
    BASE,
    FEW,
    SEEDS,
    WEIGHTS,
    honest,
    moved,
    plain_spec,
    products,
    random_adapter,
    relative,
    run,
    specs,
    update,
)

BALANCE = st.sampled_from(["B", "A", "sqrt"])


@FEW
@given(specs(), WEIGHTS, SEEDS)
def test_fedsvd_is_exact_over_rounds_with_an_orthonormal_a(
    spec: AdapterSpec, weights: list[float], seed: int
) -> None:
    chosen = recipe("fedsvd")
    state = initial_state(initial_adapter(spec, seed))  # B = 0: nothing to take the SVD of yet
    expected = products(state.adapter)
    for number in range(1, 4):
        start = state.adapter
        trained = [honest(chosen, start, seed + 10 * number + k) for k in range(len(weights))]
        updates = [
            Update(f"c{k}", number, start.digest, one, weights[k]) for k, one in enumerate(trained)
        ]
        state, report = run(chosen, state, updates)
        for m in spec.modules:
            for k, one in enumerate(trained):
                share = weights[k] / sum(weights)
                change = products(one)[m.name] - products(start)[m.name]
                expected[m.name] = expected[m.name] + share * change
            assert relative(products(state.adapter)[m.name], expected[m.name]) < 1e-5
            rows = state.adapter.factors(m.name)[1].astype(float)
            assert relative(rows @ rows.T, np.eye(m.rank)) < 1e-6
            # a row space once handed out is the row space for ever
            old = start.factors(m.name)[1].astype(float)
            assert relative(old @ rows.T @ rows, old) < 1e-5
            assert state.residual[m.name].norm() < 1e-6 * (1 + np.linalg.norm(expected[m.name]))
        assert report.error < 1e-6


def test_a_ridge_over_rows_that_depend_on_each_other_stays_finite_and_repairs() -> None:
    spec = AdapterSpec(BASE, (ModuleSpec("query", 12, 10, 4, 16.0),))
    tensors = dict(random_adapter(spec, 0).tensors)
    key_a = spec.modules[0].keys[0]
    tensors[key_a] = tensors[key_a][[0, 0, 1, 1]]  # as a start of another make may have them
    start = Adapter(spec, tensors)
    updates = []
    for k in range(3):
        trained = dict(moved(start, k, 0.5).tensors)
        trained[key_a] = trained[key_a][[0, 0, 1, 1]]
        updates.append(update(f"c{k}", start, Adapter(spec, trained)))
    errors = []
    for refactor in (Keep(), Ridge(strength=1e-250)):
        chosen = Recipe("r", reduce=FactorMean(), refactor=refactor, distribute=Same())
        errors.append(run(chosen, initial_state(start), updates)[1].error)
    assert errors[1] < errors[0]


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(4, 10, 4), (10, 4, 4), (6, 10, 4)])
@pytest.mark.parametrize("learnt", [0, 1])
def test_directions_in_which_nothing_was_learnt_keep_their_rows_at_full_rank_too(
    d_out: int, d_in: int, rank: int, learnt: int
) -> None:
    spec = AdapterSpec(BASE, (ModuleSpec("query", d_in, d_out, rank, 16.0),))
    start = initial_adapter(spec, 0)
    move = np.zeros((d_out, rank))
    move[:, :learnt] = np.random.default_rng(0).standard_normal((d_out, learnt))
    moves = {"query": (move, np.zeros((rank, d_in)))}
    split = Svd(residual_rank=0).apply(initial_state(start), Reduced({}, moves, {}))
    old, (left, rows) = start.factors("query")[1].astype(float), split.factors["query"]
    assert relative(rows @ rows.T, np.eye(rank)) < 1e-12
    assert relative(old @ rows.T @ rows, old) < 1e-12
    assert np.linalg.norm(left @ rows - move @ old) < 1e-12


@FEW
@given(specs(), SEEDS, BALANCE)
def test_the_lossless_svd_is_lossless_to_the_last_digits(
    spec: AdapterSpec, seed: int, balance: str
) -> None:
    state = initial_state(random_adapter(spec, seed))
    step = random_adapter(spec, seed + 1)
    moves = {
        m.name: (step.factors(m.name)[0].astype(float), np.zeros((m.rank, m.d_in)))
        for m in spec.modules
    }
    split = Svd(residual_rank=0, balance=balance).apply(state, Reduced({}, moves, {}))
    assert not split.modules  # nothing was measured
    for m in spec.modules:
        old = [x.astype(float) for x in state.adapter.factors(m.name)]
        left, right = split.factors[m.name]
        trained = old[0] + moves[m.name][0]
        assert relative(left @ right, trained @ old[1]) < 3e-15
        turn = split.transport[m.name]
        assert relative(trained @ turn, left) < 1e-12
        assert relative(turn @ right, old[1]) < 1e-12  # A_new = G^-1 A_old
        grams = {"left": left.T @ left, "right": right @ right.T}
        if balance == "B":
            assert relative(grams["right"], np.eye(m.rank)) < 1e-13
        elif balance == "A":
            assert relative(grams["left"], np.eye(m.rank)) < 1e-13
        else:
            assert relative(grams["left"], grams["right"]) < 1e-10
        for gram in grams.values():  # in SVD order, and orthogonal in any balance
            assert relative(gram, np.diag(np.diag(gram))) < 1e-12
            assert np.all(np.diff(np.diag(gram)) <= 1e-12)


@pytest.mark.parametrize("balance", ["B", "A", "sqrt"])
def test_balances_are_the_same_product_in_product_space_too(balance: str) -> None:
    state = initial_state(random_adapter(plain_spec(), 0))
    updates = [update(f"c{k}", state.adapter, moved(state.adapter, k)) for k in range(3)]
    plain, _ = run(Recipe("plain"), state, updates)
    other, _ = run(Recipe("other", refactor=Svd(balance=balance)), state, updates)
    for m in state.adapter.spec.modules:
        assert relative(products(other.adapter)[m.name], products(plain.adapter)[m.name]) < 1e-6
        assert relative(other.exact(m.name).dense(), plain.exact(m.name).dense()) < 1e-6
    assert (other.adapter.digest == plain.adapter.digest) == (balance == "B")


@pytest.mark.parametrize("balance", ["B", "A", "sqrt"])
def test_directions_without_content_keep_a_living_a(balance: str) -> None:
    spec = plain_spec((4, 4))
    state = initial_state(initial_adapter(spec, 0))
    tensors = dict(state.adapter.tensors)
    left = np.zeros((24, 4), np.float32)
    left[:, 1] = 2.0  # one direction learnt in the first module, none in the second
    tensors[spec.modules[0].keys[1]] = left
    chosen = Recipe(
        "x",
        train=OnlyB(),
        reduce=FactorMean(),
        refactor=Svd(residual_rank=0, balance=balance),
        distribute=Same(),
    )
    one = Update("c", 1, state.adapter.digest, Adapter(spec, tensors), 1.0)
    after, report = run(chosen, state, [one])
    for m in spec.modules:
        new = after.adapter.factors(m.name)[1].astype(float)
        assert np.all(np.linalg.norm(new, axis=1) > 0.1)
        # the old row space is kept, so that momentum in it still has somewhere to go
        old = state.adapter.factors(m.name)[1].astype(float)
        assert relative(old @ np.linalg.pinv(new) @ new, old) < 1e-5
        assert relative(products(after.adapter)[m.name], products(one.adapter)[m.name]) < 1e-5
    assert report.error < 1e-6


def test_the_lossless_svd_makes_nothing_dense() -> None:
    spec = AdapterSpec(BASE, (ModuleSpec("big", 4096, 4096, 8, 16.0),))
    state = initial_state(random_adapter(spec, 0))
    move = {"big": (np.ones((4096, 8)), np.zeros((8, 4096)))}
    tracemalloc.start()
    Svd(residual_rank=0).apply(state, Reduced({}, move, {}))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4096 * 4096 * 8 / 10


def test_a_start_from_before_the_turn_is_refused() -> None:
    chosen = recipe("fedsvd")
    first = initial_state(random_adapter(plain_spec(), 0))
    trained = honest(chosen, first.adapter, 1)
    second, _ = run(chosen, first, [update("early", first.adapter, trained)])
    reduction = chosen.begin(second, starts={first.adapter.digest: first.adapter})
    with pytest.raises(UpdateError) as raised:
        reduction.add(update("late", first.adapter, honest(chosen, first.adapter, 2)))
    assert raised.value.reason in (UpdateReason.STALE, UpdateReason.UNKNOWN_START)
    assert reduction.finish()[0] is second


@FEW
@given(specs(), WEIGHTS, SEEDS, st.floats(1e-3, 10.0))
def test_ridge_is_the_least_squares_correction_of_b(
    spec: AdapterSpec, weights: list[float], seed: int, strength: float
) -> None:
    state = initial_state(random_adapter(spec, seed))
    updates = [
        update(f"c{k}", state.adapter, moved(state.adapter, seed + k, 0.5), weight)
        for k, weight in enumerate(weights)
    ]
    chosen = recipe("lora-fair", {"refactor": f"ridge(strength={strength!r})"})
    after, report = run(chosen, state, updates)
    plain, before = run(recipe("fedit"), state, updates)
    for m in spec.modules:
        scale, name = spec.scale(m.name), m.name
        left, right = (x.astype(float) for x in plain.adapter.factors(name))
        share = np.array(weights) / sum(weights)
        exact = sum(p * products(u.adapter)[name] for p, u in zip(share, updates, strict=True))
        # min ||E - s dB A||^2 + lambda ||dB||^2, row by row, as one stacked least squares problem
        tall = np.hstack([scale * right, np.sqrt(strength) * np.eye(m.rank)]).T
        goal = np.hstack([exact - scale * left @ right, np.zeros((m.d_out, m.rank))]).T
        step = np.linalg.lstsq(tall, goal, rcond=None)[0].T
        assert np.linalg.norm(after.adapter.factors(name)[0] - (left + step)) < 1e-5 * (
            np.linalg.norm(left) + np.linalg.norm(step)
        )
        assert np.array_equal(after.adapter.factors(name)[1], plain.adapter.factors(name)[1])
        size = np.linalg.norm(exact)
        missed = np.linalg.norm(exact - products(after.adapter)[name])
        assert report.modules[name].distance == pytest.approx(missed, abs=1e-5 * size)
        assert report.modules[name].distance <= before.modules[name].distance + 1e-12 * size
    for tensor in spec.others:
        assert np.array_equal(after.adapter.tensors[tensor.key], plain.adapter.tensors[tensor.key])


def test_ridge_repairs_what_lies_in_the_rows_of_a_and_nothing_else() -> None:
    """For a square, full-rank A that is everything; with one client there is nothing to repair."""
    spec = AdapterSpec(BASE, (ModuleSpec("layer.0.query", 4, 6, 4, 4.0),))
    state = initial_state(random_adapter(spec, 0))
    updates = [update(f"c{k}", state.adapter, moved(state.adapter, k, 0.5)) for k in range(3)]
    weak = recipe("lora-fair", {"refactor": "ridge(strength=1e-9)"})
    assert run(recipe("fedit"), state, updates)[1].error > 0.01
    assert run(weak, state, updates)[1].error < 1e-6
    one = updates[:1]
    assert (
        run(weak, state, one)[0].adapter.digest
        == run(recipe("fedit"), state, one)[0].adapter.digest
    )
    unmeasured = recipe("lora-fair").begin(state, measure=False)
    for each in updates:
        unmeasured.add(each)
    assert (
        unmeasured.finish()[0].adapter.digest
        == run(recipe("lora-fair"), state, updates)[0].adapter.digest
    )
    for strength in (0.0, -1.0, float("inf")):
        with pytest.raises(RecipeError, match="strength="):
            Ridge(strength)
    with pytest.raises(RecipeError, match="choose reduce=factor-mean"):
        Recipe("x", refactor=Ridge())
    with pytest.raises(RecipeError, match="balance='C' is not one of B, A, sqrt"):
        Svd(balance="C")


def test_folding_is_said_and_refused_on_a_quantised_base() -> None:
    state = initial_state(random_adapter(plain_spec(), 0))
    updates = [update(f"c{k}", state.adapter, moved(state.adapter, k)) for k in range(3)]
    for refactor in (Fresh(), SvdFold(), MeanResidual()):
        pieces: dict[str, Any] = {"refactor": refactor}
        if isinstance(refactor, MeanResidual):
            pieces |= {"reduce": FactorMean(), "distribute": Same()}
        beside = Recipe("beside", **pieces)
        beside.check_base(quantised=True)  # kept unmerged: any base will do
        folded = beside.with_pieces({"refactor": f"{refactor.kind}(fold=true)"})
        assert str(folded).count("fold=true") == 1
        folded.check_base(quantised=False)
        with pytest.raises(RecipeError, match="choose fold=false"):
            folded.check_base(quantised=True)
        assert (
            run(folded, state, updates)[0].to_bytes() == run(beside, state, updates)[0].to_bytes()
        )


@dataclass(frozen=True)
class Hidden(Piece):
    """A stand-in for pieces that let the server see sums only, or noise them."""

    kind = "hidden"
    secure: bool = False
    central: bool = False
    warning = ""


def said(secure: bool = False, central: bool = False, **pieces: object) -> str:
    """What the rules say about a recipe with such a piece."""
    names = [*choices.CHOICES, "name"]
    base = recipe(str(pieces.pop("based_on", "ffa-lora")))
    parts = {name: getattr(base, name) for name in names} | pieces
    parts["private"] = Hidden(secure, central)
    return soundness.objection(SimpleNamespace(**parts))  # type: ignore[arg-type]


def test_a_secure_sum_takes_sums_only() -> None:
    linear = choices.read("codec", "ring")
    for sound in ("ffa-lora", "rolora", "fedsvd", "fed-sb", "fedrot-lora", "fedavgm", "fed-plora"):
        assert said(secure=True, based_on=sound, codec=linear) == ""
    assert said(secure=True, based_on="fedask") == ""
    for name, remedy in {
        "svd-warm-start": "choose reduce=factor-mean, or reduce=sketch",
        "flora": "choose reduce=factor-mean",
        "raflora": "choose reduce=factor-mean",
        "krum": "choose private=none, or reduce=factor-mean",
        "median": "choose private=none, or reduce=factor-mean",
        "fedex-lora": "choose refactor=keep",
        "lora-fair": "choose refactor=keep",
    }.items():
        assert remedy in said(secure=True, based_on=name, codec=linear), name
    assert "choose codec=" in said(secure=True, codec=choices.read("codec", "top-k"))
    assert "choose weigh=examples" in said(secure=True, codec=linear, weigh=Frobenius())


def test_noise_on_the_server_needs_a_sum_of_equal_parts() -> None:
    for sound in ("ffa-lora", "fedsvd", "fed-sb", "fedavgm", "fedadam", "rolora"):
        assert said(central=True, based_on=sound, weigh=Uniform()) == ""
    assert "choose weigh=uniform" in said(central=True)
    for name in ("svd-warm-start", "raflora", "krum", "fedmomentum"):
        reason = said(central=True, based_on=name, weigh=Uniform())
        assert "choose " in reason, name
        assert "reduce=factor-mean" in reason, name
    for name in ("lora-fair", "fedex-lora"):
        assert "choose refactor=keep" in said(central=True, based_on=name, weigh=Uniform())


@pytest.mark.parametrize("kind", ["secure", "central"])
def test_nothing_is_measured_that_protection_is_to_hide(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report's exact products would be a sum in the clear, and without noise."""
    monkeypatch.setitem(
        choices.CHOICES,  # type: ignore[arg-type]
        "private",
        (NoPrivacy, Hidden),
    )
    chosen = Recipe(
        "x",
        train=OnlyB(),
        codec=choices.read("codec", "ring"),
        weigh=Uniform(),
        private=Hidden(**{kind: True}),
        reduce=FactorMean(),
        refactor=Keep(),
        distribute=Same(),
    )
    state = initial_state(random_adapter(plain_spec(), 0))
    reduction = Reduction(chosen, state, None, measure=True)
    reduction.add(update("c", state.adapter, honest(chosen, state.adapter, 1)))
    assert not reduction.finish()[1].modules
