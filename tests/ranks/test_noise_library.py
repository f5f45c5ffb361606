"""The noise scale in somebody's own Megatron-Core loop: the example under ``examples/``, as it is."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.ranks.harness import run_ranks

STEPS = 10


def trained(tp: int, pp: int, estimators: list[str]) -> list[Any]:
    """Losses, noise scale and lines of the example's loop, by estimator, in one process."""
    from megatron.core import parallel_state

    from examples.noise_scale_in_your_loop import train

    found = []
    for estimator in estimators:
        parallel_state.destroy_model_parallel()
        lines: list[str] = []
        found.append((*train(tp, pp, STEPS, estimator, lines.append), lines))
    return found


def test_the_example_measures_alike_by_every_estimator_and_disturbs_nothing() -> None:
    everyone = run_ranks(4, trained, 2, 2, ["slices", "sketch"])
    (losses, exact, lines), (others, sketched, _) = everyone[-1]
    assert losses == others, "measuring must not change the training"
    assert losses[-1] < losses[0] - 1.0
    averages = [[estimate.N, estimate.S] for estimate in (exact, sketched)]
    assert averages[0] == pytest.approx(averages[1], rel=0.3)
    assert len(lines) == 1
    assert re.match(r"step   10 \| loss here [0-9.]+ \| noise scale [0-9.]+ \[", lines[0])
    for rank in everyone:
        assert [estimate.S for _, estimate, _ in rank] == pytest.approx([e.S for _, e, _ in everyone[-1]], rel=1e-6)


def test_data_parallel_ranks_are_the_groups_of_a_loop_without_layout() -> None:
    (losses, exact, _), (others, sliced, _) = run_ranks(2, trained, 1, 1, ["dp-groups", "slices"])[0]
    assert losses == others
    squares = [estimate.N + estimate.S / 16 for estimate in (exact, sliced)]
    assert squares[0] == pytest.approx(squares[1], rel=1e-4), "|mean gradient|^2 of 16 sequences in both"
    assert sliced != exact, "four groups and two"
