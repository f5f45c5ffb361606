"""The check of a layout switch: silent where nothing broke, loud where S doubled, and a value that can be saved."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from copus_ext.core.noise.continuity import ContinuityCheck, ContinuityVerdict
from copus_ext.core.noise.student import equivalent_sigma
from tests.unit.gaussian_noise import autocorrelated

STEPS = 20


def scatter(rng: np.random.Generator, switches: int, autocorrelation: float) -> np.ndarray:
    """[switches, 2 STEPS, 2] AR(1) noise of unit variance."""
    return autocorrelated(rng, (2 * STEPS, switches, 2), autocorrelation).swapaxes(0, 1)


def training(
    rng: np.random.Generator, switches: int, autocorrelation: float, sd_n: float = 1.5, sd_s: float = 0.25
) -> np.ndarray:
    """[switches, 2 STEPS, 2] N and S that drift by 1 % a step, and scatter half as much again after the switch."""
    noise = scatter(rng, switches, autocorrelation)
    more = np.where(np.arange(2 * STEPS) < STEPS, 1.0, 1.5)
    drift = np.exp(0.01 * np.arange(2 * STEPS))
    log_sd = np.sqrt(np.log1p((sd_s * more) ** 2))
    n = 3.0 / drift * (1.0 + sd_n * more * noise[..., 0])
    s = 200.0 * drift * np.exp(log_sd * noise[..., 1] - log_sd**2 / 2)
    return np.stack([n, s], axis=-1)


def feed(check: ContinuityCheck, steps: np.ndarray) -> ContinuityCheck:
    for n, s in steps:
        check = check.update(n, s)
    return check


def verdict(steps: np.ndarray, n_factor: float = 1.0, s_factor: float = 1.0) -> ContinuityVerdict:
    """Of a switch in the middle of ``steps``, after which N and S are read wrong by a factor."""
    after = steps[STEPS:] * [n_factor, s_factor]
    found = feed(feed(ContinuityCheck(STEPS), steps[:STEPS]).switched(), after).verdict()
    assert found is not None
    return found


def share_suspect(series: np.ndarray, **factors: float) -> float:
    return float(np.mean([verdict(steps, **factors).suspect for steps in series]))


@pytest.mark.parametrize(("autocorrelation", "most"), [(0.0, 0.01), (0.4, 0.03)])
def test_a_switch_that_broke_nothing_is_seldom_suspect(autocorrelation: float, most: float) -> None:
    series = training(np.random.default_rng(1), 1000, autocorrelation)
    assert share_suspect(series) <= most  # 0.4 % and 1.8 % in the long run


@pytest.mark.parametrize(("factor", "least"), [(2.0, 0.85), (0.5, 0.85), (4.0, 0.99)])
def test_a_wrong_factor_in_s_is_found(factor: float, least: float) -> None:
    noise = scatter(np.random.default_rng(2), 200, 0.0)
    series = np.stack([1.0 + noise[..., 0], 50.0 * np.exp(0.2 * noise[..., 1])], axis=-1)
    assert share_suspect(series, s_factor=factor) >= least


def test_a_wrong_factor_in_n_is_found_only_where_n_is_well_known() -> None:
    rng = np.random.default_rng(3)
    assert share_suspect(training(rng, 100, 0.0, sd_n=0.1), n_factor=2.0) > 0.9
    assert share_suspect(training(rng, 100, 0.0, sd_n=1.5), n_factor=2.0) < 0.1


def test_lines_are_compared_where_they_meet() -> None:
    rng = np.random.default_rng(4)
    drift = np.exp(0.1 * np.arange(2 * STEPS))  # 7 x from end to end, 2.7 x between the middles of the windows
    steps = np.stack([drift, drift], axis=-1) * np.exp(0.05 * rng.standard_normal((2 * STEPS, 2)))
    found = verdict(steps)
    assert abs(found.z_s) < 3
    assert found.s_before == pytest.approx(math.exp(0.1 * (STEPS - 0.5)), rel=0.1)
    assert found.s_after == pytest.approx(found.s_before, rel=0.2)
    assert verdict(steps, s_factor=2.0).z_s > 3 > -3 > verdict(steps, s_factor=0.5).z_s


def test_more_groups_do_not_look_like_a_jump_of_s() -> None:
    rng = np.random.default_rng(5)
    few, many = (rng.chisquare(freedom, (300, STEPS)) / freedom for freedom in (8, 200))  # scatter 0.5 and 0.1
    s = np.concatenate([few, many], axis=1)
    found = [verdict(steps).z_s for steps in np.stack([np.ones_like(s), s], axis=-1)]
    assert abs(np.mean(found)) < 0.25
    assert np.mean(np.abs(found) > 3) < 0.02


def test_values_that_are_not_positive_are_compared_as_they_are() -> None:
    steps = 5.0 + np.random.default_rng(6).standard_normal((2 * STEPS, 2))
    steps[3] = [1.0, 0.0]
    assert not verdict(steps).suspect
    assert verdict(steps, s_factor=-3.0).z_s < -3


def test_what_does_not_scatter_at_all_is_no_error() -> None:
    same = np.full((2 * STEPS, 2), 7.0)
    assert not verdict(same).suspect
    assert verdict(same, s_factor=1.1).suspect


def test_scale_and_unit_do_not_matter() -> None:
    steps = training(np.random.default_rng(7), 1, 0.2)[0]
    small, large = verdict(steps * 1e-9), verdict(steps * 1e9)
    assert small.z_n == pytest.approx(large.z_n, rel=1e-6)
    assert small.z_s == pytest.approx(large.z_s, rel=1e-6)


def test_the_verdict_comes_with_the_last_step_of_the_window_and_goes_with_the_next() -> None:
    steps = training(np.random.default_rng(8), 1, 0.0)[0]
    check = feed(ContinuityCheck(STEPS), steps[:STEPS])
    assert check.verdict() is None
    check = feed(check.switched(), steps[STEPS:-1])
    assert check.verdict() is None
    check = feed(check, steps[-1:])
    assert check.verdict() is not None
    assert feed(check, steps[:1]).verdict() is None


def test_only_the_last_window_before_a_switch_counts() -> None:
    steps = training(np.random.default_rng(9), 1, 0.0)[0]
    late = feed(ContinuityCheck(STEPS), np.full((50, 2), 1e6))
    assert feed(feed(late, steps[:STEPS]).switched(), steps[STEPS:]).verdict() == verdict(steps)


def test_steps_that_are_not_finite_are_left_out() -> None:
    steps = training(np.random.default_rng(10), 1, 0.0)[0]
    spoilt = np.insert(steps, [5, 30, 30], [[math.nan, 1.0], [1.0, math.inf], [math.nan, math.nan]], axis=0)
    check = feed(feed(ContinuityCheck(STEPS), spoilt[: STEPS + 1]).switched(), spoilt[STEPS + 1 :])
    assert check.verdict() == verdict(steps)


def test_a_batch_or_learning_rate_change_cancels_the_check() -> None:
    steps = training(np.random.default_rng(11), 1, 0.0)[0]
    half_way = feed(feed(ContinuityCheck(STEPS), steps[:STEPS]).switched(), steps[:15])
    assert half_way.cancelled() == ContinuityCheck(STEPS)
    assert feed(half_way.cancelled(), steps[:STEPS]).verdict() is None


def test_another_switch_gives_the_first_check_up_and_starts_its_own() -> None:
    steps = training(np.random.default_rng(12), 1, 0.0)[0]
    first = feed(ContinuityCheck(STEPS), np.full((STEPS, 2), 1e6)).switched()
    second = feed(first, steps[STEPS - 12 : STEPS]).switched()
    found = feed(second, steps[STEPS:]).verdict()
    assert found is not None
    assert not found.suspect  # what came before the first switch would have been
    too_few = feed(first, steps[:9]).switched()
    assert feed(too_few, steps[STEPS:]).verdict() is None


def test_a_completed_check_is_what_precedes_the_next_switch() -> None:
    steps = training(np.random.default_rng(13), 1, 0.0)[0]
    complete = feed(feed(ContinuityCheck(STEPS), np.full((STEPS, 2), 1e6)).switched(), steps[:STEPS])
    assert feed(complete.switched(), steps[STEPS:]).verdict() == verdict(steps)


def test_a_window_too_short_for_a_line_is_refused() -> None:
    with pytest.raises(ValueError, match="window of 5 steps"):
        ContinuityCheck(window=5)


@pytest.mark.parametrize("seen", [7, STEPS, STEPS + 7, 2 * STEPS])
def test_saved_and_loaded_it_goes_on_to_the_last_bit(seen: int) -> None:
    steps = training(np.random.default_rng(14), 1, 0.3)[0] / 3
    check = feed(ContinuityCheck(STEPS), steps[: min(seen, STEPS)])
    if seen >= STEPS:
        check = feed(check.switched(), steps[STEPS:seen])
    loaded = ContinuityCheck.from_json(json.loads(json.dumps(check.to_json())))
    assert loaded == check
    assert feed(loaded, steps[seen:]).verdict() == feed(check, steps[seen:]).verdict()


def test_a_verdict_is_plain_values() -> None:
    found = verdict(training(np.random.default_rng(15), 1, 0.0)[0])
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    assert set(found.to_json()) == set("z_n z_s suspect n_before n_after s_before s_after".split())


# Two-sided probabilities 0.05, 0.01, 0.001 of the normal distribution, and Student's points for them.
@pytest.mark.parametrize(
    ("t", "freedom", "sigma"),
    [
        (3.182, 3, 1.960),
        (2.228, 10, 1.960),
        (5.841, 3, 2.576),
        (3.169, 10, 2.576),
        (4.587, 10, 3.291),
        (3.460, 60, 3.291),
    ],
)
def test_a_t_is_worth_the_sigma_of_the_tables(t: float, freedom: int, sigma: float) -> None:
    assert equivalent_sigma(t, freedom) == pytest.approx(sigma, rel=0.015)
    assert equivalent_sigma(-t, freedom) == -equivalent_sigma(t, freedom)
