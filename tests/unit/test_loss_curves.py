"""Loss curves turned round: samples that each branch needs to come to the same losses."""

from __future__ import annotations

import numpy as np
import pytest

from copus_ext.core.efficiency.loss_curves import (
    BranchCurve,
    compare,
    cost_after_settling,
    cost_from_branch,
    falling,
    samples_to_reach,
)

SAMPLES = np.array([0.0, 10.0, 20.0, 30.0])


def curve(batch: int, *losses: float) -> BranchCurve:
    return BranchCurve(batch, SAMPLES, np.array(losses)[:, None])


def test_what_rises_is_pooled_with_what_it_rises_from() -> None:
    assert falling(np.array([3.0, 2.0, 2.5, 1.0])) == pytest.approx([3.0, 2.25, 2.25, 1.0])
    assert falling(np.array([1.0, 2.0, 3.0])) == pytest.approx([2.0, 2.0, 2.0])
    assert falling(np.array([3.0, 2.0, 1.0])) == pytest.approx([3.0, 2.0, 1.0])


def test_targets_are_found_between_points_and_missed_below_the_end() -> None:
    reached = samples_to_reach(SAMPLES, np.array([4.0, 3.0, 3.0, 1.0]), np.array([4.0, 3.5, 3.0, 1.5, 0.9]))
    assert reached[:4] == pytest.approx([0.0, 5.0, 10.0, 27.5])
    assert np.isnan(reached[4])


def test_targets_are_losses_that_all_have_after_settling() -> None:
    fast, slow = curve(1, 4.0, 3.0, 2.0, 1.0), curve(2, 4.0, 3.5, 3.0, 2.5)
    used, reached = compare([fast, slow], settle=5.0)
    assert used == (fast, slow)
    assert reached[0] == pytest.approx(reached[1] / 2), "in steps from where both have settled"
    assert reached[0][0] > 5.0
    assert reached[1][-1] == pytest.approx(30.0), "to where the slower one ends"
    assert bool((np.diff(reached) > 0).all())


def test_a_branch_that_never_came_as_low_is_left_out() -> None:
    stuck = curve(3, 4.0, 3.9, 3.8, 3.7)
    used, _ = compare([curve(1, 4.0, 3.0, 2.0, 1.0), curve(2, 4.0, 3.5, 3.0, 2.5), stuck], settle=5.0)
    assert [c.batch for c in used] == [1, 2]


def test_samples_lost_at_the_start_cancel_where_only_what_comes_behind_is_counted() -> None:
    plain, late = np.array([[10.0, 20.0, 30.0, 40.0]]), np.array([[17.0, 27.0, 37.0, 47.0]])
    assert cost_after_settling(late) == pytest.approx(cost_after_settling(plain))
    assert cost_from_branch(late)[0] > cost_from_branch(plain)[0]
    assert cost_after_settling(2 * plain) - cost_after_settling(plain) == pytest.approx([np.log(2)])


def test_blocks_choose_the_sequences_that_are_averaged() -> None:
    two = BranchCurve(1, SAMPLES, np.array([[4.0, 8.0], [3.0, 6.0], [2.0, 4.0], [1.0, 2.0]]))
    steady = BranchCurve(2, SAMPLES, np.array([[4.0, 4.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]))
    _, first = compare([two, steady], 1.0, np.array([0, 0]))
    assert first[0] == pytest.approx(first[1])
    _, second = compare([two, steady], 1.0, np.array([1, 1]))
    assert bool((second[0] > second[1]).all())
