from __future__ import annotations

import math

import numpy as np
import pytest

from copus_ext.core.efficiency.goodput import (
    LOG_C_MEAN,
    LOG_C_SD,
    critical_batch,
    critical_batch_quantiles,
    expected_improvement,
    gain_quantiles,
    goodput,
    normal_quantiles,
    statistical_efficiency,
)
from copus_ext.core.noise.noise_scale import NoiseEstimate

LINES = [(0.3, 0.02, 50.0), (1.0, 1.0, 8.0), (0.01, 0.5, 900.0)]  # t0 [s], t1 [s per sequence], critical batch


def noise(value: float, low: float, high: float) -> NoiseEstimate:
    return NoiseEstimate(value, low, high, N=1.0, S=value, n_eff=50.0)


def linear_goodput(batch: np.ndarray | float, t0: float, t1: float, critical: float) -> np.ndarray | float:
    return goodput(batch / (t0 + t1 * batch), batch, critical)


def test_half_of_a_sequence_is_lost_at_the_critical_batch() -> None:
    assert statistical_efficiency(24.0, critical_batch(12.0, 2.0)) == 0.5
    assert statistical_efficiency(1e-9, 24.0) == pytest.approx(1.0)


@pytest.mark.parametrize("first_batch", [1.0, 16.0, 300.0])
def test_relative_to_a_first_batch_it_is_the_efficiency_of_pollux(first_batch: float) -> None:
    noise_scale, batch = 80.0, np.array([4.0, 64.0, 1024.0])
    pollux = (noise_scale + first_batch) / (noise_scale + batch)  # Qiao et al. 2021, section 3.1
    ours = statistical_efficiency(batch, noise_scale) / statistical_efficiency(first_batch, noise_scale)
    np.testing.assert_allclose(ours, pollux, rtol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.5, 64.0])
def test_it_is_adaptdls_efficiency_in_its_own_terms(scale: float) -> None:
    """As adaptdl.goodput.GoodputFunction writes it: gain over scale, with the variance of a first batch's gradient."""
    first_batch, square, trace = 32.0, 0.7, 90.0
    variance = trace / first_batch
    adaptdl = (variance + square) / (variance / scale + square) / scale
    critical = critical_batch(trace / square, 1.0)
    ours = statistical_efficiency(scale * first_batch, critical) / statistical_efficiency(first_batch, critical)
    assert ours == pytest.approx(adaptdl, rel=1e-14)


@pytest.mark.parametrize(("t0", "t1", "critical"), LINES)
def test_the_best_batch_of_a_linear_step_time(t0: float, t1: float, critical: float) -> None:
    batches = np.geomspace(1e-2, 1e5, 200_001)
    best = batches[np.argmax(linear_goodput(batches, t0, t1, critical))]
    assert best == pytest.approx(math.sqrt(t0 * critical / t1), rel=1e-3)


@pytest.mark.parametrize("wrong", [2.0, 4.0, 0.25])
def test_regret_of_a_wrong_c_is_bounded_and_the_bound_is_met(wrong: float) -> None:
    x = math.sqrt(wrong)
    bound = 4 * x / (1 + x) ** 2
    kept = []
    for t0 in np.geomspace(1e-3, 1e3, 25):
        right, chosen = (math.sqrt(t0 * factor * 100.0) for factor in (1.0, wrong))
        kept.append(linear_goodput(chosen, t0, 1.0, 100.0) / linear_goodput(right, t0, 1.0, 100.0))
    assert min(kept) >= bound - 1e-12
    assert linear_goodput(100.0 * x, 100.0, 1.0, 100.0) / linear_goodput(100.0, 100.0, 1.0, 100.0) == pytest.approx(
        bound
    )


def test_quantiles_are_those_of_a_normal() -> None:
    z = normal_quantiles()
    np.testing.assert_allclose(z, -z[::-1], atol=1e-12)
    assert z[2] == pytest.approx(-0.6744897501960817)  # the lower quartile is one of them


def test_nothing_is_known_without_a_positive_lower_bound() -> None:
    assert critical_batch_quantiles(None) is None
    for low in (math.nan, 0.0, -1.0, -math.inf, math.inf):
        assert critical_batch_quantiles(noise(10.0, low, math.inf)) is None


@pytest.mark.parametrize("value", [40.0, math.inf, math.nan])
def test_an_open_interval_counts_as_its_lower_end(value: float) -> None:
    opened = critical_batch_quantiles(noise(value, 8.0, math.inf))
    assert opened is not None
    assert math.exp(np.log(opened).mean()) == pytest.approx(8.0 * math.exp(LOG_C_MEAN))


def test_quantiles_follow_interval_and_prior() -> None:
    """Against a million draws of noise scale x c, the noise scale normal in the logarithm on either side."""
    generator = np.random.default_rng(0)
    z, w = generator.standard_normal((2, 1_000_000))
    width = np.where(z < 0, math.log(40 / 25), math.log(90 / 40)) / 1.959964
    draws = 40.0 * np.exp(z * width + LOG_C_MEAN + LOG_C_SD * w)
    ours = critical_batch_quantiles(noise(40.0, 25.0, 90.0))
    assert ours is not None
    np.testing.assert_allclose(ours[2:8], np.quantile(draws, (np.arange(2, 8) + 0.5) / 10), rtol=0.05)


def test_gain_quantiles_agree_with_draws() -> None:
    generator = np.random.default_rng(1)
    z, w = generator.standard_normal((2, 1_000_000))
    critical = 60.0 * np.exp(LOG_C_SD * w)
    draws = 1.3 * np.exp(0.1 * z) * (1 + 16 / critical) / (1 + 32 / critical) - 1
    grid = 60.0 * np.exp(LOG_C_SD * normal_quantiles())
    low, median, high = gain_quantiles(np.log([1.3]), np.array([0.1]), np.array([32.0]), 16.0, grid)
    np.testing.assert_allclose([low[0], median[0], high[0]], np.quantile(draws, (0.25, 0.5, 0.75)), atol=0.015)


def test_at_an_equal_batch_the_critical_batch_does_not_matter() -> None:
    ratio, sd, batch = np.log([1.0, 1.2, 0.7]), np.array([0.0, 0.2, 0.1]), np.full(3, 16.0)
    grids = [np.full(10, 1e-6), np.geomspace(1.0, 1e9, 10), None]
    answers = [gain_quantiles(ratio, sd, batch, 16.0, grid) for grid in grids]
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])
    np.testing.assert_allclose(answers[0][0], np.exp(ratio - 0.6744897501960817 * sd) - 1, rtol=1e-12)


def test_the_current_plan_gains_nothing_against_itself() -> None:
    quartiles = gain_quantiles(np.zeros(1), np.zeros(1), np.array([16.0]), 16.0, np.geomspace(1.0, 100.0, 10))
    assert [value[0] for value in quartiles] == [0.0, 0.0, 0.0]


def test_expected_improvement_agrees_with_draws() -> None:
    draws = np.random.default_rng(0).standard_normal(400_000)
    for mean, sd in ((0.0, 0.3), (-0.2, 0.2), (0.1, 0.05), (0.3, 1e-13)):
        ratio = np.exp(mean + sd * draws)
        gain, loss = expected_improvement(np.array([mean]), np.array([sd]))
        assert gain[0] == pytest.approx(np.maximum(ratio - 1, 0).mean(), abs=2e-3)
        assert loss[0] == pytest.approx(np.maximum(1 - ratio, 0).mean(), abs=2e-3)
