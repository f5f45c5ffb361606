"""The worth of a sequence from training losses: against losses that follow the law, with noise and without."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import numpy as np
import pytest

from copus_ext.core.efficiency.critical_ratio import CriticalRatio, from_slopes
from copus_ext.core.efficiency.goodput import LOG_C_MEAN, LOG_C_SD, statistical_efficiency
from copus_ext.core.efficiency.loss_trend import (
    LEAST_STEPS,
    SYSTEMATIC,
    UNSETTLED_STEPS,
    LossTrend,
    SlopeRatio,
    Stretch,
)
from copus_ext.core.noise.noise_scale import NoiseEstimate
from tests.unit.gaussian_noise import autocorrelated

CRITICAL = 64.0
Steps = list[tuple[float, int, int]]  # loss, batch, consumed samples


def training(
    segments: list[tuple[int, int]], critical: float = CRITICAL, noise: np.ndarray | float = 0.0, start: int = 2000
) -> list[Steps]:
    """Steps of dL/dE = -k SE(B) E^-1.3 by segments of (batch, steps): from 4 nats, 1 of them in 20,000 sequences.

    ``noise``: standard normal deviates of the steps; times 0.5 / sqrt(batch) nats they are the losses' scatter.
    """
    total = sum(steps for _, steps in segments)
    deviates = iter(np.broadcast_to(noise, total))
    scale = 1.0 / (2000**-0.3 - 22_000**-0.3) / statistical_efficiency(segments[0][0], critical)
    loss, consumed, result = 4.0, start, []
    for batch, steps in segments:
        rows: Steps = []
        for _ in range(steps):
            read = loss + 0.5 / math.sqrt(batch) * float(next(deviates))
            loss -= scale * statistical_efficiency(batch, critical) * (consumed**-0.3 - (consumed + batch) ** -0.3)
            consumed += batch
            rows.append((read, batch, consumed))
        result.append(rows)
    return result


def feed(trend: LossTrend, steps: Steps) -> LossTrend:
    for loss, batch, consumed in steps:
        trend = trend.step(loss, batch, consumed)
    return trend


def told(segments: list[Steps]) -> Iterator[tuple[SlopeRatio, int]]:
    """Every observation with the samples consumed at it."""
    trend, consumed = LossTrend(), 0
    for number, steps in enumerate(segments):
        if number > 0:
            trend = trend.batch_changed()
            if (ratio := trend.observation()) is not None:
                yield ratio, consumed
        for loss, batch, consumed in steps:
            trend = trend.step(loss, batch, consumed)
            if (ratio := trend.observation()) is not None:
                yield ratio, consumed


def only(segments: list[Steps]) -> SlopeRatio:
    ((ratio, _),) = told(segments)
    return ratio


def truth(one: int, other: int, critical: float = CRITICAL) -> float:
    return math.log((1 + one / critical) / (1 + other / critical))


@pytest.mark.parametrize(("one", "other", "steps"), [(8, 16, 1250), (16, 128, 600), (64, 16, 100)])
def test_losses_that_follow_the_law_give_the_ratio(one: int, other: int, steps: int) -> None:
    after = max(steps * one // other + UNSETTLED_STEPS, LEAST_STEPS + UNSETTLED_STEPS) + 2
    ratio = only(training([(one, steps), (other, after)]))
    assert ratio[:2] == (one, other)
    assert ratio.log_ratio == pytest.approx(truth(one, other), abs=1e-3)
    assert SYSTEMATIC < ratio.log_sd < 1.2 * SYSTEMATIC


def test_it_is_the_least_squares_of_all_steps_though_few_points_are_kept() -> None:
    noise = np.random.default_rng(1).standard_normal(3000)
    segments = training([(8, 2000), (16, 1000)], noise=noise)
    ratio = only(segments)
    slopes = []
    before, after = np.array(segments[0]), np.array(segments[1])[UNSETTLED_STEPS:]
    frozen = feed(LossTrend(), segments[0]).batch_changed().before
    assert frozen is not None
    trend = feed(LossTrend(), segments[0]).batch_changed()
    after = after[: math.ceil(trend.length / 16)]
    for losses, batches, consumed in (before[-frozen.steps :].T, after.T):
        slopes.append(np.polyfit((consumed - batches) ** -0.3, losses, 1)[0])
    assert ratio.log_ratio == pytest.approx(math.log(slopes[1] / slopes[0]), abs=1e-3)


def test_memory_is_bounded_and_merging_keeps_means() -> None:
    random = np.random.default_rng(2)
    losses = random.standard_normal(5000)
    stretch = Stretch()
    for k, loss in enumerate(losses):
        stretch = stretch.add(float(loss), 4, 4.0 * k)
        assert len(stretch.points) <= 256
    steps, positions, means = np.array(stretch.points).T
    assert steps.sum() == stretch.steps == 5000
    assert steps @ means == pytest.approx(losses.sum(), abs=1e-9)
    assert steps @ positions == pytest.approx(4.0 * np.arange(5000).sum())


def test_what_came_before_goes_back_to_half_of_the_samples() -> None:
    ((rows),) = training([(8, 3000)], start=100)
    before = feed(LossTrend(), rows).batch_changed().before
    assert before is not None
    end = rows[-1][2]
    assert min(point.position for point in before.points) == pytest.approx(end / 2, rel=0.02)


def test_where_losses_do_not_scatter_it_is_told_after_a_quarter_of_what_came_before() -> None:
    segments = training([(16, 300), (32, 400)], start=10_000)
    ((_, consumed),) = told(segments)
    assert consumed == segments[0][-1][2] + (UNSETTLED_STEPS + math.ceil(300 / 4 / 2)) * 32


def test_where_they_scatter_it_waits_but_not_for_more_than_as_long_a_stretch_of_log_samples() -> None:
    waits = []
    for scatter in (0.1, 0.4, 1.0, 4.0):
        noise = scatter * np.random.default_rng(7).standard_normal(300)
        ((rows),) = training([(16, 300)], noise=noise, start=10_000)
        waits.append(feed(LossTrend(), rows).batch_changed().length)
    assert waits == sorted(waits)
    assert waits[1] > 1.5 * waits[0]
    assert waits[-1] == pytest.approx(14_800 * (14_800 / 10_000 - 1), rel=0.01)


def test_the_length_does_not_depend_on_what_comes_after_the_change() -> None:
    random = np.random.default_rng(8)
    before = training([(16, 300)], noise=random.standard_normal(300))[0]
    changed = feed(LossTrend(), before).batch_changed()
    for slope in (-1.0, 0.0, 1.0):
        after = [(3.5 + slope * k / 100, 32, 6800 + 32 * (k + 1)) for k in range(60)]
        assert feed(changed, after).length == changed.length


def test_the_next_change_tells_what_there_is() -> None:
    short = UNSETTLED_STEPS + 20
    segments = training([(16, 300), (32, short), (64, short - 4), (32, 1)])
    (first, at_first), (second, at_second) = told(segments)
    assert first[:2] == (16, 32)
    assert at_first == segments[1][-1][2]
    assert first.log_ratio == pytest.approx(truth(16, 32), abs=1e-3)
    assert second[:2] == (32, 64)
    assert at_second == segments[2][-1][2]


def test_a_stretch_that_is_too_short_is_passed_over() -> None:
    short = UNSETTLED_STEPS + LEAST_STEPS - 1
    segments = training([(16, 300), (32, short), (64, 100)])
    assert only(segments)[:2] == (16, 64)
    assert list(told(training([(16, LEAST_STEPS - 1), (32, 300)]))) == []


def test_the_steps_right_after_a_change_do_not_count() -> None:
    segments = training([(16, 300), (32, 170)])
    upset = [(99.0, batch, consumed) for _, batch, consumed in segments[1][:UNSETTLED_STEPS]]
    assert only([segments[0], upset + segments[1][UNSETTLED_STEPS:]]) == only(segments)


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_loss_that_says_nothing_is_ignored(loss: float | None) -> None:
    segments = training([(16, 300), (32, 400)])
    trend = feed(LossTrend(), segments[0])
    assert trend.step(loss, 16, 20_000) == trend
    trend = trend.batch_changed()
    while trend.observation() is None:
        trend = feed(trend, [segments[1].pop(0)])
    assert trend.step(loss, 32, 20_000).observation() is None  # told once


def test_where_losses_do_not_clearly_fall_nothing_is_told() -> None:
    noise = 100.0 * np.random.default_rng(3).standard_normal(700)
    assert list(told(training([(16, 300), (32, 400)], noise=noise))) == []
    rising = [[(-loss, batch, consumed) for loss, batch, consumed in rows] for rows in training([(16, 300), (32, 400)])]
    assert list(told(rising)) == []


@pytest.mark.parametrize("autocorrelation", [0.0, 0.4, 0.6])
def test_the_error_is_what_losses_scatter_by_or_somewhat_more(autocorrelation: float) -> None:
    """In units of what log_sd has beside the systematic part."""
    noise = 0.4 * (1 - autocorrelation) * autocorrelated(np.random.default_rng(4), (640, 200), autocorrelation).T
    deviations = []
    for row in noise:
        ratio = only(training([(32, 400), (64, 240)], noise=row))
        scatter = math.sqrt(ratio.log_sd**2 - SYSTEMATIC**2)
        deviations.append((ratio.log_ratio - truth(32, 64)) / scatter)
    assert 0.5 < float(np.sqrt(np.mean(np.square(deviations)))) < 1.0


@pytest.mark.parametrize("factor", [2, 4])
def test_in_simulated_runs_the_interval_of_c_holds_it(factor: int) -> None:
    """True c from the prior, scatter of 0.5 nats / sqrt(batch), three changes; where none is told the prior stays."""
    random, worlds, held = np.random.default_rng(5), 100, 0
    noise_scale = NoiseEstimate(32.0, 26.0, 40.0, 1.0, 32.0, 50.0)
    few, many = 32, 32 * factor
    for _ in range(worlds):
        c = math.exp(LOG_C_MEAN + LOG_C_SD * random.standard_normal())
        plan = [(few, 150), (many, 150), (few, 150), (many, 150)]
        segments = training(plan, c * 32.0, random.standard_normal(600))
        ratio, last = CriticalRatio(), segments[-1][-1][2]
        for observation, consumed in told(segments):
            ratio = ratio.observe(from_slopes(observation, consumed, noise_scale))
        _, low, high = ratio.interval(last)
        held += low < c < high
    assert 0.9 <= held / worlds <= 0.99


def test_it_goes_through_json_to_the_last_bit_and_goes_on_the_same() -> None:
    noise = 0.5 * np.random.default_rng(6).standard_normal(1000)
    segments = training([(16, 600), (32, 400)], noise=noise)
    trend = feed(feed(LossTrend(), segments[0]).batch_changed(), segments[1][:100])
    back = LossTrend.from_json(json.loads(json.dumps(trend.to_json(), allow_nan=False)))
    assert back == trend
    rest = iter(segments[1][100:])
    while trend.observation() is None:
        step = [next(rest)]
        trend, back = feed(trend, step), feed(back, step)
    assert back.observation() == trend.observation()
    assert LossTrend.from_json(json.loads(json.dumps(trend.to_json()))) == trend
