"""The double sketch: exact from two linear sums if it is wide enough, and honest if it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from aggregation.adapter import Adapter
from aggregation.combining import Reduction
from aggregation.errors import AggregationError, RecipeError
from aggregation.recipe import Recipe
from aggregation.recipes import recipe
from aggregation.refactoring import Svd
from aggregation.sketches import Sketches, first_pass, second_pass
from aggregation.sketching import Sketch
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState, initial_state
from aggregation.train import OnlyB
from aggregation.update import Update, UpdateError, UpdateReason
from tests.aggregation.adapters import (
    FEW,
    SEEDS,
    WEIGHTS,
    honest,
    moved,
    plain_spec,
    products,
    random_adapter,
    relative,
    specs,
    update,
)

WIDE = Recipe("wide", reduce=Sketch(width=64))
NARROW = plain_spec((4, 4), width=48)


class Client:
    """One that trains, keeps what it trained, and sends sketches."""

    def __init__(self, chosen: Recipe, start: Adapter, seed: int, name: str, weight: float) -> None:
        self.name, self.weight, self.start = name, weight, start
        self.chosen, self.trained = chosen, honest(chosen, start, seed)

    def first(self, state: GlobalState, **changes: object) -> Update:
        asked = self.chosen.assignment(1, state.adapter.spec)
        inside = {k for m in self.start.spec.modules for k in m.keys}
        sent = {k: v for k, v in self.trained if k not in inside}
        made = Update(
            self.name,
            1,
            self.start.digest,
            Adapter(self.start.spec, {**self.start.tensors, **sent}),
            self.weight,
            sketches=first_pass(self.trained, self.start, asked.sketch, asked.seed, 1),
        )
        return replace(made, **changes)  # type: ignore[arg-type]

    def second(self, basis: Sketches) -> Sketches:
        return second_pass(self.trained, self.start, basis)

    def change(self, module: str) -> np.ndarray:
        return products(self.trained)[module] - products(self.start)[module]


def two_passes(
    chosen: Recipe,
    state: GlobalState,
    clients: list[Client],
    silent: Callable[[str], bool] = lambda _: False,
) -> Reduction:
    reduction = chosen.begin(state)
    for client in clients:
        reduction.add(client.first(state))
    basis = reduction.question()
    assert reduction.waiting() == tuple(client.name for client in clients)
    for client in clients:
        if not silent(client.name):
            reduction.answer(client.name, client.second(basis))
    return reduction


def mean(clients: list[Client], module: str) -> np.ndarray:
    total = sum(c.weight for c in clients)
    return sum((c.weight / total * c.change(module) for c in clients), start=np.zeros(()))


def mixed(chosen: Recipe, state: GlobalState, weights: list[float], seed: int) -> list[Client]:
    """Clients of all ranks and alphas, each from its own start."""
    spec, rng = state.adapter.spec, np.random.default_rng(seed)
    clients = []
    for k, weight in enumerate(weights):
        ranks = {m.name: int(rng.integers(1, min(m.d_in, m.d_out) + 1)) for m in spec.modules}
        start = chosen.hand_out(state, spec.with_ranks(ranks))
        clients.append(Client(chosen, start, seed + k, f"c{k}", weight))
    return clients


@FEW
@given(specs(), WEIGHTS, SEEDS)
def test_a_wide_sketch_is_exact_with_mixed_ranks_and_scales(
    spec: AdapterSpec, weights: list[float], seed: int
) -> None:
    state = initial_state(random_adapter(spec, seed))
    clients = mixed(WIDE, state, weights, seed)
    exact = {m.name: products(state.adapter)[m.name] + mean(clients, m.name) for m in spec.modules}
    after, report = two_passes(WIDE, state, clients).finish()
    whole = WIDE.begin(state)
    for client in clients:
        whole.add(update(client.name, client.start, client.trained, client.weight))
    assert whole.question() == {}
    off_line, _ = whole.finish()
    for name, matrix in exact.items():
        assert relative(after.exact(name).dense(), matrix) < 1e-6
        assert relative(off_line.exact(name).dense(), matrix) < 1e-6
    for tensor in spec.others:
        for one in (after, off_line):
            head = sum(c.weight * c.trained.tensors[tensor.key].astype(float) for c in clients)
            assert relative(one.adapter.tensors[tensor.key], head / sum(weights)) < 1e-5
    assert report.used == len(weights)
    assert report.weight == pytest.approx(sum(weights))


def test_with_a_shared_a_the_rank_is_wide_enough_for_any_number_of_clients() -> None:
    chosen = Recipe("b", train=OnlyB(), reduce=Sketch(width=4), refactor=Svd(residual_rank=0))
    state = initial_state(random_adapter(NARROW, 0))
    clients = [Client(chosen, state.adapter, k, f"c{k}", 1.0 + k) for k in range(12)]
    after, report = two_passes(chosen, state, clients).finish()
    for m in NARROW.modules:
        exact = products(state.adapter)[m.name] + mean(clients, m.name)
        assert relative(products(after.adapter)[m.name], exact) < 2e-6
    assert report.error < 1e-5


def test_a_narrow_sketch_is_near_the_best_of_its_width_and_says_what_it_lost() -> None:
    state = initial_state(random_adapter(NARROW, 0))
    for width in (8, 16):
        chosen = Recipe("narrow", reduce=Sketch(width=width, probes=16))
        clients = [Client(chosen, state.adapter, k, f"c{k}", 1.0) for k in range(10)]
        lost = []
        after, report = two_passes(chosen, state, clients).finish()
        for m in NARROW.modules:
            exact = products(state.adapter)[m.name] + mean(clients, m.name)
            lost.append(np.linalg.norm(exact - after.exact(m.name).dense()))
            values = np.linalg.svd(mean(clients, m.name), compute_uv=False)
            bounds = [
                np.sqrt(1 + k / (width - k - 1)) * np.linalg.norm(values[k:])
                for k in range(width - 1)
            ]
            assert np.linalg.norm(values[width:]) < lost[-1] < 1.1 * min(bounds)
            # The residual takes what the rank cannot: what is missing at last is the sketch's.
            assert report.modules[m.name].dropped == pytest.approx(lost[-1], rel=0.5)
    off_line = Recipe("narrow", reduce=Sketch(width=8)).begin(state)
    for client in clients:
        off_line.add(update(client.name, state.adapter, client.trained))
    after, report = off_line.finish()
    for m in NARROW.modules:
        exact = products(state.adapter)[m.name] + mean(clients, m.name)
        missed = np.linalg.norm(exact - after.exact(m.name).dense())
        assert report.modules[m.name].dropped == pytest.approx(missed, rel=1e-5)


def test_the_default_width_holds_the_mean_to_first_order() -> None:
    """Twice the rank: with steps ten times smaller, what is lost is a hundred times smaller."""
    lost = []
    for size in (1e-2, 1e-3):
        state = initial_state(random_adapter(NARROW, 0))
        chosen = recipe("fedask", {"refactor": "svd", "reduce": "sketch(width=8)"})
        reduction = chosen.begin(state)
        steps = np.zeros((NARROW.modules[0].d_out, NARROW.modules[0].d_in))
        for k in range(6):
            trained = moved(state.adapter, k, size)
            reduction.add(update(f"c{k}", state.adapter, trained))
            name = NARROW.modules[0].name
            steps += (products(trained)[name] - products(state.adapter)[name]) / 6
        _, report = reduction.finish()
        lost.append(report.modules[name].dropped / np.linalg.norm(steps))
    assert lost[1] < 0.2 * lost[0] < 0.02


@pytest.mark.parametrize("train", ["both", "only-b"])
def test_without_a_client_that_drops_out_between_the_passes_it_is_the_mean_of_the_others(
    train: str,
) -> None:
    """With a shared A the others' mean lies outside of the basis: a projection would miss it."""
    width = {"both": 40, "only-b": 4}[train]
    chosen = Recipe("x", reduce=Sketch(width=width)).with_pieces({"train": train})
    state = initial_state(random_adapter(NARROW, 0))
    clients = [Client(chosen, state.adapter, k, f"c{k}", 1.0 + k) for k in range(5)]
    reduction = two_passes(chosen, state, clients, silent=lambda name: name in ("c1", "c4"))
    basis = reduction.question()
    after, report = reduction.finish()
    there = [c for c in clients if c.name not in ("c1", "c4")]
    for m in NARROW.modules:
        change = mean(there, m.name)
        got = after.exact(m.name).dense() - products(state.adapter)[m.name]
        assert relative(got, change) < 1e-5
        if train == "only-b":
            q = basis[m.name].astype(float)
            assert relative(q @ (q.T @ change), change) > 0.3
    assert (report.used, report.weight) == (3, pytest.approx(1 + 3 + 4))
    assert report.refused == {"c1": "late", "c4": "late"}
    head = sum(c.weight * c.trained.tensors[NARROW.others[0].key].astype(float) for c in there) / 8
    assert relative(after.adapter.tensors[NARROW.others[0].key], head) < 1e-5


def test_if_nobody_answers_nothing_changes() -> None:
    state = initial_state(random_adapter(NARROW, 0))
    clients = [Client(WIDE, state.adapter, k, f"c{k}", 1.0) for k in range(2)]
    after, report = two_passes(WIDE, state, clients, silent=lambda _: True).finish()
    assert after is state
    assert (report.used, report.weight) == (0, 0.0)


def test_clients_that_learn_nothing_leave_the_adapter_as_it_is() -> None:
    state = initial_state(random_adapter(NARROW, 0))
    clients = [Client(WIDE, state.adapter, k, f"c{k}", 1.0) for k in range(2)]
    for client in clients:
        client.trained = client.start
    after, report = two_passes(WIDE, state, clients).finish()
    assert after.adapter.digest == state.adapter.digest
    assert (after.round, report.used) == (1, 2)


def test_sketches_add_up_so_that_a_sum_is_all_that_the_server_needs() -> None:
    """The same result if the server sees one client whose sketches are the weighted sum of all."""
    state = initial_state(random_adapter(NARROW, 0))
    clients = [Client(WIDE, state.adapter, k, f"c{k}", 1.0 + k) for k in range(3)]
    plain, _ = two_passes(WIDE, state, clients).finish()
    key = NARROW.others[0].key

    def total(parts: list[Sketches]) -> Sketches:
        return {
            n: sum(c.weight / 6 * p[n].astype(float) for c, p in zip(clients, parts, strict=True))
            .astype(np.float32)
            for n in parts[0]
        }  # fmt: skip

    firsts = [c.first(state) for c in clients]
    head = sum(c.weight / 6 * u.adapter.tensors[key] for c, u in zip(clients, firsts, strict=True))
    summed = replace(
        firsts[0],
        adapter=Adapter(NARROW, {**firsts[0].adapter.tensors, key: head.astype(np.float32)}),
        sketches=total([u.sketches for u in firsts]),
    )
    reduction = WIDE.begin(state)
    reduction.add(summed)
    basis = reduction.question()
    reduction.answer("c0", total([c.second(basis) for c in clients]))
    after, _ = reduction.finish()
    for m in NARROW.modules:
        assert relative(after.exact(m.name).dense(), plain.exact(m.name).dense()) < 1e-5


def test_sketches_that_do_not_fit_are_refused_one_by_one() -> None:
    state = initial_state(random_adapter(NARROW, 0))
    good, bad = (Client(WIDE, state.adapter, k, f"c{k}", 1.0) for k in range(2))
    sketches = dict(bad.first(state).sketches)
    name = NARROW.modules[0].name
    wrong: list[tuple[dict[str, object], UpdateReason]] = [
        ({"sketches": {name: sketches[name]}}, UpdateReason.MALFORMED),
        ({"sketches": {**sketches, name: sketches[name][:, 1:]}}, UpdateReason.WRONG_SHAPE),
        (
            {"sketches": {**sketches, name: sketches[name].astype(float)}},
            UpdateReason.WRONG_SHAPE,
        ),
        ({"sketches": {**sketches, name: sketches[name] * np.nan}}, UpdateReason.NOT_FINITE),
        (
            {"sketches": {**sketches, name: sketches[name] * np.float32(1e9)}},
            UpdateReason.TOO_LARGE,
        ),
        ({"adapter": bad.trained}, UpdateReason.FROZEN_CHANGED),
        ({"round": 2}, UpdateReason.MALFORMED),
        ({"client": "c0"}, UpdateReason.DUPLICATE),
    ]
    reduction = WIDE.begin(state)
    reduction.add(good.first(state))
    for changes, reason in wrong:
        with pytest.raises(UpdateError) as error:
            reduction.add(bad.first(state, **changes))
        assert error.value.reason is reason
    with pytest.raises(UpdateError, match="takes adapters"):
        recipe("fedbuff").begin(state).add(bad.first(state))
    basis = reduction.question()
    answer = good.second(basis)
    for value, reason in (
        ({name: answer[name]}, UpdateReason.MALFORMED),
        ({**answer, name: answer[name] * np.nan}, UpdateReason.NOT_FINITE),
    ):
        with pytest.raises(UpdateError) as error:
            reduction.answer("c0", value)
        assert error.value.reason is reason
    with pytest.raises(AggregationError, match="nothing to answer"):
        reduction.answer("c1", answer)
    reduction.answer("c0", answer)
    with pytest.raises(AggregationError, match="nothing to answer"):
        reduction.answer("c0", answer)
    after, _ = reduction.finish()
    alone, _ = two_passes(WIDE, state, [good]).finish()
    assert after.adapter.digest == alone.adapter.digest
    with pytest.raises(AggregationError, match="expected"):
        second_pass(good.trained, good.start, {})
    with pytest.raises(AggregationError, match="give at least 1"):
        first_pass(good.trained, good.start, 0, 0, 1)


def test_the_assignment_says_how_wide_and_from_which_seed() -> None:
    spec = plain_spec((4, 2))
    for reduce, columns in ((Sketch(), 2 * 4 + 4 + 4), (Sketch(width=5, probes=0, seed=9), 5)):
        asked = Recipe("x", reduce=reduce).assignment(3, spec)
        assert (asked.sketch, asked.seed) == (columns, reduce.seed)
    with pytest.raises(RecipeError, match="probes=-1"):
        Sketch(probes=-1)


@pytest.mark.parametrize("train", ["alternate", "alternate-select", "random-ranks", "share-a"])
def test_a_part_of_the_factors_in_any_round_is_refused_when_the_recipe_is_built(
    train: str,
) -> None:
    with pytest.raises(RecipeError, match="choose train=both or train=only-b"):
        recipe("fedask", {"train": train})
