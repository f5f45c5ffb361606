"""The posterior of c: against brute-force integrals, closed forms of its drift, and simulated worlds."""

from __future__ import annotations

import json
import math
from statistics import NormalDist

import numpy as np
import pytest

from copus_ext.core.efficiency.critical_batch import CriticalBatchFit, Interval, fit_critical_batch
from copus_ext.core.efficiency.critical_ratio import (
    BATCH_CHANGE,
    DRIFT,
    MOST_OBSERVATIONS,
    PROBE,
    PROBE_LOG_SD,
    CriticalRatio,
    EfficiencyRatio,
    from_probe,
    from_slopes,
    log_c_grid,
)
from copus_ext.core.efficiency.goodput import LOG_C_MEAN, LOG_C_SD, normal_quantiles, statistical_efficiency
from copus_ext.core.efficiency.loss_curves import BranchCurve
from copus_ext.core.efficiency.loss_trend import SlopeRatio
from copus_ext.core.noise.noise_scale import NoiseEstimate

NOISE = 30.0
PRIOR_WIDTH = 2 * 1.959964 * LOG_C_SD
TENFOLD = 10.0**-DRIFT  # correlation of ln c between E and 10 E


def log_ratio(c: np.ndarray | float, noise: np.ndarray | float, batches: tuple[int, int]) -> np.ndarray | float:
    one, other = (statistical_efficiency(batch, c * noise) for batch in batches)
    return np.log(other / one)


def seen(
    ratio: float,
    log_sd: float = 0.1,
    batches: tuple[int, int] = (8, 128),
    noise: tuple[float, float, float] = (NOISE, 0.9 * NOISE, 1.1 * NOISE),
    samples: int = 1000,
) -> EfficiencyRatio:
    return EfficiencyRatio(PROBE, samples, *batches, ratio, log_sd, *noise)


def probe(c: float, log_sd: float = 0.1, samples: int = 1000, batches: tuple[int, int] = (8, 128)) -> EfficiencyRatio:
    """What an observation without any error would read."""
    return seen(float(log_ratio(c, NOISE, batches)), log_sd, batches, samples=samples)


def learned(*observations: EfficiencyRatio) -> CriticalRatio:
    ratio = CriticalRatio()
    for observation in observations:
        ratio = ratio.observe(observation)
    return ratio


def width(ratio: CriticalRatio, samples: float) -> float:
    """Of the 95 % interval of ln c."""
    _, low, high = ratio.interval(samples)
    return math.log(high / low)


def test_without_observations_it_is_the_prior_to_the_last_bit() -> None:
    for count in (2, 10, 25):
        prior = LOG_C_MEAN + LOG_C_SD * normal_quantiles(count)
        np.testing.assert_array_equal(CriticalRatio().quantiles(count, 5000), prior)
    median, low, high = CriticalRatio().interval(5000)
    assert median == pytest.approx(2.0)
    assert math.log(high / low) == pytest.approx(PRIOR_WIDTH)


def test_an_observation_that_says_nothing_leaves_the_prior() -> None:
    ratio = learned(seen(-0.5, log_sd=1e6))
    np.testing.assert_allclose(ratio.quantiles(10, 1000), CriticalRatio().quantiles(10, 1000), atol=1e-3)


@pytest.mark.parametrize(
    "observations",
    [
        [seen(-0.4)],
        [seen(-1.5, 0.3, (8, 64), (30.0, 10.0, 200.0))],
        [seen(-0.2, 0.35, (16, 32)), seen(-0.9, 0.2, (64, 16)), seen(-0.9, 0.1, (16, 256), (50.0, 45.0, 90.0))],
    ],
)
def test_the_posterior_is_the_integral(observations: list[EfficiencyRatio]) -> None:
    log_c = LOG_C_MEAN + LOG_C_SD * np.linspace(-4, 4, 20_001)
    density = np.exp(-(((log_c - LOG_C_MEAN) / LOG_C_SD) ** 2) / 2)
    for one in observations:
        likelihood = np.zeros_like(log_c)
        for z in normal_quantiles(10):
            side = one.noise_high if z > 0 else one.noise_low
            noise = one.noise_scale * (side / one.noise_scale) ** (abs(z) / 1.959964)
            deviation = (one.log_ratio - log_ratio(np.exp(log_c), noise, (one.batch_from, one.batch_to))) / one.log_sd
            likelihood += (1 + deviation**2 / 4) ** -2.5
        density *= likelihood
    shares = (np.arange(50) + 0.5) / 50
    expected = np.interp(shares, np.cumsum(density) / density.sum(), log_c)
    np.testing.assert_allclose(learned(*observations).quantiles(50, 1000), expected, atol=2e-3)


@pytest.mark.parametrize("c", [0.4, 1.0, 3.0, 8.0])
def test_a_sharp_probe_narrows_around_the_truth(c: float) -> None:
    ratio = learned(probe(c))
    _, low, high = ratio.interval(1000)
    assert low < c < high
    assert width(ratio, 1000) < 0.65 * PRIOR_WIDTH


def test_more_of_the_same_narrows_further() -> None:
    widths = [width(learned(*[probe(1.5)] * count), 1000) for count in (1, 2, 4, 8)]
    assert widths == sorted(widths, reverse=True)
    assert widths[3] < 0.5 * widths[0]


def test_one_doubling_says_little() -> None:
    """One unit of ln c moves the ratio by at most (sqrt 2 - 1) / (sqrt 2 + 1): see the head of the module."""
    ratio = learned(probe(1.0, log_sd=0.4, batches=(16, 32)))
    assert 0.9 * PRIOR_WIDTH < width(ratio, 1000) < PRIOR_WIDTH


@pytest.mark.parametrize(
    ("batches", "log_sd", "expected"), [((32, 64), 0.3, 0.94), ((32, 128), 0.3, 0.83), ((32, 128), 0.11, 0.51)]
)
def test_what_an_observation_is_worth(batches: tuple[int, int], log_sd: float, expected: float) -> None:
    """The table at the head of the module, with other draws."""
    random, widths = np.random.default_rng(11), []
    for _ in range(300):
        c = math.exp(LOG_C_MEAN + LOG_C_SD * random.standard_normal())
        value = float(log_ratio(c, 32.0, batches)) + log_sd * random.standard_normal()
        widths.append(width(learned(seen(value, log_sd, batches, (32.0, 26.0, 40.0))), 1000))
    assert np.mean(widths) / PRIOR_WIDTH == pytest.approx(expected, abs=0.03)


def test_from_one_batch_to_another_and_back_says_the_same() -> None:
    there, back = seen(-0.7, batches=(8, 64)), seen(0.7, batches=(64, 8))
    np.testing.assert_allclose(learned(there).quantiles(10, 1000), learned(back).quantiles(10, 1000), atol=1e-12)


def test_an_outlier_cannot_overrule_the_others() -> None:
    good = [probe(1.0)] * 3
    before = learned(*good).interval(1000)
    for distance in (1.0, 3.0, 30.0):
        for sign in (-1, 1):
            outlier = good[0]._replace(log_ratio=good[0].log_ratio + sign * distance)
            median, low, high = learned(*good, outlier).interval(1000)
            assert abs(math.log(median / before[0])) < 0.25
            assert low < 1.0 < high


def test_the_further_out_the_less_it_pulls() -> None:
    pulls = []
    for distance in (1.0, 3.0, 30.0):
        far = probe(1.0)._replace(log_ratio=probe(1.0).log_ratio - distance)
        pulls.append(abs(math.log(learned(probe(1.0), far).interval(1000)[0] / learned(probe(1.0)).interval(1000)[0])))
    assert pulls == sorted(pulls, reverse=True)
    assert pulls[-1] < 0.05


@pytest.mark.parametrize("later", [1001, 1500, 10_000, 10**7])
def test_the_drift_is_that_of_ornstein_and_uhlenbeck(later: int) -> None:
    """Of such a process the means of the Hermite polynomials z and z^2 - 1 fade as rho and rho^2."""
    ratio, z = learned(probe(6.0)), (log_c_grid() - LOG_C_MEAN) / LOG_C_SD
    then, now = ratio.probabilities(1000), ratio.probabilities(later)
    rho = (1000 / later) ** DRIFT
    assert now @ z == pytest.approx(rho * (then @ z), abs=2e-3)
    assert now @ z**2 - 1 == pytest.approx(rho**2 * (then @ z**2 - 1), abs=4e-3)
    assert now.sum() == pytest.approx(1.0)
    assert now.min() >= 0.0


def test_an_observation_fades_into_the_prior() -> None:
    ratio = learned(probe(0.5))
    widths = [width(ratio, samples) for samples in (1000, 1200, 2000, 10_000, 10**6, 10**20)]
    assert widths == sorted(widths)
    prior = CriticalRatio().quantiles(10, 0)
    np.testing.assert_allclose(ratio.quantiles(10, 10**20), prior, atol=2e-3)


def test_drifting_twice_is_drifting_once() -> None:
    nothing = seen(-0.5, log_sd=1e9, samples=3000)
    one, other = learned(probe(0.5), nothing), learned(probe(0.5))
    np.testing.assert_allclose(one.quantiles(10, 10_000), other.quantiles(10, 10_000), atol=1e-9)


def test_many_old_observations_say_no_more_of_now_than_c_did_then() -> None:
    ratio = learned(*[probe(1.0)] * MOST_OBSERVATIONS)
    known_then = PRIOR_WIDTH * math.sqrt(1 - TENFOLD**2)
    assert width(ratio, 10_000) > known_then
    assert width(ratio, 10_000) == pytest.approx(known_then, rel=0.1)


def test_in_simulated_worlds_the_interval_holds_c_as_often_as_it_says() -> None:
    """True c from the prior, then drifting; three observations with normal errors; noise scale from its interval."""
    random, worlds, held = np.random.default_rng(1), 400, 0
    for _ in range(worlds):
        ratio, z, samples = CriticalRatio(), random.normal(), 1000
        for batches in ((8, 64), (64, 16), (16, 256)):
            c, noise = math.exp(LOG_C_MEAN + LOG_C_SD * z), NOISE * math.exp(0.2 * random.normal())
            value = float(log_ratio(c, noise, batches)) + 0.1 * random.normal()
            interval = (NOISE, NOISE * math.exp(-0.392), NOISE * math.exp(0.392))
            ratio = ratio.observe(seen(value, 0.1, batches, interval, samples))
            z, samples = 2**-DRIFT * z + math.sqrt(1 - 4**-DRIFT) * random.normal(), 2 * samples
        _, low, high = ratio.interval(samples)
        held += low < math.exp(LOG_C_MEAN + LOG_C_SD * z) < high
    assert 0.92 < held / worlds < 0.985


@pytest.mark.parametrize("value", [120.0, math.inf])
def test_an_open_noise_scale_bounds_c_from_above_only(value: float) -> None:
    """The critical batch is seen, and the noise scale is at least so much."""
    observation = probe(2.0)
    opened = learned(observation._replace(noise_scale=value, noise_low=NOISE, noise_high=math.inf))
    closed = learned(observation)
    assert opened.interval(1000)[2] < 1.1 * closed.interval(1000)[2]
    assert opened.interval(1000)[0] < 0.6 * closed.interval(1000)[0]


def test_an_open_noise_scale_is_normal_in_its_reciprocal() -> None:
    value, low = 120.0, 30.0
    inverse = NormalDist(1 / value, (1 / low - 1 / value) / 1.959964)
    draws = np.array(inverse.samples(200_000, seed=1))
    log_c, one = log_c_grid(), seen(-0.8, noise=(value, low, math.inf))
    noise = 1 / np.quantile(draws[draws > 0], (np.arange(10) + 0.5) / 10)
    deviations = (one.log_ratio - log_ratio(np.exp(log_c)[:, None], noise, (8, 128))) / one.log_sd
    density = np.exp(-(((log_c - LOG_C_MEAN) / LOG_C_SD) ** 2) / 2) * ((1 + deviations**2 / 4) ** -2.5).sum(axis=1)
    np.testing.assert_allclose(learned(one).probabilities(1000), density / density.sum(), atol=3e-4)


@pytest.mark.parametrize(
    "observation",
    [
        seen(math.nan),
        seen(-math.inf),
        seen(-0.5, log_sd=math.nan),
        seen(-0.5, log_sd=0.0),
        seen(-0.5, noise=(30.0, 0.0, math.inf)),
        seen(-0.5, noise=(30.0, math.nan, math.nan)),
    ],
)
def test_what_is_not_known_changes_nothing(observation: EfficiencyRatio) -> None:
    assert CriticalRatio().observe(observation) == CriticalRatio()


def test_the_oldest_goes_when_there_are_too_many() -> None:
    ratio = learned(*(probe(1.0, samples=1000 + k) for k in range(MOST_OBSERVATIONS + 5)))
    assert [one.consumed_samples for one in ratio.observations] == list(range(1005, 1005 + MOST_OBSERVATIONS))


def test_it_goes_through_json_to_the_last_bit() -> None:
    opened = seen(-1 / 3, 0.1 + 0.2, noise=(math.inf, 7 / 3, math.inf))
    ratio = learned(probe(1.7), opened, probe(0.3)._replace(kind=BATCH_CHANGE))
    text = json.dumps(ratio.to_json(), allow_nan=False)
    assert '"noise_high": null' in text
    back = CriticalRatio.from_json(json.loads(text))
    assert back == ratio
    np.testing.assert_array_equal(back.quantiles(10, 3000), ratio.quantiles(10, 3000))


def test_the_posterior_before_anything_was_consumed_is_a_number() -> None:
    assert np.isfinite(learned(probe(1.0, samples=0)).quantiles(10, 0)).all()


ESTIMATE = NoiseEstimate(NOISE, 20.0, 40.0, 1.0, NOISE, 50.0)


def curve(batch: int, critical: float, floor: float = 2.0) -> BranchCurve:
    """Losses that fall by the worth of the samples, on 8 blocks that differ by a constant each."""
    samples = np.linspace(0.0, 4000.0, 41)
    progress = samples / (1 + batch / critical)
    return BranchCurve(batch, samples, (floor + np.exp(-progress / 3000))[:, None] + 0.01 * np.arange(8.0))


def test_two_branches_give_the_ratio_of_their_costs() -> None:
    critical = 50.0
    observation = from_probe(fit_critical_batch([curve(8, critical), curve(64, critical)], 500.0), 9000, ESTIMATE)
    assert observation is not None
    assert observation.log_ratio == pytest.approx(math.log((1 + 8 / critical) / (1 + 64 / critical)), abs=5e-3)
    assert observation.log_sd == pytest.approx(PROBE_LOG_SD, abs=5e-3)
    assert observation[:4] == (PROBE, 9000, 8, 64)
    assert observation[6:] == (NOISE, 20.0, 40.0)


def test_the_spread_of_both_branches_is_in_the_error() -> None:
    fit = CriticalBatchFit(Interval(50.0, 20.0, 90.0), "measured", (8, 64), (1.0, 2.0), spread=0.3)
    observation = from_probe(fit, 9000, ESTIMATE)
    assert observation is not None
    assert observation.log_sd**2 == pytest.approx(2 * 0.3**2 + PROBE_LOG_SD**2)


def test_branches_without_a_common_loss_say_nothing() -> None:
    fit = fit_critical_batch([curve(8, 50.0), curve(64, 50.0, floor=9.0)], 500.0)
    assert fit.outcome == "no overlap"
    assert from_probe(fit, 9000, ESTIMATE) is None
    unknown = CriticalBatchFit(Interval(50.0, 0.0, math.inf), "undetermined", (8, 64), (1.0, 2.0), spread=math.inf)
    assert from_probe(unknown, 9000, ESTIMATE) is None


def test_a_change_of_the_batch_is_an_observation() -> None:
    observation = from_slopes(SlopeRatio(8, 16, -0.2, 0.4), 5000, ESTIMATE)
    assert observation == EfficiencyRatio(BATCH_CHANGE, 5000, 8, 16, -0.2, 0.4, NOISE, 20.0, 40.0)
