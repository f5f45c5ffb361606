"""The noise scale against Gaussian gradients whose noise scale is known."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from copus_ext.core.noise_scale import NoiseScaleEstimator, step_estimate, step_variance, t_quantile_975

DRAWS = 20_000
# A gradient of five numbers: its mean, and the variances of one sequence's.
MEAN = np.array([0.5, -0.3, 0.2, 0.0, 0.1])
VARIANCES = np.array([4.0, 2.0, 1.0, 0.5, 0.25])
TRUE_N = float(MEAN @ MEAN)
TRUE_S = float(VARIANCES.sum())
GROUPINGS = [[8, 8, 8, 8], [1, 2, 5, 8], [16, 48], [3] * 11]


def draw_steps(batches: list[int], draws: int, seed: int = 0) -> np.ndarray:
    """[draws, 2] N and S of steps with groups of these sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.array(batches, dtype=float)
    noise = rng.standard_normal((draws, len(batches), MEAN.size)) * np.sqrt(VARIANCES / sizes[:, None])
    groups = MEAN + noise
    whole = np.einsum("j,djk->dk", sizes / sizes.sum(), groups)
    norms, whole_norms = (groups**2).sum(-1), (whole**2).sum(-1)
    return np.array([step_estimate(norms[d], batches, whole_norms[d]) for d in range(draws)])


def feed(estimator: NoiseScaleEstimator, steps: np.ndarray, batch: int = 32, tokens: int = 32) -> NoiseScaleEstimator:
    for N, S in steps:
        estimator = estimator.update(N, S, tokens, batch)
    return estimator


def autocorrelated(rng: np.random.Generator, count: int, memory: float) -> np.ndarray:
    """[count, 2] AR(1) noise of unit variance."""
    noise = rng.standard_normal((count, 2))
    for before, after in pairwise(noise):
        after *= math.sqrt(1 - memory**2)
        after += memory * before
    return noise


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_equal_groups_split_the_measured_square_norm(groups: int) -> None:
    rng = np.random.default_rng(groups)
    norms = rng.uniform(1.0, 2.0, groups)
    whole = 0.7
    step = step_estimate(norms, [3] * groups, whole)
    assert step.N + step.S / (3 * groups) == pytest.approx(whole, rel=1e-10, abs=1e-10)


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
    assert scaled == pytest.approx((one.N * scale**2, one.S * scale**2), rel=1e-12)


@pytest.mark.parametrize("batches", [[8], [8, 0], []])
def test_fewer_than_two_groups_are_refused(batches: list[int]) -> None:
    with pytest.raises(ValueError, match="at least two groups"):
        step_estimate([1.0] * len(batches), batches, 1.0)


def test_a_square_norm_per_group_is_asked_for() -> None:
    with pytest.raises(ValueError, match="3 square norms for 2 groups"):
        step_estimate([1.0, 1.0, 1.0], [4, 4], 1.0)


def test_averages_converge_to_the_truth_where_mean_ratios_do_not() -> None:
    steps = draw_steps([8] * 4, 2000)
    estimate = feed(NoiseScaleEstimator(half_life_tokens=1e9), steps).estimate()
    truth = TRUE_S / TRUE_N
    assert estimate.value == pytest.approx(truth, rel=0.1)
    assert estimate.low < truth < estimate.high
    assert abs(float(np.median(steps[:, 1] / steps[:, 0])) - truth) > abs(estimate.value - truth)


def test_without_a_mean_gradient_the_interval_is_open() -> None:
    rng = np.random.default_rng(3)
    groups = rng.standard_normal((200, 4, 50))
    norms, whole = (groups**2).sum(-1), (groups.mean(axis=1) ** 2).sum(-1)
    steps = np.array([step_estimate(q, [8] * 4, w) for q, w in zip(norms, whole, strict=True)])
    estimate = feed(NoiseScaleEstimator(half_life_tokens=3200), steps).estimate()
    assert math.isinf(estimate.high)
    assert 0 < estimate.low < estimate.value


def test_a_negative_mean_square_is_reported_as_it_is() -> None:
    estimate = feed(
        NoiseScaleEstimator(half_life_tokens=1e6), np.array([[-1.0, 2.0], [-3.0, 2.5], [1.0, 1.5]])
    ).estimate()
    assert math.isclose(estimate.N, -1.0, rel_tol=1e-3)
    assert math.isinf(estimate.value)
    assert math.isinf(estimate.high)


def coverage(noise_of: list[np.ndarray], half_life_steps: float) -> float:
    """Share of windows whose interval holds the truth, for N = 1, S = 100 with relative scatter of 2 and 0.3."""
    held = 0
    for noise in noise_of:
        steps = np.array([1.0, 100.0]) * (1.0 + noise * [2.0, 0.3])
        estimate = feed(NoiseScaleEstimator(half_life_tokens=32 * half_life_steps), steps).estimate()
        held += estimate.low <= 100.0 <= estimate.high
    return held / len(noise_of)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    assert 0.90 <= coverage([rng.standard_normal((60, 2)) for _ in range(500)], half_life_steps=30) <= 0.98


def test_the_interval_knows_of_autocorrelation() -> None:
    rng = np.random.default_rng(6)
    windows = [autocorrelated(rng, 100, memory=0.5) for _ in range(250)]
    assert 0.88 <= coverage(windows, half_life_steps=50) <= 0.99


def test_effective_steps_count_weights_and_autocorrelation() -> None:
    rng = np.random.default_rng(7)
    forgetful = feed(NoiseScaleEstimator(32 * 50.0), 1 + rng.standard_normal((600, 2))).estimate()
    lasting = feed(NoiseScaleEstimator(32 * 50.0), 1 + autocorrelated(rng, 600, memory=0.9)).estimate()
    assert 60 < forgetful.n_eff <= 2 * 50 / math.log(2) + 1  # Kish's size of a half-life of 50 steps
    assert lasting.n_eff < forgetful.n_eff / 3


def test_half_of_the_weight_is_gone_after_a_half_life() -> None:
    old = feed(NoiseScaleEstimator(half_life_tokens=3200), np.array([[0.0, 0.0]] * 2000))
    both = feed(old, np.array([[1.0, 1.0]] * 100))
    assert math.isclose(both.estimate().N, 0.5, rel_tol=1e-6)


def test_a_token_counts_alike_however_steps_are_cut() -> None:
    start = feed(NoiseScaleEstimator(half_life_tokens=1e7), np.array([[0.0, 0.0]] * 64), batch=4, tokens=4)
    estimate = start.update(1.0, 1.0, tokens=256, batch=256).estimate()
    assert math.isclose(estimate.N, 0.5, rel_tol=1e-4)


def test_unequal_precision_is_measured_and_not_assumed() -> None:
    rng = np.random.default_rng(8)
    noise = rng.standard_normal((400, 2))
    start = NoiseScaleEstimator(half_life_tokens=1e9)
    early = feed(start, 1 + 2.0 * noise[:200], batch=4, tokens=4)
    late = feed(early, 1 + 0.25 * noise[200:], batch=64, tokens=64)
    alone = feed(start, 1 + 0.25 * noise[200:], batch=64, tokens=64)
    width = late.estimate().high - late.estimate().low
    assert width < 1.5 * (alone.estimate().high - alone.estimate().low)


def test_steps_that_are_not_finite_are_counted_and_nothing_else() -> None:
    clean = feed(NoiseScaleEstimator(half_life_tokens=3200), draw_steps([8] * 4, 10))
    spoilt = clean.update(math.nan, 1.0, 32, 32).update(1.0, math.inf, 32, 32)
    assert spoilt.skipped == 2
    assert spoilt.steps == clean.steps
    assert spoilt.estimate() == clean.estimate()


def test_before_three_steps_there_is_no_interval() -> None:
    empty = NoiseScaleEstimator(half_life_tokens=3200)
    assert math.isnan(empty.estimate().value)
    two = feed(empty, np.array([[1.0, 2.0], [1.5, 2.5]])).estimate()
    assert two.value == pytest.approx(1.8, rel=0.01)
    assert math.isnan(two.low)
    assert math.isnan(two.high)
    assert not math.isnan(feed(empty, np.array([[1.0, 2.0], [1.5, 2.5], [1.2, 2.2]])).estimate().high)


def test_a_half_life_below_a_step_is_survived() -> None:
    estimate = feed(NoiseScaleEstimator(half_life_tokens=0.5), draw_steps([8] * 4, 300), tokens=4096).estimate()
    assert math.isfinite(estimate.S)
    assert math.isnan(estimate.low)


def test_a_half_life_that_is_no_number_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="half-life"):
        NoiseScaleEstimator(half_life_tokens=0)


def test_saved_and_loaded_it_goes_on_to_the_last_bit() -> None:
    steps = draw_steps([1, 2, 5, 8], 75) / 3
    half = feed(NoiseScaleEstimator(half_life_tokens=1000 / 3), steps[:37]).update(math.nan, 0.0, 1, 1)
    loaded = NoiseScaleEstimator.from_json(json.loads(json.dumps(half.to_json())))
    assert loaded == half
    assert feed(loaded, steps[37:]).estimate() == feed(half, steps[37:]).estimate()


@pytest.mark.parametrize(("freedom", "tabulated"), [(2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (60, 2.000)])
def test_the_t_quantile_is_that_of_the_tables(freedom: int, tabulated: float) -> None:
    assert t_quantile_975(freedom) == pytest.approx(tabulated, rel=0.01)
