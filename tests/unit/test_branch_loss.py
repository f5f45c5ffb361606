"""Branches at equally many samples, and the ratio of critical batch to noise scale."""

from __future__ import annotations

import math

import numpy as np
import pytest

from copus_ext.core.efficiency.branch_loss import Excess, end_losses, excess_losses, ratio_to_noise, tolerance_batch
from copus_ext.core.efficiency.critical_batch import Interval
from copus_ext.core.efficiency.loss_curves import BranchCurve

LEVELS = np.array([1.0, 2.0, 3.0, 4.0])  # of four validation blocks: far apart, and the same in every branch
UNKNOWN = (math.nan,) * 3


def branch(batch: int, *means: float, wobble: float = 0.0) -> BranchCurve:
    sides = np.array([1.0, -1.0, 1.0, -1.0])
    losses = np.array(means, dtype=np.float64)[:, None] + LEVELS + wobble * sides
    return BranchCurve(batch, np.arange(len(means), dtype=np.float64) * 10, losses)


def test_the_end_is_the_mean_of_the_last_quarter_and_of_two_points_at_least() -> None:
    assert end_losses(branch(8, 9.0, 9.0, 9.0, 2.0, 1.0)) == pytest.approx(1.5 + LEVELS)
    assert end_losses(branch(8, *[9.0] * 10, 3.0, 2.0, 1.0)) == pytest.approx(2.0 + LEVELS)
    assert end_losses(branch(8, 9.0, 1.0)) == pytest.approx(1.0 + LEVELS), "the snapshot itself is no part of it"


def test_the_level_of_the_validation_sequences_cancels() -> None:
    own, other = branch(8, 5.0, 4.0, 4.0), branch(16, 5.0, 4.02, 4.02)
    excess = excess_losses([other, own], base_batch=8)
    assert [e.batch for e in excess] == [8, 16]
    assert excess[0][1:] == (0.0, 0.0, 0.0)
    assert excess[1][1:] == pytest.approx((0.02, 0.02, 0.02))


def test_blocks_that_disagree_widen_the_interval() -> None:
    _, other = excess_losses([branch(8, 5.0, 4.0, 4.0), branch(16, 5.0, 4.02, 4.02, wobble=0.1)], base_batch=8)
    assert other.value == pytest.approx(0.02)
    assert other.low < -0.03
    assert other.high > 0.07


def test_tolerance_worked_out_by_hand() -> None:
    excesses = [
        Excess(4, -0.5, -0.6, -0.4),  # smaller than the run's own: no part of it
        Excess(8, 0.0, 0.0, 0.0),
        Excess(16, 0.004, 0.002, 0.006),  # surely within
        Excess(32, 0.008, 0.004, 0.012),  # within, and not surely
        Excess(64, 0.03, 0.02, 0.04),  # surely beyond
        Excess(128, 0.0, -0.1, 0.1),  # within by luck: 64 is not
    ]
    assert tolerance_batch(excesses, 8, 0.01) == (32, 16, 64)
    assert tolerance_batch(excesses, 8, 0.001) == (8, 8, 16)
    assert tolerance_batch(excesses, 8, 0.5) == (128, 128, None)


def test_errors_of_both_widen_the_ratio() -> None:
    """A factor of 2 either way on both makes 2^sqrt(2) of them."""
    ratio = ratio_to_noise(Interval(40.0, 20.0, 80.0), Interval(10.0, 5.0, 20.0))
    assert ratio.value == pytest.approx(4.0)
    assert ratio.low == pytest.approx(4.0 / 2 ** math.sqrt(2))
    assert ratio.high == pytest.approx(4.0 * 2 ** math.sqrt(2))


def test_open_ends_stay_open_and_unknown_stays_unknown() -> None:
    noise = Interval(10.0, 5.0, 20.0)
    assert ratio_to_noise(Interval(40.0, 20.0, math.inf), noise) == (4.0, 1.0, math.inf)
    assert ratio_to_noise(Interval(math.inf, 20.0, math.inf), noise) == (math.inf, 1.0, math.inf)
    assert ratio_to_noise(Interval(40.0, 20.0, 80.0), Interval(10.0, 5.0, math.inf)) == (4.0, 0.0, 16.0)
    assert ratio_to_noise(Interval(40.0, 0.0, 80.0), noise) == (4.0, 0.0, 16.0)
    assert ratio_to_noise(Interval(40.0, 20.0, 80.0), Interval(10.0, 0.0, 20.0)) == (4.0, 1.0, math.inf)
    assert all(map(math.isnan, ratio_to_noise(Interval(*UNKNOWN), noise)))
    assert all(map(math.isnan, ratio_to_noise(Interval(40.0, 20.0, 80.0), Interval(*UNKNOWN))))
