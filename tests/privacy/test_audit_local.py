"""Audits of DP-SGD as it is, and of versions with a piece left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from privacy.audit import Audit, judge
from privacy.audit_bound import AuditError
from privacy.audit_canaries import SCALE, Canaries
from privacy.audit_local import GradientCanaries
from privacy.calibration import epsilon, noise_multiplier
from privacy.events import SgdEvent
from privacy.local import PrivateSgd, poisson_batch
from privacy.randomness import Stream, derive, seeded_key

ROWS, WIDTH, CLASSES, CLIP, DELTA = 40, 60, 40, 0.5, 1e-6  # 2440 parameters
RATE, STEPS = 0.25, 20


class NoNoise(PrivateSgd):
    def _release(self) -> None:
        std, self._std = self._std, 0.0
        super()._release()
        self._std = std


class NoClip(PrivateSgd):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._clipper.max_grad_norm = 1e9


class Forgetful(PrivateSgd):
    """Adds noise in the first step only."""

    def _release(self) -> None:
        super()._release()
        self._std = 0.0


def event(claimed: float, *, rate: float = RATE, steps: int = STEPS) -> SgdEvent:
    sigma = noise_multiplier(claimed, DELTA, rate, steps)
    return SgdEvent(noise_multiplier=sigma, sample_rate=rate, steps=steps, max_grad_norm=CLIP)


def train(
    kind: type[PrivateSgd],
    of: SgdEvent,
    planted: GradientCanaries | None,
    *,
    rounds: int = 1,
    seed: int = 1,
    masks: dict[str, torch.Tensor] | None = None,
) -> nn.Linear:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, inputs = nn.Linear(WIDTH, CLASSES), torch.randn(ROWS, WIDTH)
    labels = torch.randint(0, CLASSES, (ROWS,))
    key = seeded_key(seed)
    for number in range(rounds):
        sampling = Stream(derive(key, "sampling", number))
        with kind(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            max_grad_norm=of.max_grad_norm,
            noise_multiplier=of.noise_multiplier,
            expected_batch=of.sample_rate * ROWS,
            noise=Stream(derive(key, "noise", number)),
            masks=masks,
            planted=planted,
        ) as private:
            for _ in range(of.steps):
                batch = poisson_batch(ROWS, of.sample_rate, sampling)
                losses = nn.functional.cross_entropy(
                    model(inputs[batch]), labels[batch], reduction="none"
                )
                private.step([losses] if len(batch) else [])
    return model


def audited(
    kind: type[PrivateSgd], of: SgdEvent, claimed: float, *, rounds: int = 1, seed: int = 1
) -> Audit:
    whole = replace(of, steps=of.steps * rounds)
    canaries = Canaries(2000, whole, derive(seeded_key(seed), "audit"))
    train(kind, of, GradientCanaries(canaries), rounds=rounds, seed=seed)
    assert canaries.steps == whole.steps
    return judge(canaries, claimed=claimed, delta=DELTA, mechanism="local")


@pytest.mark.parametrize("claimed", [1.0, 4.0])
def test_honest_training_is_not_refuted(claimed: float) -> None:
    of = event(claimed)
    for seed in (1, 2):
        found = audited(PrivateSgd, of, claimed, seed=seed)
        assert not found.broken, found.faults
        assert found.measured < claimed
        assert found.refutable
        assert found.noise_seen == pytest.approx(of.noise_multiplier, rel=0.03)
        assert found.reach_seen == pytest.approx(1.0, abs=0.1)


def test_the_audit_has_power_where_little_is_promised() -> None:
    of = event(30.0)
    found = audited(PrivateSgd, of, 30.0)
    assert 2.5 < found.measured < 30.0
    assert not found.broken


def test_noise_that_is_left_out_is_caught() -> None:
    found = audited(NoNoise, event(4.0), 4.0)
    assert found.measured > 4.0
    assert found.noise_seen < 0.01
    assert len(found.faults) == 2


def test_noise_in_the_first_step_only_is_seen() -> None:
    found = audited(Forgetful, event(4.0), 4.0)
    assert found.measured > 2 * audited(PrivateSgd, event(4.0), 4.0).measured
    assert found.noise_seen < 0.5 * found.noise_claimed
    assert found.broken


def test_a_clip_that_is_left_out_is_caught() -> None:
    found = audited(NoClip, event(4.0), 4.0)
    assert found.measured > 4.0
    assert found.reach_seen == pytest.approx(SCALE, rel=0.1)


def test_an_accountant_that_counts_one_round_is_caught() -> None:
    rounds, of = 25, event(15.0, rate=0.5, steps=100)
    one = replace(of, steps=of.steps // rounds)
    counted = epsilon([one], DELTA)
    found = audited(PrivateSgd, one, counted, rounds=rounds)
    assert found.measured > counted
    assert len(found.faults) == 1  # the training itself does what it says
    assert found.measured < epsilon([of], DELTA)


def test_canaries_enter_clipped_beside_the_real_rows() -> None:
    """Without noise a step is the clipped real sum and one clip along each canary drawn."""
    of = SgdEvent(noise_multiplier=0.0, sample_rate=1.0, steps=1, max_grad_norm=CLIP)
    canaries = Canaries(120, of, seeded_key(3))
    planted = GradientCanaries(canaries)
    plain, with_them = train(PrivateSgd, of, None), train(PrivateSgd, of, planted)
    moved = torch.cat(
        [
            (a - b).detach().ravel()
            for a, b in zip(plain.parameters(), with_them.parameters(), strict=True)
        ]
    )
    drawn = canaries.vectors(np.flatnonzero(canaries.planted)).sum(axis=0) / SCALE
    expected = torch.from_numpy(drawn) * 0.1 / ROWS  # learning rate, expected batch
    assert torch.allclose(moved, expected, atol=1e-7)
    # What was real is taken off, so every canary that is in reads one clip, the others nothing.
    assert canaries.reach_seen()[0] == pytest.approx(1.0, abs=1e-4)
    assert canaries.noise_seen()[0] == pytest.approx(0.0, abs=1e-4)


def test_the_real_rows_train_as_ever_beside_canaries_that_are_left_out() -> None:
    of = event(4.0)
    canaries = Canaries(100, of, seeded_key(3))
    canaries.planted[:] = False
    plain, beside = train(PrivateSgd, of, None), train(PrivateSgd, of, GradientCanaries(canaries))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), beside.parameters(), strict=True)
    )


def test_canaries_stay_off_entries_that_are_masked() -> None:
    mask = torch.zeros(CLASSES, 1)
    mask[:10] = 1.0
    of = event(4.0)
    canaries = Canaries(300, of, seeded_key(3))
    train(PrivateSgd, of, GradientCanaries(canaries), masks={"weight": mask})
    vectors = canaries.vectors(np.arange(300))
    assert not vectors[:, 10 * WIDTH : CLASSES * WIDTH].any()
    assert (np.linalg.norm(vectors, axis=1) > 0).all()
    assert canaries.noise_seen()[0] == pytest.approx(of.noise_multiplier, rel=0.05)
    assert canaries.reach_seen()[0] == pytest.approx(1.0, abs=0.2)


def test_more_canaries_than_parameters_are_refused() -> None:
    of = event(4.0)
    with pytest.raises(AuditError, match="plant at most 2440"):
        train(PrivateSgd, of, GradientCanaries(Canaries(3000, of, seeded_key(3))))


def test_rows_whose_gradient_has_no_length_take_nothing_from_the_canaries() -> None:
    of = event(4.0)
    seen = []
    for fill in (0.0, float("nan")):
        planted = GradientCanaries(Canaries(200, of, seeded_key(3)))
        model = nn.Linear(WIDTH, CLASSES)
        with PrivateSgd(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            max_grad_norm=CLIP,
            noise_multiplier=1.0,
            expected_batch=4.0,
            noise=Stream(seeded_key(1)),
            planted=planted,
        ) as private:
            private.step([model(torch.full((4, WIDTH), fill)).sum(dim=1) * fill])
        seen.append(planted.canaries.scores)
    assert seen[0] == pytest.approx(seen[1], abs=1e-3)
