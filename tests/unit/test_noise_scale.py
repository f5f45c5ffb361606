"""The noise scale against Gaussian gradients whose noise scale is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from copus_ext.core.noise.noise_scale import NoiseScaleEstimator, step_estimate, training_temperature
from copus_ext.core.noise.student import t_quantile_975
from tests.unit.gaussian_noise import TRUE_N, TRUE_S, autocorrelated, draw_steps


def feed(estimator: NoiseScaleEstimator, steps: np.ndarray, batch: int = 32, tokens: int = 32) -> NoiseScaleEstimator:
    for N, S in steps.tolist():  # updates are twice as slow with numpy's numbers
        estimator = estimator.update(N, S, tokens, batch)
    return estimator


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
    steps = np.array([step_estimate(q, [8] * 4, w)[:2] for q, w in zip(norms, whole, strict=True)])
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


def made_up(noise: np.ndarray) -> np.ndarray:
    """N = 1 and S = 100 with relative scatter of 2 and 0.3."""
    return np.array([1.0, 100.0]) * (1.0 + noise * [2.0, 0.3])


def coverage(windows: list[list[tuple[int, np.ndarray]]], half_life_steps: float, truth: float) -> float:
    """Share of windows, lists of (batch, steps), whose interval holds the truth; the half-life in steps of 32."""
    held = 0
    for window in windows:
        estimator = NoiseScaleEstimator(half_life_tokens=32 * half_life_steps)
        for batch, steps in window:
            estimator = feed(estimator, steps, batch=batch, tokens=batch)
        estimate = estimator.estimate()
        held += estimate.low <= truth <= estimate.high
    return held / len(windows)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    windows = [[(32, made_up(rng.standard_normal((60, 2))))] for _ in range(500)]
    assert 0.90 <= coverage(windows, half_life_steps=30, truth=100.0) <= 0.98


def test_the_interval_knows_of_autocorrelation() -> None:
    rng = np.random.default_rng(6)
    windows = [[(32, made_up(autocorrelated(rng, (100, 2), memory=0.5)))] for _ in range(500)]
    assert 0.90 <= coverage(windows, half_life_steps=50, truth=100.0) <= 0.98


@pytest.mark.parametrize("batches", [[1, 2, 5, 8], [1] * 4])
def test_the_interval_holds_for_gradients_as_they_come(batches: list[int]) -> None:
    """Products of Gaussians: N has heavy tails, up to 5 times as much scatter as mean for the smallest batch."""
    steps = draw_steps(batches, 500 * 80, seed=9).reshape(500, 80, 2)
    windows = [[(sum(batches), window)] for window in steps]
    assert 0.90 <= coverage(windows, half_life_steps=40, truth=TRUE_S / TRUE_N) <= 0.98


@pytest.mark.parametrize("first", [1, 8])
def test_the_interval_holds_where_the_batch_doubles_on_the_way(first: int) -> None:
    small, large = (draw_steps([size] * 4, 500 * 40, seed=size).reshape(500, 40, 2) for size in (first, 2 * first))
    windows = [[(4 * first, a), (8 * first, b)] for a, b in zip(small, large, strict=True)]
    assert 0.90 <= coverage(windows, half_life_steps=40, truth=TRUE_S / TRUE_N) <= 0.98


def test_effective_steps_count_weights_and_autocorrelation() -> None:
    rng = np.random.default_rng(7)
    forgetful = feed(NoiseScaleEstimator(32 * 50.0), 1 + rng.standard_normal((600, 2))).estimate()
    lasting = feed(NoiseScaleEstimator(32 * 50.0), 1 + autocorrelated(rng, (600, 2), memory=0.9)).estimate()
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


def test_the_past_counts_half_per_doubling_or_halving_of_the_temperature() -> None:
    for before, now, kept in ((1.0, 2.0, 0.5), (2.0, 1.0, 0.5), (1.0, 8.0, 0.125), (3.0, 3.0, 1.0)):
        past = NoiseScaleEstimator(half_life_tokens=1e12).update(0.0, 0.0, 1, 32, temperature=before)
        estimate = past.update(1.0, 1.0, 1, 32, temperature=now).estimate()
        assert pytest.approx(1 / (1 + kept), rel=1e-9) == estimate.N


def test_a_warm_up_from_nothing_forgets_its_first_steps() -> None:
    estimator = NoiseScaleEstimator(half_life_tokens=1e12)
    for step in range(101):
        estimator = estimator.update(float(step), 1.0, 1, 32, temperature=1e-5 * step)
    assert pytest.approx(201 / 3, rel=1e-3) == estimator.estimate().N  # weights go as the step: sum k^2 / sum k


def test_a_batch_that_grows_under_its_rule_forgets_nothing() -> None:
    steps = draw_steps([8] * 4, 60)
    unaware = feed(feed(NoiseScaleEstimator(1e4), steps[:30]), steps[30:], batch=128, tokens=128)
    for optimizer, factor in (("adam", 2.0), ("sgd", 4.0)):  # of the learning rate, for four times the batch
        aware = NoiseScaleEstimator(1e4)
        for k, (N, S) in enumerate(steps):
            batch, rate = (32, 1e-3) if k < 30 else (128, 1e-3 * factor)
            aware = aware.update(N, S, batch, batch, temperature=training_temperature(optimizer, rate, batch))
        assert aware.estimate() == pytest.approx(unaware.estimate(), rel=1e-12)


@pytest.mark.parametrize("unknown", [None, 0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_says_nothing_changes_nothing(unknown: float | None) -> None:
    start = NoiseScaleEstimator(1e4).update(1.0, 2.0, 32, 32, temperature=0.5)
    through = start.update(3.0, 4.0, 32, 32, temperature=unknown)
    assert through == start.update(3.0, 4.0, 32, 32, temperature=0.5)
    assert NoiseScaleEstimator(1e4).update(1.0, 2.0, 32, 32, temperature=unknown).temperature is None


def test_a_skipped_step_does_not_move_the_temperature() -> None:
    start = NoiseScaleEstimator(1e4).update(1.0, 2.0, 32, 32, temperature=0.5)
    spoilt = start.update(math.nan, 2.0, 32, 32, temperature=8.0)
    assert spoilt.temperature == 0.5
    assert spoilt.total == start.total


def test_the_temperature_is_that_of_the_optimizer() -> None:
    assert training_temperature("sgd", 0.1, 16) == pytest.approx(0.1 / 16)
    for optimizer in ("adam", "lion"):
        assert training_temperature(optimizer, 0.1, 16) == pytest.approx(0.1 / 4)


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


def test_a_new_half_life_counts_from_here_on() -> None:
    past = NoiseScaleEstimator(half_life_tokens=1e12).update(0.0, 0.0, 100, 32).with_half_life(100)
    assert pytest.approx(1 / 1.5) == past.update(1.0, 1.0, 100, 32).estimate().N


def test_a_half_life_that_is_no_number_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="half-life"):
        NoiseScaleEstimator(half_life_tokens=0)


@pytest.mark.parametrize("temperature", [None, 1 / 3])
def test_saved_and_loaded_it_goes_on_to_the_last_bit(temperature: float | None) -> None:
    steps = draw_steps([1, 2, 5, 8], 75) / 3
    half = feed(NoiseScaleEstimator(half_life_tokens=1000 / 3), steps[:37]).update(math.nan, 0.0, 1, 1)
    half = half.update(0.1, 0.2, 32, 32, temperature=temperature)
    loaded = NoiseScaleEstimator.from_json(json.loads(json.dumps(half.to_json())))
    assert loaded == half
    warmer = [one.update(0.3, 0.4, 32, 32, temperature=0.7) for one in (loaded, half)]
    assert feed(warmer[0], steps[37:]).estimate() == feed(warmer[1], steps[37:]).estimate()


def test_what_was_saved_before_there_was_a_temperature_is_read() -> None:
    half = feed(NoiseScaleEstimator(1e4), draw_steps([8] * 4, 10))
    saved = json.loads(json.dumps(half.to_json()))
    del saved["temperature"]
    assert NoiseScaleEstimator.from_json(saved) == half


@pytest.mark.parametrize(("freedom", "tabulated"), [(2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (60, 2.000)])
def test_the_t_quantile_is_that_of_the_tables(freedom: int, tabulated: float) -> None:
    assert t_quantile_975(freedom) == pytest.approx(tabulated, rel=0.01)
