"""The variance of single sequences' inner products with a step's mean gradient, against gradients computed one by one.

Two questions are kept apart. Whether every number of a gradient counts once, in its group, in every layout: there each
parameter is its own sketch, so P is exact. And whether sketches leave P unbiased: there it is averaged over seeds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from copus_ext.core.noise.grouping import with_inner_products
from copus_ext.core.plan import Layout, Plan
from tests.ranks.harness import run_ranks
from tests.ranks.test_gradient_noise import (
    BATCH,
    CONTEXT_PARALLEL,
    EXPERTS,
    LAYOUTS,
    LLAMA,
    STILL,
    dense_and_experts,
    expert_positions,
    owners_of_experts,
    per_sequence_gradients,
)

FOUR = [LAYOUTS[name] for name in ("dp4", "dp2", "tp2pp2", "tp2")]
SEQUENCE_PARALLEL = Layout(dp=2, tp=2, sequence_parallel=True)


def measured(flags: str, layouts: list[Layout], seeds: int, whole: bool) -> list[Any]:
    """[layouts][2 x seeds, 3] N, S, P of the same samples and weights in several layouts, in two steps each.

    ``whole``: sketches are as long as what they sketch, and so exact.
    """
    import torch

    from copus_ext.adapters.noise import sketch
    from copus_ext.adapters.noise.gradient_noise import GradientNoise
    from copus_ext.run.switch import put_in_charge
    from tests.ranks.stepping import one_step
    from tests.ranks.steps import build
    from tests.ranks.tiny import raw_arguments, start_upstream

    raw = raw_arguments(flags + STILL)
    _, manager, _ = start_upstream(raw, Plan(layouts[0], 1, BATCH))
    found = []
    for layout in layouts:
        torch.manual_seed(raw.seed)
        job = build(manager, raw, Plan(layout, 1, BATCH))
        put_in_charge(job, manager)
        with mock.patch.object(sketch, "_cut", _in_one_row if whole else sketch._cut):
            collectors = [GradientNoise.of_job(job, seed=seed, inner_products=True).attach() for seed in range(seeds)]
        for _ in range(2):  # overlap starts with the second step
            norm = one_step(job, first_sample=0).grad_norm
            assert not any(collector.step(norm) for collector in collectors), "told before the fourth step"
        for collector in reversed(collectors):
            collector.detach()
        found.append(np.array([estimate for collector in collectors for estimate in collector.flush()]))
    return found


def _in_one_row(tensor: Any) -> Any:
    from copus_ext.adapters.noise.sketch import _Cut

    flat = tensor.view(-1)
    return _Cut(flat.view(1, -1), flat[:0])


def variance_of_groups(gradients: Any, layout: Layout) -> float:
    """P of the step's groups: b / (n - 1) sum_j (<x_j, x> - |x|^2)^2, experts' groups being those of all."""
    owner = owners_of_experts(layout)
    means = np.array([gradients[[o == group for o in owner]].mean(axis=0) for group in sorted(set(owner))])
    whole = gradients.mean(axis=0)
    return float(BATCH / len(means) / (len(means) - 1) * ((means @ whole - whole @ whole) ** 2).sum())


@pytest.mark.parametrize(
    ("flags", "layouts"),
    [
        ("", [*FOUR, SEQUENCE_PARALLEL]),
        (LLAMA, [*FOUR, SEQUENCE_PARALLEL]),
        ("", CONTEXT_PARALLEL),
        (LLAMA + "--calculate-per-token-loss ", CONTEXT_PARALLEL),
        (
            "--overlap-grad-reduce --calculate-per-token-loss",
            [replace(LAYOUTS[name], distributed_optimizer=True) for name in ("dp4", "dp2")],
        ),
        ("--fp16 --initial-loss-scale 1024 --loss-scale-window 1", [LAYOUTS["dp2"]]),
        (EXPERTS, [Layout(dp=4, ep=2), Layout(dp=2, pp=2, ep=2), Layout(dp=2, tp=2, ep=2, sequence_parallel=True)]),
        (EXPERTS, [Layout(dp=2, cp=2, ep=2), Layout(cp=4, ep=4), Layout(dp=2, cp=2, ep=4, distributed_optimizer=True)]),
    ],
    ids=["tied", "untied", "cp, tied", "cp, untied, per token", "overlap, per token", "fp16", "experts", "cp, experts"],
)
def test_every_gradient_counts_once_in_every_layout(flags: str, layouts: list[Layout]) -> None:
    model = LLAMA if LLAMA in flags else EXPERTS if flags == EXPERTS else ""
    gradients, is_expert = per_sequence_gradients(model), run_ranks(1, expert_positions, model)[0]
    everyone = run_ranks(4, measured, flags, layouts, 1, True)
    tolerance = 5e-2 if "16" in flags else 1e-3
    for number, layout in enumerate(layouts):
        found = np.array([rank[number][-1] for rank in everyone])
        assert np.allclose(found, found[0], rtol=1e-6, atol=0), f"{layout}: ranks disagree"
        assert found[0, 2] == pytest.approx(variance_of_groups(gradients, layout), rel=tolerance), str(layout)
        assert found[0, :2] == pytest.approx(dense_and_experts(gradients, is_expert, layout), rel=tolerance)


@pytest.mark.parametrize("flags", ["", LLAMA], ids=["tied", "untied"])
def test_sketches_leave_it_unbiased(flags: str) -> None:
    """Within four standard errors of 80 draws, each of which is below 8 % of P."""
    gradients = per_sequence_gradients(flags)
    found = run_ranks(4, measured, flags, FOUR, 40, False)[0]
    for layout, draws in zip(FOUR, found, strict=True):
        truth = variance_of_groups(gradients, layout)
        error = draws[:, 2].std(ddof=1) / math.sqrt(len(draws))
        assert error < 0.08 * truth, f"{layout}: too noisy to say anything"
        assert abs(draws[:, 2].mean() - truth) < 4 * error, f"{layout}: {draws[:, 2].mean()} +- {error}, not {truth}"


def test_a_step_whose_gradient_is_not_finite_has_none() -> None:
    found = run_ranks(2, measured, "--fp16 --initial-loss-scale 1e30", [Layout(dp=2)], 1, False)
    assert np.isnan(found[0][0]).all()


def test_exact_norms_and_norm_layers_are_refused() -> None:
    assert with_inner_products("auto") == "sketch"
    assert with_inner_products("adam") == "adam"
    for estimator in ("dp-groups", "slices", "layernorm"):
        with pytest.raises(ValueError, match=f"{estimator} gives no inner products of gradients; sketch does"):
            with_inner_products(estimator)
