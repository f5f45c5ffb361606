"""The noise scale of a step against gradients of single sequences, computed one by one; and across layouts."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from copus_ext.core.noise.grouping import StepShape, grouping_of
from copus_ext.core.noise.noise_scale import step_estimate
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
CONTEXT_PARALLEL = [
    Layout(dp=2, cp=2),
    Layout(cp=4),
    Layout(cp=2, pp=2, distributed_optimizer=True),
    Layout(cp=2, tp=2, sequence_parallel=True),
]
LLAMA = (
    "--untie-embeddings-and-output-weights --swiglu --group-query-attention --num-query-groups 4 "
    "--normalization RMSNorm --disable-bias-linear "
)
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-token-dispatcher-type allgather "
    "--moe-router-load-balancing-type none --disable-bias-linear "
)

Pair = tuple[float, float]


@functools.cache
def per_sequence_gradients(flags: str) -> Any:
    """[BATCH, parameters] float64: the gradient of each sequence's mean loss, by one process and plain autograd."""
    return run_ranks(1, _per_sequence_gradients, flags)[0]


def _per_sequence_gradients(flags: str) -> Any:
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
        gradients = torch.autograd.grad(losses.float().mean(), params, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1).double() for g in gradients]).numpy())
    return np.array(rows)


def measured(flags: str, layouts: list[Layout], micro_batch: int, estimator: str, **options: Any) -> list[Pair]:
    """N and S that the collector reads from one real step in each of several layouts, in one process.

    ``exact``: by data-parallel groups where there are four, by slices elsewhere.
    """
    import torch

    from copus_ext.adapters.noise.gradient_noise import GradientNoise
    from copus_ext.run.switch import put_in_charge
    from tests.ranks.stepping import one_step
    from tests.ranks.steps import build
    from tests.ranks.tiny import raw_arguments, start_upstream

    raw = raw_arguments(flags + STILL)
    _, manager, _ = start_upstream(raw, Plan(layouts[0], micro_batch, BATCH))
    found = []
    for layout in layouts:
        torch.manual_seed(raw.seed)  # the same weights for every layout
        job = build(manager, raw, Plan(layout, micro_batch, BATCH))
        put_in_charge(job, manager)
        with GradientNoise.of_job(job, exact(layout) if estimator == "exact" else estimator, **options) as collector:
            norms = [one_step(job, first_sample=0).grad_norm for _ in range(2)]  # overlap starts with the second step
            estimates = [e for norm in norms for e in collector.step(norm)] + collector.flush()
        found.append((estimates[-1].N, estimates[-1].S))
    return found


def exact(layout: Layout) -> str:
    """What reads a step's gradients exactly, and in at least four groups."""
    return "dp-groups" if layout.dp >= 4 else "slices"


def seen_by_all(flags: str, layouts: list[Layout], micro_batch: int, estimator: str, **options: Any) -> list[Pair]:
    """The same, after a check that every rank sees the same."""
    world = layouts[0].world_size
    everyone = run_ranks(world, _measured_with, flags, layouts, micro_batch, estimator, options)
    assert all(np.allclose(pairs, everyone[0], rtol=1e-6, atol=0) for pairs in everyone), "ranks disagree"
    return everyone[0]


def _measured_with(*args: Any) -> list[Pair]:
    return measured(*args[:-1], **args[-1])


def expected_step(gradients: Any, layout: Layout, micro_batch: int, estimator: str = "slices") -> Pair:
    """N and S of the same grouping of the same sequences, from their single gradients."""
    plan = Plan(layout, micro_batch, BATCH)
    slices = grouping_of(StepShape.of(plan), estimator).slices
    window = plan.num_microbatches // slices
    owner = [
        ((s // micro_batch) % layout.dp, s // (micro_batch * layout.dp) // window) for s in range(BATCH)
    ]  # upstream's sampler deals micro-batches round the data-parallel ranks
    return of_groups(gradients, owner)


def of_groups(gradients: Any, owner: list[Any]) -> Pair:
    """N and S where sequence s belongs to group ``owner[s]``."""
    means = [gradients[[o == group for o in owner]].mean(axis=0) for group in sorted(set(owner))]
    whole = gradients.mean(axis=0)
    estimate = step_estimate([float(m @ m) for m in means], [BATCH / len(means)] * len(means), float(whole @ whole))
    return estimate.N, estimate.S


@pytest.mark.parametrize("flags", ["", LLAMA, "--normalization RMSNorm --qk-layernorm "])
def test_n_and_s_are_those_of_single_sequence_gradients(flags: str) -> None:
    gradients = per_sequence_gradients(flags)
    found = seen_by_all(flags, list(LAYOUTS.values()), 1, "exact")
    for (name, layout), pair in zip(LAYOUTS.items(), found, strict=True):
        assert pair == pytest.approx(expected_step(gradients, layout, 1, exact(layout)), rel=1e-3), name


def test_sequence_parallel_norms_are_added_up_before_they_are_squared() -> None:
    layouts = [Layout(dp=2, tp=2, sequence_parallel=True), Layout(tp=2, pp=2, sequence_parallel=True)]
    for flags in ("", "--normalization RMSNorm --qk-layernorm "):
        gradients = per_sequence_gradients(flags)
        for layout, pair in zip(layouts, seen_by_all(flags, layouts, 1, "slices"), strict=True):
            assert pair == pytest.approx(expected_step(gradients, layout, 1), rel=1e-3)


@pytest.mark.parametrize("world", [4, 8])
def test_the_same_samples_give_the_same_n_and_s_in_every_factorisation(world: int) -> None:
    """Every sequence a group of its own, so that the grouping does not depend on the layout."""
    sizes = [size for size in (1, 2, 4, 8) if size <= world]
    layouts = [
        Layout(dp=world // (tp * pp), tp=tp, pp=pp, vpp=vpp)
        for tp in sizes
        for pp in sizes
        for vpp in (1, 2)
        if tp * pp <= world and pp * vpp <= 8 and (pp > 1 or vpp == 1)
    ]
    # Upstream's interleaved schedule wants as many micro-batches as a multiple of the stages.
    layouts = [layout for layout in layouts if layout.vpp == 1 or BATCH // layout.dp >= layout.pp]
    if world == 8:  # what four ranks can't be: all three kinds of parallelism at once
        layouts = [layout for layout in layouts if layout == layouts[0] or min(layout.dp, layout.tp, layout.pp) > 1]
    found = seen_by_all("--num-layers 8", layouts, 1, "slices", min_groups=BATCH)
    for layout, pair in zip(layouts, found, strict=True):
        assert pair == pytest.approx(found[0], rel=1e-4), str(layout)


@pytest.mark.parametrize(
    ("flags", "zero1"),
    [
        ("--overlap-grad-reduce --overlap-param-gather", True),
        ("--overlap-grad-reduce", False),
        ("--overlap-grad-reduce --ddp-average-in-collective", False),
        ("--calculate-per-token-loss", False),
        ("--clip-grad 0 --no-check-for-nan-in-loss-and-grad", False),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", False),
        ("--bf16", True),
        ("--fp16 --initial-loss-scale 1024 --loss-scale-window 1", False),  # the scale doubles behind every step
    ],
)
def test_reduction_and_normalisation_flags_do_not_change_n_and_s(flags: str, zero1: bool) -> None:
    gradients = per_sequence_gradients("")
    tolerance = 5e-2 if "16" in flags else 1e-3
    layouts = [replace(LAYOUTS[name], distributed_optimizer=zero1) for name in ("dp4", "dp2")]
    for layout, pair in zip(layouts, seen_by_all(flags, layouts, 1, "exact"), strict=True):
        assert pair == pytest.approx(expected_step(gradients, layout, 1, exact(layout)), rel=tolerance)


@pytest.mark.parametrize("zero1", [False, True])
def test_experts_have_groups_of_their_own(zero1: bool) -> None:
    """An expert sees the sequences of all ranks that share it: its groups are fewer, and N and S add up by class."""
    gradients = per_sequence_gradients(EXPERTS)
    is_expert = run_ranks(1, expert_positions, EXPERTS)[0]
    layouts = [Layout(dp=4, ep=2), Layout(dp=2, pp=2, ep=2), Layout(dp=2, tp=2, ep=2, sequence_parallel=True)]
    layouts = [replace(layout, distributed_optimizer=zero1) for layout in layouts]
    for layout, pair in zip(layouts, seen_by_all(EXPERTS, layouts, 1, "slices"), strict=True):
        assert pair == pytest.approx(dense_and_experts(gradients, is_expert, layout), rel=1e-3), str(layout)


def dense_and_experts(gradients: Any, is_expert: Any, layout: Layout) -> Any:
    """N and S of the groups of dense layers and those of the experts."""
    dense = of_groups(gradients[:, ~is_expert], owners(layout))
    return np.add(dense, of_groups(gradients[:, is_expert], owners_of_experts(layout)))


def owners(layout: Layout) -> list[tuple[int, int]]:
    """The group of each sequence of a batch: its data-parallel rank, and its slice."""
    plan = Plan(layout, 1, BATCH)
    window = plan.num_microbatches // grouping_of(StepShape.of(plan), "slices").slices
    return [(s % layout.dp, s // layout.dp // window) for s in range(BATCH)]


def owners_of_experts(layout: Layout) -> list[tuple[int, int]]:
    """The same for experts, which lie over neighbouring ranks, first of context, then of data parallelism."""
    together = max(1, layout.ep // layout.cp)
    return [(rank // together, number) for rank, number in owners(layout)]


def test_data_parallel_groups_of_experts() -> None:
    gradients = per_sequence_gradients(EXPERTS)
    is_expert = run_ranks(1, expert_positions, EXPERTS)[0]
    dense = of_groups(gradients[:, ~is_expert], [s % 4 for s in range(BATCH)])
    experts = of_groups(gradients[:, is_expert], [s % 4 // 2 for s in range(BATCH)])
    pair = seen_by_all(EXPERTS, [Layout(dp=4, ep=2)], 1, "dp-groups")[0]
    assert pair == pytest.approx(np.add(dense, experts), rel=1e-3)


def test_data_parallel_groups_count_shared_and_parted_gradients_once() -> None:
    sequence_parallel = replace(LAYOUTS["tp2"], sequence_parallel=True)
    for flags, layout in (("", LAYOUTS["dp2"]), ("", LAYOUTS["tp2"]), (LLAMA, sequence_parallel)):
        gradients = per_sequence_gradients(flags)
        pair = seen_by_all(flags, [layout], 1, "dp-groups")[0]
        assert pair == pytest.approx(expected_step(gradients, layout, 1, "dp-groups"), rel=1e-3), str(layout)


def expert_positions(flags: str) -> Any:
    """[parameters] bool: which numbers of a row of :func:`per_sequence_gradients` belong to experts."""
    from copus_ext.adapters.job import build_job
    from tests.ranks.tiny import raw_arguments, start_upstream

    plan = Plan(Layout(), 1, BATCH)
    args, _, groups = start_upstream(raw_arguments(flags), plan)
    model: Any = build_job(plan, args, groups).model[0].module
    return np.concatenate([np.full(p.numel(), ".experts." in name) for name, p in model.named_parameters()])


def with_and_without_a_rerun(layout: Layout, estimator: str) -> list[Pair]:
    """N and S of a step, and of the same one after a pass whose gradients upstream threw away."""
    from copus_ext.adapters.job import build_job
    from copus_ext.adapters.noise.gradient_noise import GradientNoise
    from tests.ranks.stepping import one_step, pass_thrown_away
    from tests.ranks.tiny import raw_arguments, start_upstream

    plan = Plan(layout, 1, BATCH)
    args, _, groups = start_upstream(raw_arguments(STILL), plan)
    job = build_job(plan, args, groups)
    estimates = []
    for rerun in (False, True):
        with GradientNoise.of_job(job, estimator, first_step=0) as collector:
            if rerun:
                pass_thrown_away(job, first_sample=100)
            estimates += collector.step(one_step(job, first_sample=0).grad_norm) + collector.flush()
    return [(estimate.N, estimate.S) for estimate in estimates]


@pytest.mark.parametrize(("layout", "estimator"), [(Layout(dp=2), "dp-groups"), (Layout(pp=2), "sketch")])
def test_a_pass_that_upstream_runs_again_counts_once(layout: Layout, estimator: str) -> None:
    plain, rerun = run_ranks(2, with_and_without_a_rerun, layout, estimator)[0]
    assert rerun == pytest.approx(plain, rel=1e-5)
