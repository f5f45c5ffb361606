"""The noise scale of a step against gradients of single sequences, computed one by one; and across layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from copus_ext.core.grouping import slices_per_rank
from copus_ext.core.noise_scale import step_estimate
from copus_ext.core.plan import Layout, Plan
from tests.ranks.harness import run_ranks

BATCH = 8
STILL = " --lr 1e-9 --min-lr 1e-9"  # steps that leave the weights where they are
LAYOUTS = {
    "dp4": Layout(dp=4),
    "dp2": Layout(dp=2, pp=2),
    "tp2": Layout(dp=2, tp=2),
    "tp2pp2": Layout(tp=2, pp=2),
    "pp4": Layout(pp=4),
    "vpp2": Layout(dp=2, pp=2, vpp=2),
}


def per_sequence_gradients(flags: str) -> Any:
    """[BATCH, parameters] float64: the gradient of each sequence's mean loss, by one process and plain autograd."""
    import torch

    from copus_ext.adapters.job import build_job
    from tests.ranks.tiny import random_batches, raw_arguments, start_upstream

    plan = Plan(Layout(), 1, BATCH)
    args, _, groups = start_upstream(raw_arguments(flags), plan)
    model: Any = build_job(plan, args, groups).model[0].module
    rows = []
    for batch in random_batches(BATCH, 1, args.seq_length, args.padded_vocab_size):
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        params = list(model.parameters())
        gradients = torch.autograd.grad(losses.float().mean(), params)
        rows.append(torch.cat([g.reshape(-1).double() for g in gradients]).numpy())
    return np.array(rows)


def measured_step(flags: str, layout: Layout, micro_batch: int) -> tuple[float, float]:
    """N and S that the collector reads from one real step under ``layout``."""
    from copus_ext.adapters.gradient_noise import GradientNoise
    from copus_ext.adapters.job import build_job
    from tests.ranks.stepping import one_step
    from tests.ranks.tiny import raw_arguments, start_upstream

    plan = Plan(layout, micro_batch, BATCH)
    args, _, groups = start_upstream(raw_arguments(flags + STILL), plan)
    job = build_job(plan, args, groups)
    collector = GradientNoise(job).attach()
    collector.collect(one_step(job, first_sample=0).grad_norm)  # overlapped reduction starts with the second step only
    result = one_step(job, first_sample=0)
    estimate = collector.collect(result.grad_norm)
    collector.detach()
    return estimate.N, estimate.S


def expected_step(gradients: Any, layout: Layout, micro_batch: int) -> tuple[float, float]:
    """N and S of the same grouping of the same sequences, from their single gradients."""
    plan = Plan(layout, micro_batch, BATCH)
    slices = slices_per_rank(plan)
    window = plan.num_microbatches // slices
    owner = [
        ((s // micro_batch) % layout.dp, s // (micro_batch * layout.dp) // window) for s in range(BATCH)
    ]  # upstream's sampler deals micro-batches round the data-parallel ranks
    means = [gradients[[o == group for o in owner]].mean(axis=0) for group in sorted(set(owner))]
    sizes = [BATCH / len(means)] * len(means)
    whole = gradients.mean(axis=0)
    estimate = step_estimate([float(m @ m) for m in means], sizes, float(whole @ whole))
    return estimate.N, estimate.S


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--untie-embeddings-and-output-weights --swiglu --group-query-attention "
        "--num-query-groups 4 --normalization RMSNorm --disable-bias-linear",
    ],
)
def test_n_and_s_are_those_of_single_sequence_gradients(flags: str) -> None:
    gradients = run_ranks(1, per_sequence_gradients, flags)[0]
    for name, layout in LAYOUTS.items():
        measured = run_ranks(4, measured_step, flags, layout, 1)
        assert all(value == pytest.approx(measured[0], rel=1e-9) for value in measured), "ranks disagree"
        assert measured[0] == pytest.approx(expected_step(gradients, layout, 1), rel=1e-3), name


@pytest.mark.parametrize(
    ("flags", "zero1"),
    [
        ("--overlap-grad-reduce --overlap-param-gather", True),
        ("--overlap-grad-reduce", False),
        ("--calculate-per-token-loss", False),
        ("--clip-grad 0", False),
        ("--bf16", True),
        ("--fp16 --initial-loss-scale 1024 --loss-scale-window 1", False),  # the scale doubles behind every step
    ],
)
def test_reduction_and_normalisation_flags_do_not_change_n_and_s(flags: str, zero1: bool) -> None:
    gradients = run_ranks(1, per_sequence_gradients, "")[0]
    for layout in (LAYOUTS["dp4"], LAYOUTS["dp2"]):
        measured = run_ranks(4, measured_step, flags, replace(layout, distributed_optimizer=zero1), 1)[0]
        tolerance = 5e-2 if "16" in flags else 1e-3
        assert measured == pytest.approx(expected_step(gradients, layout, 1), rel=tolerance)
