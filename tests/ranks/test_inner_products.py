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

from copus_ext.core.noise.grouping import StepShape, grouping_of, with_inner_products
from copus_ext.core.plan import Layout, Plan
from tests.ranks.harness import run_ranks
from tests.ranks.test_gradient_noise import (
    BATCH,
    EXPERTS,
    LAYOUTS,
    LLAMA,
    STILL,
    expected_step,
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
    plan = Plan(layout, 1, BATCH)
    window = plan.num_microbatches // grouping_of(StepShape.of(plan), "sketch").slices
    owner = [(s % layout.dp // layout.ep, s // layout.dp // window) for s in range(BATCH)]
    means = np.array([gradients[[o == group for o in owner]].mean(axis=0) for group in sorted(set(owner))])
    whole = gradients.mean(axis=0)
    return float(BATCH / len(means) / (len(means) - 1) * ((means @ whole - whole @ whole) ** 2).sum())


@pytest.mark.parametrize(
    ("flags", "layouts"),
    [
        ("", [*FOUR, SEQUENCE_PARALLEL]),
        (LLAMA, [*FOUR, SEQUENCE_PARALLEL]),
        (
            "--overlap-grad-reduce --calculate-per-token-loss",
            [replace(LAYOUTS[name], distributed_optimizer=True) for name in ("dp4", "dp2")],
        ),
        ("--fp16 --initial-loss-scale 1024 --loss-scale-window 1", [LAYOUTS["dp2"]]),
        (EXPERTS, [Layout(dp=4, ep=2), Layout(dp=2, pp=2, ep=2), Layout(dp=2, tp=2, ep=2, sequence_parallel=True)]),
    ],
    ids=["tied", "untied", "overlap, per token", "fp16", "experts"],
)
def test_every_gradient_counts_once_in_every_layout(flags: str, layouts: list[Layout]) -> None:
    gradients = per_sequence_gradients("" if "--fp16" in flags or "--overlap" in flags else flags)
    everyone = run_ranks(4, measured, flags, layouts, 1, True)
    tolerance = 5e-2 if "16" in flags else 1e-3
    for number, layout in enumerate(layouts):
        found = np.array([rank[number][-1] for rank in everyone])
        assert np.allclose(found, found[0], rtol=1e-6, atol=0), f"{layout}: ranks disagree"
        assert found[0, 2] == pytest.approx(variance_of_groups(gradients, layout), rel=tolerance), str(layout)
        if layout.ep == 1:
            assert found[0, :2] == pytest.approx(expected_step(gradients, layout, 1, "sketch"), rel=tolerance)


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


def parts_on_context_parallel_ranks() -> Any:
    """Products and squares over 2 data-parallel x 2 context-parallel ranks that hold parts of each group's features."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist

    from copus_ext.adapters.noise.inner_products import DRAWS, InnerProducts
    from copus_ext.adapters.noise.parameters import Kind
    from copus_ext.adapters.noise.sums import ORDER

    rank = dist.get_rank()

    def group_of(lists: list[list[int]]) -> Any:
        return next(group for ranks, group in [(r, dist.new_group(r)) for r in lists] if rank in ranks)

    cp, dp = group_of([[0, 1], [2, 3]]), group_of([[0, 2], [1, 3]])
    one, world = group_of([[0], [1], [2], [3]]), group_of([[0, 1, 2, 3]])
    groups: Any = SimpleNamespace(cp=cp, dp=dp, dp_cp=world, expt_dp=world, ep=one, tp=one, embd=one)
    sums = InnerProducts({kind: slice(3, 3) for kind in ORDER} | {Kind.OWN: slice(0, 3)}, groups)
    features = torch.arange(12.0).reshape(2, 2, 3)[rank // 2]  # [dp][slices, length]
    sums.add(features.repeat_interleave(DRAWS, 0) * (0.25 if rank % 2 else 0.75))
    squares, products = sums.reduce()
    assert products is not None
    return squares.numpy(), products.numpy()


def test_parts_on_context_parallel_ranks_are_added_up_first() -> None:
    features = np.arange(12.0).reshape(4, 3)
    total = features.sum(axis=0)
    for squares, products in run_ranks(4, parts_on_context_parallel_ranks):
        assert squares[0] == pytest.approx(np.array([[(features**2).sum(), total @ total], [0.0, 0.0]]))
        for draw in products[0]:
            assert sorted(draw) == pytest.approx(sorted(features @ total))


def test_exact_norms_and_norm_layers_are_refused() -> None:
    assert with_inner_products("auto") == "sketch"
    assert with_inner_products("adam") == "adam"
    for estimator in ("dp-groups", "slices", "layernorm"):
        with pytest.raises(ValueError, match=f"{estimator} gives no inner products of gradients; sketch does"):
            with_inner_products(estimator)
