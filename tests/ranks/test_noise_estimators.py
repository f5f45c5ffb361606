"""Estimators that do not read the whole gradient as it is: sketches, norm layers, Adam's preconditioner."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from copus_ext.core.plan import Layout, Plan
from tests.ranks.harness import run_ranks
from tests.ranks.test_gradient_noise import (
    BATCH,
    CONTEXT_PARALLEL,
    EXPERTS,
    LAYOUTS,
    LLAMA,
    dense_and_experts,
    expert_positions,
    of_groups,
    owners,
    per_sequence_gradients,
    seen_by_all,
)

EVERY_SEQUENCE = list(range(BATCH))


def over_seeds(flags: str, layouts: list[Layout], estimator: str, steps: int, seeds: int, warm_up: int) -> list[Any]:
    """[layouts][steps x seeds, 2] N and S of one and the same step, by sketches that differ in their signs only.

    ``warm_up`` steps at the flags' learning rate come first, so that the optimizer has moments.
    """
    import torch

    from copus_ext.adapters.noise.gradient_noise import GradientNoise
    from copus_ext.run.switch import put_in_charge
    from tests.ranks.stepping import one_step
    from tests.ranks.steps import build
    from tests.ranks.tiny import raw_arguments, start_upstream

    raw = raw_arguments(flags)
    _, manager, _ = start_upstream(raw, Plan(layouts[0], 1, BATCH))
    found = []
    for layout in layouts:
        torch.manual_seed(raw.seed)
        job = build(manager, raw, Plan(layout, 1, BATCH))
        put_in_charge(job, manager)
        for number in range(warm_up):
            one_step(job, first_sample=BATCH * (number + 1))
        for group in job.optimizer.param_groups:
            group["max_lr"] = group["min_lr"] = 1e-12  # the weights stay, and so does the step
        job.scheduler.step(0)
        one_step(job, first_sample=0)
        collectors = [GradientNoise.of_job(job, estimator, seed=seed).attach() for seed in range(seeds)]
        estimates = []
        for _ in range(steps):
            norm = one_step(job, first_sample=0).grad_norm
            for collector in collectors:
                estimates += collector.step(norm)
        for collector in reversed(collectors):
            estimates += collector.flush()
            collector.detach()
        found.append(np.array([[estimate.N, estimate.S] for estimate in estimates]))
    return found


def assert_scatters_about(draws: Any, truth: Any, most: float) -> None:
    """The mean of ``draws`` is within 4 standard errors of ``truth``, which are ``most`` of S at most."""
    error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - truth) < 4 * error).all(), f"{draws.mean(axis=0)} +- {error}, truth {truth}"
    assert error[1] < most * truth[1], "too noisy to say anything"


def test_a_sketch_is_unbiased_over_five_hundred_seeds() -> None:
    exact = seen_by_all("", [Layout()], 1, "slices")[0]
    draws = run_ranks(1, over_seeds, "", [Layout()], "sketch", 10, 50, 0)[0][0]
    assert len(draws) == 500
    assert len({tuple(draw) for draw in draws}) == 500, "draws repeat"
    assert_scatters_about(draws, exact, most=0.01)


@pytest.mark.parametrize(
    ("flags", "layouts"),
    [
        ("", [*LAYOUTS.values(), Layout(dp=2, pp=2, distributed_optimizer=True)]),
        (LLAMA, [Layout(dp=2, tp=2), Layout(dp=2, tp=2, sequence_parallel=True)]),
        ("--overlap-grad-reduce --calculate-per-token-loss", [Layout(dp=2, pp=2), Layout(dp=4)]),
        ("--bf16 --accumulate-allreduce-grads-in-fp32", [Layout(dp=2, pp=2)]),
        (EXPERTS, [Layout(dp=4, ep=2), Layout(dp=4, ep=4), Layout(dp=2, pp=2, ep=2)]),
        (EXPERTS, [Layout(dp=2, cp=2, ep=2), Layout(cp=4, ep=4), Layout(dp=2, cp=2, ep=4)]),
    ],
    ids=["gpt", "llama", "overlap, per token", "bf16", "experts", "cp, experts"],
)
def test_sketches_agree_with_gradients_of_single_sequences_in_every_layout(flags: str, layouts: list[Layout]) -> None:
    gradients, is_expert = per_sequence_gradients(flags), run_ranks(1, expert_positions, flags)[0]
    everyone = run_ranks(4, over_seeds, flags, layouts, "sketch", 4, 12, 0)
    for number, layout in enumerate(layouts):
        for rank in everyone[1:]:
            assert np.allclose(rank[number], everyone[0][number], rtol=1e-5), f"{layout}: ranks disagree"
        assert_scatters_about(everyone[0][number], dense_and_experts(gradients, is_expert, layout), most=0.05)


@pytest.mark.parametrize(
    ("flags", "layouts"),
    [
        ("", [*LAYOUTS.values(), Layout(dp=2, tp=2, sequence_parallel=True), *CONTEXT_PARALLEL]),
        (LLAMA + "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", [Layout(dp=4)]),
        ("--normalization RMSNorm --qk-layernorm --calculate-per-token-loss ", [Layout(tp=2, pp=2), Layout(dp=4)]),
    ],
)
def test_norm_layers_give_the_gradients_of_single_sequences(flags: str, layouts: list[Layout]) -> None:
    gradients = per_sequence_gradients(flags)
    norms = run_ranks(1, norm_positions, flags)[0]
    expected = of_groups(gradients[:, norms], EVERY_SEQUENCE)
    for layout, pair in zip(layouts, seen_by_all(flags, layouts, 1, "layernorm"), strict=True):
        assert pair == pytest.approx(expected, rel=1e-3), str(layout)


def test_two_sequences_in_a_micro_batch_are_told_apart_by_norm_layers() -> None:
    gradients = per_sequence_gradients("")
    norms = run_ranks(1, norm_positions, "")[0]
    pair = seen_by_all("", [Layout(dp=2, pp=2)], 2, "layernorm")[0]
    assert pair == pytest.approx(of_groups(gradients[:, norms], EVERY_SEQUENCE), rel=1e-3)


def norm_positions(flags: str) -> Any:
    """[parameters] bool: which numbers of a gradient belong to normalisation layers."""
    from copus_ext.adapters.job import build_job
    from tests.ranks.tiny import raw_arguments, start_upstream

    plan = Plan(Layout(), 1, BATCH)
    args, _, groups = start_upstream(raw_arguments(flags), plan)
    model: Any = build_job(plan, args, groups).model[0].module
    return np.concatenate([np.full(p.numel(), "layernorm" in name) for name, p in model.named_parameters()])


WARM_UP = 3


def preconditioned_gradients(flags: str) -> Any:
    """[BATCH, parameters] float64: gradients after a few steps, times Adam's factors at that point."""
    import torch

    from copus_ext.adapters.job import build_job
    from tests.ranks.stepping import one_step
    from tests.ranks.tiny import random_batches, raw_arguments, start_upstream

    plan = Plan(Layout(), 1, BATCH)
    args, _, groups = start_upstream(raw_arguments(flags), plan)
    job = build_job(plan, args, groups)
    for number in range(WARM_UP):
        one_step(job, first_sample=BATCH * (number + 1))
    for group in job.optimizer.param_groups:
        group["max_lr"] = group["min_lr"] = 1e-12
    job.scheduler.step(0)
    one_step(job, first_sample=0)
    model: Any = job.model[0].module
    params = list(model.parameters())
    state = job.optimizer.optimizer.state
    roots = torch.cat([state[p]["exp_avg_sq"].sqrt().reshape(-1).double() for p in params])
    rms = roots.square().mean().sqrt()
    rows = []
    for batch in random_batches(BATCH, 1, args.seq_length, args.padded_vocab_size):
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        gradients = torch.autograd.grad(losses.float().mean(), params)
        whole = torch.cat([g.reshape(-1).double() for g in gradients])
        rows.append((whole * rms / (roots + 0.01 * rms)).numpy())
    return np.array(rows)


def test_adam_measures_the_preconditioned_gradient_in_every_layout() -> None:
    gradients = run_ranks(1, preconditioned_gradients, "")[0]
    layouts = [Layout(dp=4), Layout(dp=4, distributed_optimizer=True), Layout(dp=2, tp=2, distributed_optimizer=True)]
    layouts += CONTEXT_PARALLEL
    found = run_ranks(4, over_seeds, "", layouts, "adam", 4, 12, WARM_UP)[0]
    for layout, draws in zip(layouts, found, strict=True):
        # Second moments move on by a thousandth with each of the still steps.
        assert_scatters_about(draws, of_groups(gradients, owners(layout)), most=0.05)
