"""The corrected noise scale against Gaussian gradients of which the cheap estimator sees a part that reads half."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from copus_ext.core.noise.correction import RunningCorrection
from copus_ext.core.noise.noise_scale import NoiseScaleEstimator, StepEstimate
from tests.unit.gaussian_noise import autocorrelated

BATCH, GROUPS, SAMPLES = 8.0, 4, 8  # sequences; the full estimator has groups of two of them
# Gradients of 4 parameters that the cheap estimator sees, with noise scale 8, and of 8 more that bring it to 16.
MEAN = np.array([1.0] * 4 + [0.8] * 8)
VARIANCE = np.array([8.0] * 4 + [(16 * (4 + 8 * 0.64) - 32) / 8] * 8)
TRUTH, CHEAP_TRUTH = 16.0, 8.0


def estimates(samples: np.ndarray, groups: int) -> np.ndarray:
    """[runs, steps, 2] N and S from gradients [runs, steps, SAMPLES, parameters] in so many equal groups."""
    means = samples.reshape(*samples.shape[:2], groups, -1, samples.shape[-1]).mean(axis=3)
    square, whole = (means**2).sum(-1).mean(-1), (means.mean(axis=2) ** 2).sum(-1)
    return np.stack([(whole - square / groups) / (1 - 1 / groups), BATCH * (square - whole) / (groups - 1)], axis=-1)


def measured(seed: int, runs: int, steps: int, moving: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Full and cheap N and S, [runs, steps, 2] each; gradient and noise of all parameters swell and shrink together."""
    rng = np.random.default_rng(seed)
    common = [autocorrelated(rng, (steps, runs), memory=0.5).T[..., None, None] for _ in range(2)]
    size, noise = (np.exp(moving * one - moving**2) for one in common)
    draws = rng.standard_normal((runs, steps, SAMPLES, MEAN.size)) * np.sqrt(VARIANCE)
    gradients = size * MEAN + noise * draws  # E size^2 = E noise^2 = 1
    return estimates(gradients, GROUPS), estimates(gradients[..., :4], SAMPLES)


def feed(
    correction: RunningCorrection, full: np.ndarray, cheap: np.ndarray, every: int, start: int = 0
) -> RunningCorrection:
    """All steps, the full numbers of every ``every``-th."""
    for k, (y, x) in enumerate(zip(full.tolist(), cheap.tolist(), strict=True), start=start + 1):
        correction = correction.update(None if k % every else StepEstimate(*y), StepEstimate(*x), 1.0, BATCH)
    return correction


def plain(half_life: float, steps: np.ndarray) -> NoiseScaleEstimator:
    """All of the steps as they are."""
    estimator = NoiseScaleEstimator(half_life)
    for n, s in steps.tolist():
        estimator = estimator.update(n, s, 1.0, BATCH)
    return estimator


def test_it_converges_to_the_full_noise_scale() -> None:
    full, cheap = measured(1, 1, 6000)
    correction = feed(RunningCorrection.start(1e9), full[0], cheap[0], every=5)
    estimate = correction.estimate()
    assert correction.cheap.estimate().value == pytest.approx(CHEAP_TRUTH, rel=0.1)
    assert estimate.value == pytest.approx(TRUTH, rel=0.1)
    assert estimate.low < TRUTH < estimate.high
    assert estimate.low > 1.5 * CHEAP_TRUTH
    assert estimate.value == estimate.S / estimate.N


@pytest.mark.parametrize(("half_life", "moving"), [(1e9, 0.4), (50.0, 0.2)])
def test_the_interval_holds_the_truth_as_often_as_it_says(half_life: float, moving: float) -> None:
    full, cheap = measured(2, 500, 72, moving)
    found = [
        feed(RunningCorrection.start(half_life), *run, every=3).estimate() for run in zip(full, cheap, strict=True)
    ]
    assert 0.90 <= np.mean([one.low <= TRUTH <= one.high for one in found]) <= 0.98
    assert np.median([one.value for one in found]) == pytest.approx(TRUTH, rel=0.07)


def corrected_and_alone(full: np.ndarray, cheap: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray]:
    """[runs, 3] value, N, S with the cheap steps between the full ones, and without them."""
    corrected, alone = [], []
    for run in zip(full, cheap, strict=True):
        corrected.append(feed(RunningCorrection.start(1e9), *run, every=every).estimate())
        alone.append(plain(1e9, run[0][every - 1 :: every]).estimate())
    first, second = (np.array([[one.value, one.N, one.S] for one in found]) for found in (corrected, alone))
    return first, second


def test_the_cheap_steps_add_to_what_the_full_ones_know() -> None:
    corrected, alone = corrected_and_alone(*measured(3, 80, 240), every=8)
    assert corrected[:, 2].std() < 0.9 * alone[:, 2].std()
    errors = [np.log(np.clip(found[:, 0], 1, 256) / TRUTH).std() for found in (corrected, alone)]
    assert errors[0] < 0.95 * errors[1]


def test_a_cheap_estimator_that_knows_all_is_as_good_as_full_steps_everywhere() -> None:
    full, _ = measured(11, 30, 320)
    corrected, alone = (
        np.array(
            [feed(RunningCorrection.start(60.0), *run, every=8).estimate() for run in zip(full, cheap, strict=True)]
        )
        for cheap in (0.5 * full, np.ones_like(full))
    )
    everywhere = np.array([plain(60.0, run).estimate() for run in full])
    n_and_s, n_eff = slice(3, 5), 5
    errors = [((found - everywhere)[:, n_and_s] ** 2).mean(axis=0) for found in (corrected, alone)]
    assert (errors[0] < 0.2**2 * errors[1]).all()
    counted = [np.median(found[:, n_eff]) for found in (corrected, everywhere, alone)]
    assert 0.6 * counted[1] < counted[0] < 1.1 * counted[1]
    assert counted[2] < 0.3 * counted[1]


def test_the_first_slope_shifts_nothing() -> None:
    """Seven steps after it was found, while no full step has used it yet."""
    full, _ = measured(13, 60, 71, moving=0.2)
    found = [feed(RunningCorrection.start(1e9), run, 0.5 * run, every=8) for run in full]
    assert all(one.of_s.slope == pytest.approx(2.0) for one in found)
    assert np.mean([one.estimate().S for one in found]) == pytest.approx(VARIANCE.sum(), rel=0.04)


def test_a_relation_that_changes_is_learned_anew() -> None:
    _, cheap = measured(12, 1, 200)
    factors = np.where(np.arange(200) < 100, 1.0, 3.0)[:, None]
    correction = feed(RunningCorrection.start(20.0), factors * cheap[0], cheap[0], every=2)
    assert correction.of_n.slope == pytest.approx(3.0, rel=0.05)
    assert correction.of_s.slope == pytest.approx(3.0, rel=0.05)


def test_a_cheap_estimator_that_knows_nothing_does_little_harm() -> None:
    (full, _), (_, stranger) = measured(4, 100, 160), measured(5, 100, 160)
    corrected, alone = corrected_and_alone(full, stranger, every=4)
    assert (corrected.std(axis=0)[1:] < 1.15 * alone.std(axis=0)[1:]).all()


def test_with_full_steps_only_it_is_the_plain_estimator() -> None:
    full, _ = measured(6, 1, 50)
    corrected = feed(RunningCorrection.start(40.0), full[0], np.ones_like(full[0]), every=1).estimate()
    assert corrected[:5] == pytest.approx(plain(40.0, full[0]).estimate()[:5], rel=1e-12)


def test_before_a_full_step_the_bias_is_unknown() -> None:
    full, cheap = measured(7, 1, 40)
    correction = feed(RunningCorrection.start(1e9), full[0], cheap[0], every=1000)
    estimate = correction.estimate()
    assert not correction.bias_known
    assert estimate.value == correction.cheap.estimate().value
    assert all(math.isnan(number) for number in (estimate.low, estimate.high, estimate.N, estimate.S))
    assert estimate.n_eff == 0


def test_before_three_full_steps_there_is_a_value_and_no_interval() -> None:
    full, cheap = measured(8, 1, 12)
    two = feed(RunningCorrection.start(1e9), full[0, :11], cheap[0, :11], every=4)
    assert two.bias_known
    assert two.estimate().value == pytest.approx(full[0, 3:8:4, 1].sum() / full[0, 3:8:4, 0].sum())
    assert math.isnan(two.estimate().low)
    assert math.isnan(two.estimate().high)
    assert not math.isnan(feed(two, full[0, 11:], cheap[0, 11:], every=4, start=11).estimate().high)


def test_nothing_seen_is_nothing_known() -> None:
    estimate = RunningCorrection.start(1e9).estimate()
    assert all(math.isnan(number) for number in estimate[:5])


def test_steps_that_are_not_finite_are_left_out() -> None:
    full, cheap = measured(9, 1, 60)
    clean = feed(RunningCorrection.start(50.0), full[0], cheap[0], every=4)
    fine, bad = StepEstimate(1.0, 1.0), StepEstimate(math.nan, 1.0)
    assert clean.update(fine, bad, 1.0, BATCH) == clean
    assert clean.update(bad, fine, 1.0, BATCH) == clean.update(None, fine, 1.0, BATCH)


def test_full_steps_age_by_all_tokens_since() -> None:
    full, cheap = np.array([[1.0, 1.0], [9.0, 9.0], [9.0, 9.0], [3.0, 3.0]]), np.ones((4, 2))
    correction = RunningCorrection.start(3.0)
    for k, (y, x) in enumerate(zip(full, cheap, strict=True)):
        correction = correction.update(StepEstimate(*y) if k in (0, 3) else None, StepEstimate(*x), 1.0, BATCH)
    assert pytest.approx((0.5 * 1 + 3) / 1.5) == correction.estimate().N


def test_another_temperature_ages_the_full_steps_too() -> None:
    x, hot = StepEstimate(1.0, 1.0), {"temperature": 4.0}
    correction = RunningCorrection.start(1e9).update(StepEstimate(1.0, 1.0), x, 1.0, BATCH, temperature=1.0)
    correction = correction.update(None, x, 1.0, BATCH, **hot).update(StepEstimate(2.0, 2.0), x, 1.0, BATCH, **hot)
    assert pytest.approx((0.25 * 1 + 2) / 1.25) == correction.estimate().N


def test_saved_and_loaded_it_goes_on_to_the_last_bit() -> None:
    full, cheap = measured(10, 1, 90)
    half = feed(RunningCorrection.start(1000 / 3), full[0, :50], cheap[0, :50], every=4)
    loaded = RunningCorrection.from_json(json.loads(json.dumps(half.to_json())))
    assert loaded == half
    onwards = [feed(one, full[0, 50:], cheap[0, 50:], every=4, start=50).estimate() for one in (loaded, half)]
    assert onwards[0] == onwards[1]


def test_the_half_life_can_change_on_the_way() -> None:
    full, cheap = measured(14, 1, 60)
    whole = feed(RunningCorrection.start(30.0), full[0], cheap[0], every=4)
    half = feed(RunningCorrection.start(30.0), full[0, :40], cheap[0, :40], every=4)
    there_and_back = half.with_half_life(7.0).with_half_life(30.0)
    assert half.with_half_life(7.0).half_life_tokens == 7.0
    assert feed(there_and_back, full[0, 40:], cheap[0, 40:], every=4, start=40) == whole
    assert (
        feed(half.with_half_life(7.0), full[0, 40:], cheap[0, 40:], every=4, start=40).cheap.total < whole.cheap.total
    )
