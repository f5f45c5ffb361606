"""The critical batch of synthetic branches whose critical batch is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from copus_ext.core.efficiency.critical_batch import CriticalBatchFit, critical_batch_of_two, fit_critical_batch
from copus_ext.core.efficiency.loss_curves import BranchCurve, cost_after_settling, cost_from_branch

BATCHES = (8, 16, 32, 64)
SETTLE = 128.0


def branches(
    critical: float,
    random: np.random.Generator,
    *,
    path: float = 0.0,
    validation: float = 0.0,
    lost: float = 0.0,
    batches: tuple[int, ...] = BATCHES,
) -> list[BranchCurve]:
    """Branches whose loss is f(samples / (1 + B / Bc)), with f(s) = 2 - 0.4 ln(1 + s / 300) nats.

    Args:
        critical: Bc.
        random: draws what follows.
        path: standard deviation of ln samples, one draw for each branch.
        validation: standard deviation of a block's loss at a point; 32 blocks, each with a level of its own.
        lost: a branch of batch B first loses ``lost`` sqrt(B) samples.
        batches: of the branches.
    """
    samples = np.linspace(0, 1024, 17)
    level = random.normal(0, 0.3, 32)
    curves = []
    for batch in batches:
        worth = np.exp(random.normal(0, path)) / (1 + batch / critical)
        losses = 2 - 0.4 * np.log1p(np.maximum(0, samples - lost * math.sqrt(batch)) * worth / 300)
        noise = random.normal(0, validation, (samples.size, 32)) if validation else 0.0
        curves.append(BranchCurve(batch, samples, losses[:, None] + level + noise))
    return curves


def test_two_batches_in_closed_form() -> None:
    """Bc = 40: E(8) is 1.2 and E(64) is 2.6, in units of what a vanishing batch needs."""
    assert critical_batch_of_two((8, 64), 2.6 / 1.2) == pytest.approx(40)
    assert critical_batch_of_two((8, 64), 1.0) == math.inf
    assert critical_batch_of_two((8, 64), 0.9) == math.inf
    assert critical_batch_of_two((8, 64), 8.0) == 0.0


@pytest.mark.parametrize("critical", [10.0, 40.0, 200.0])
@pytest.mark.parametrize("batches", [(8, 64), (8, 16, 64), BATCHES], ids=str)
def test_exact_curves_give_their_critical_batch_back(critical: float, batches: tuple[int, ...]) -> None:
    """To the 2 % that lines between points of a bent curve cost."""
    curves = branches(critical, np.random.default_rng(1), batches=batches)
    for costs in (cost_from_branch, cost_after_settling):
        fit = fit_critical_batch(curves, SETTLE, costs)
        assert fit.critical.value == pytest.approx(critical, rel=0.02)
        assert fit.batches == batches
        assert fit.cost[-1] == pytest.approx((1 + batches[-1] / critical) / (1 + 8 / critical), rel=0.01)


def test_batches_and_samples_have_no_unit() -> None:
    curves = branches(40.0, np.random.default_rng(2), path=0.05, validation=0.02)
    larger = [replace(c, batch=16 * c.batch, samples=5 * c.samples) for c in curves]
    fit, scaled = (fit_critical_batch(c, s, cost_after_settling) for c, s in ((curves, SETTLE), (larger, 5 * SETTLE)))
    assert scaled.critical == pytest.approx([16 * end for end in fit.critical], rel=1e-6)
    assert scaled.cost == pytest.approx(fit.cost)


def test_the_order_of_branches_does_not_matter_and_the_same_numbers_give_the_same_interval() -> None:
    curves = branches(40.0, np.random.default_rng(3), path=0.05, validation=0.02)
    assert fit_critical_batch(curves, SETTLE) == fit_critical_batch(curves[::-1], SETTLE)


def test_batches_that_cost_nothing_leave_the_interval_open() -> None:
    fit = fit_critical_batch(branches(math.inf, np.random.default_rng(4), path=0.05), SETTLE)
    assert fit.outcome == "at least"
    assert fit.critical.high == math.inf
    assert 0 < fit.critical.low < 1000
    assert any(cost < 1 for cost in fit.cost), "q <= 1 is among them"


def test_larger_batches_that_need_fewer_samples_contradict_the_law() -> None:
    """E(B) = 1 - B / 200, beyond any error: no Bc is made of it."""
    fit = fit_critical_batch(branches(-200.0, np.random.default_rng(5), validation=0.001), SETTLE)
    assert fit.outcome == "contradicted"
    assert math.isinf(fit.critical.value)
    assert math.isnan(fit.critical.low)


def test_noise_larger_than_the_difference_says_nothing() -> None:
    fit = fit_critical_batch(branches(40.0, np.random.default_rng(6), path=1.5), SETTLE)
    assert fit.outcome in ("undetermined", "at least", "at most")


def test_a_branch_that_never_came_as_low_is_told_apart() -> None:
    curves = branches(40.0, np.random.default_rng(7), validation=0.01)
    curves[-1] = replace(curves[-1], losses=curves[-1].losses + np.linspace(0, 1, 17)[:, None])
    fit = fit_critical_batch(curves, SETTLE)
    assert fit.excluded == (64,)
    assert fit.batches == (8, 16, 32)
    alone = fit_critical_batch([curves[0], curves[-1]], SETTLE)
    assert (alone.outcome, alone.batches) == ("no overlap", ())
    assert all(math.isnan(end) for end in alone.critical)


def test_recovery_pulls_the_cost_from_the_branch_and_not_the_one_behind_it() -> None:
    curves = branches(100.0, np.random.default_rng(8), lost=12.0)
    assert fit_critical_batch(curves, SETTLE, cost_from_branch).critical.high < 95
    assert fit_critical_batch(curves, SETTLE, cost_after_settling).critical.value == pytest.approx(100, rel=0.05)


def test_a_cost_that_grows_as_the_root_of_the_batch_shows_in_the_rival_law() -> None:
    samples = np.linspace(0, 1024, 17)
    losses = {b: 2 - 0.4 * np.log1p(samples / math.sqrt(b / 8) / 300) for b in BATCHES}
    curves = [BranchCurve(b, samples, np.repeat(loss[:, None], 32, axis=1)) for b, loss in losses.items()]
    fit = fit_critical_batch(curves, SETTLE)
    assert fit.exponent == pytest.approx(0.5, abs=0.02)
    assert fit.exponent_residual < fit.residual / 3
    law = fit_critical_batch(branches(40.0, np.random.default_rng(9)), SETTLE)
    assert law.residual < law.exponent_residual / 3


def covered(fit: CriticalBatchFit, critical: float) -> bool:
    return fit.critical.low <= critical <= fit.critical.high


@pytest.mark.parametrize(
    ("path", "validation"), [(0.06, 0.0), (0.0, 0.05), (0.04, 0.03)], ids=["paths", "validation", "both"]
)
def test_the_interval_holds_the_truth_as_often_as_it_says(path: float, validation: float) -> None:
    """Binomial: of 50 intervals of 95 %, fewer than 43 hold the truth once in 2,000 times."""
    random = np.random.default_rng(10)
    fits = [
        fit_critical_batch(branches(50.0, random, path=path, validation=validation), SETTLE, cost_after_settling)
        for _ in range(50)
    ]
    assert sum(covered(fit, 50.0) for fit in fits) >= 43
    assert sum(fit.outcome == "measured" for fit in fits) >= 25, "and it is of some use"
    assert sum(covered(fit, 500.0) for fit in fits) <= 25
