"""N and S of single steps against Gaussian gradients whose |G|^2 and tr(Sigma) are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from copus_ext.core.noise.step_noise import inner_product_variance, step_estimate, step_variance
from tests.unit.gaussian_noise import MEAN, TRUE_N, TRUE_S, VARIANCES, draw_steps

DRAWS = 20_000
GROUPINGS = [[8, 8, 8, 8], [1, 2, 5, 8], [16, 48], [3] * 11]


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_equal_groups_split_the_measured_square_norm(groups: int) -> None:
    rng = np.random.default_rng(groups)
    norms = rng.uniform(1.0, 2.0, groups)
    whole = 0.7
    step = step_estimate(norms, [3] * groups, whole)
    assert step.N + step.S / (3 * groups) == pytest.approx(whole, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("batches", GROUPINGS)
def test_a_step_is_made_of_products_and_differences_of_different_groups(batches: list[int]) -> None:
    """What holds exactly whatever the sizes: N has no square of a group in it, and S no mean gradient."""
    sizes = np.array(batches, dtype=float)
    shares, batch = sizes / sizes.sum(), sizes.sum()
    groups = 3.0 + np.random.default_rng(1).standard_normal((len(batches), 7))
    norms, whole = (groups**2).sum(axis=1), shares @ groups
    step = step_estimate(norms, batches, float(whole @ whole))
    pairs = shares[:, None] * shares * (1 - np.eye(len(batches)))
    distances = ((groups[:, None] - groups) ** 2).sum(axis=-1)
    assert pytest.approx((pairs * (groups @ groups.T)).sum() / pairs.sum(), rel=1e-10) == step.N
    assert pytest.approx(batch * (pairs * distances).sum() / 2 / (len(batches) - 1), rel=1e-10) == step.S
    assert step.N * pairs.sum() + shares**2 @ norms == pytest.approx(whole @ whole, rel=1e-10)
    assert pytest.approx(step.S, rel=1e-8) == step_estimate(norms - 9e3, batches, float(whole @ whole) - 9e3).S


@pytest.mark.parametrize("batches", [[1, 2, 5, 8], [16, 48]])
def test_unequal_groups_split_the_square_norm_on_average(batches: list[int]) -> None:
    """N + S / B is not the measured square norm, but has its expectation, |G|^2 + tr(Sigma) / B."""
    parts = draw_steps(batches, DRAWS, seed=2) @ [1.0, 1.0 / sum(batches)]
    expected = TRUE_N + TRUE_S / sum(batches)
    assert abs(parts.mean() - expected) < 4 * parts.std() / math.sqrt(DRAWS)


@pytest.mark.parametrize("batches", GROUPINGS)
def test_a_step_is_unbiased_and_scatters_as_predicted(batches: list[int]) -> None:
    steps = draw_steps(batches, DRAWS)
    error = steps.std(axis=0, ddof=1) / math.sqrt(DRAWS)
    assert (np.abs(steps.mean(axis=0) - [TRUE_N, TRUE_S]) < 4 * error).all()
    signal, trace_square = float(MEAN**2 @ VARIANCES), float((VARIANCES**2).sum())
    assert steps.var(axis=0) == pytest.approx(step_variance(signal, trace_square, batches), rel=0.1)


def test_scaling_the_loss_scales_both_squared() -> None:
    norms, batches, scale = np.array([1.0, 2.0, 4.0]), [1, 2, 3], 7.0
    one = step_estimate(norms, batches, 1.5)
    scaled = step_estimate(norms * scale**2, batches, 1.5 * scale**2)
    assert scaled[:2] == pytest.approx((one.N * scale**2, one.S * scale**2), rel=1e-12)


@pytest.mark.parametrize("batches", [[8], [8, 0], []])
def test_fewer_than_two_groups_are_refused(batches: list[int]) -> None:
    with pytest.raises(ValueError, match="at least two groups"):
        step_estimate([1.0] * len(batches), batches, 1.0)


def test_a_square_norm_per_group_is_asked_for() -> None:
    with pytest.raises(ValueError, match="3 square norms for 2 groups"):
        step_estimate([1.0, 1.0, 1.0], [4, 4], 1.0)


def dealt(rng: np.random.Generator, gradients: np.ndarray, groups: int) -> np.ndarray:
    """[groups] inner products of groups' mean gradients with the whole mean, the rows dealt to them at random."""
    means = rng.permutation(gradients).reshape(groups, -1, gradients.shape[1]).mean(axis=1)
    return means @ gradients.mean(axis=0)


def test_inner_products_of_single_sequences_have_their_sample_variance() -> None:
    gradients = 0.5 + np.random.default_rng(3).standard_normal((32, 6))
    single = gradients @ gradients.mean(axis=0)
    assert inner_product_variance(single, 1.0) == pytest.approx(single.var(ddof=1), rel=1e-12)
    assert single.mean() == pytest.approx((gradients.mean(axis=0) ** 2).sum())


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_groups_have_it_on_average_over_the_ways_to_deal_sequences_to_them(groups: int) -> None:
    rng = np.random.default_rng(4)
    gradients = 0.5 + rng.standard_normal((32, 6))
    truth = (gradients @ gradients.mean(axis=0)).var(ddof=1)
    found = np.array([inner_product_variance(dealt(rng, gradients, groups), 32 / groups) for _ in range(4000)])
    assert abs(found.mean() - truth) < 4 * found.std() / math.sqrt(len(found))


@pytest.mark.parametrize("draws", [2, 4])
def test_errors_of_independent_draws_leave_it_unbiased_where_those_of_one_add_to_it(draws: int) -> None:
    rng, exact = np.random.default_rng(5), np.array([1.0, 4.0, 2.0, 3.0])
    truth = inner_product_variance(exact, 8.0)
    measured = exact + 2.0 * rng.standard_normal((4000, draws, 4))
    several = np.array([inner_product_variance(one, 8.0) for one in measured])
    assert abs(several.mean() - truth) < 4 * several.std() / math.sqrt(len(several))
    alone = np.array([inner_product_variance(one[0], 8.0) for one in measured])
    assert alone.mean() == pytest.approx(truth + 8.0 * 2.0**2, rel=0.05)
    assert several.std() < alone.std()
    assert inner_product_variance([exact] * draws, 8.0) == pytest.approx(truth, rel=1e-12)


def test_an_inner_product_that_is_not_finite_makes_no_variance() -> None:
    for bad in (math.nan, math.inf):
        assert math.isnan(inner_product_variance([[1.0, 2.0], [bad, 2.0]], 4.0))
    assert math.isnan(step_estimate([1.0, 2.0], [4, 4], 1.0).P), "not measured"


@pytest.mark.parametrize(("products", "group_batch"), [([1.0], 8.0), ([[1.0], [2.0]], 8.0), ([1.0, 2.0], 0.0)])
def test_a_variance_of_less_than_two_groups_is_refused(products: list[float], group_batch: float) -> None:
    with pytest.raises(ValueError, match="at least two groups"):
        inner_product_variance(products, group_batch)


def turning_gradients(turn: float, steps: int, groups: int, batch: int) -> np.ndarray:
    """[steps, groups, 6] mean gradients; |G|^2 = 4, turning by so many radians a step, tr(Sigma) = 6."""
    angles = turn * np.arange(steps)
    truth = np.zeros((steps, 1, 6))
    truth[:, 0, 0], truth[:, 0, 1] = 2 * np.cos(angles), 2 * np.sin(angles)
    noise = np.random.default_rng(10).standard_normal((steps, groups, 6))
    return truth + noise * math.sqrt(groups / batch)


def within_steps(gradients: np.ndarray, batch: int) -> np.ndarray:
    """[steps, 2] N and S from the groups of each step, as we do it."""
    groups = gradients.shape[1]
    norms, whole = (gradients**2).sum(-1), (gradients.mean(axis=1) ** 2).sum(-1)
    steps = zip(norms, whole, strict=True)
    return np.array([step_estimate(q, [batch // groups] * groups, float(w))[:2] for q, w in steps])


def between_steps(gradients: np.ndarray, batch: int) -> np.ndarray:
    """[steps // 2, 2] N and S from two steps each, as if the true gradient were the same in both."""
    whole = gradients.mean(axis=1)
    first, second = whole[0::2], whole[1::2]
    return np.stack([(first * second).sum(-1), batch / 2 * ((first - second) ** 2).sum(-1)], axis=1)


def is_unbiased(steps: np.ndarray) -> bool:
    error = steps.std(axis=0, ddof=1) / math.sqrt(len(steps))
    return bool((np.abs(steps.mean(axis=0) - [4.0, 6.0]) < 4 * error).all())


def test_a_gradient_that_moves_does_not_count_as_noise() -> None:
    """Guards against differences of consecutive steps, which are right only while training stands still."""
    still, moving = (turning_gradients(turn, 4000, groups=4, batch=32) for turn in (0.0, 0.3))
    assert is_unbiased(within_steps(still, 32))
    assert is_unbiased(between_steps(still, 32))
    assert is_unbiased(within_steps(moving, 32))
    assert not is_unbiased(between_steps(moving, 32))
