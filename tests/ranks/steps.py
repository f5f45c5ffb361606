"""Jobs of the tiny model in several layouts of one process, and runs of real training steps in them."""

from __future__ import annotations

from typing import Any

from copus_ext.core.plan import Plan
from tests.ranks.stepping import one_step

_PADDED_VOCABULARY = 128  # the same in every layout: 126 tokens padded to a multiple of 32 x 4


def build(layouts: Any, raw: Any, plan: Plan, *, initialise_weights: bool = True) -> Any:
    """A job for ``plan`` in its own groups, which stay active."""
    from copus_ext.adapters.arguments import arguments_for
    from copus_ext.adapters.job import build_job

    args = arguments_for(raw, plan, padded_vocab_size=_PADDED_VOCABULARY)
    groups = layouts.activate(plan.layout, args)
    return build_job(plan, args, groups, initialise_weights=initialise_weights)


def train_steps(job: Any, layouts: Any, count: int, first_sample: int = 0) -> list[float]:
    """``count`` steps of ``job`` on samples that do not depend on the layout; each step's loss, on its ranks."""
    return [loss for loss, _ in losses_and_norms(job, layouts, count, first_sample)]


def losses_and_norms(job: Any, layouts: Any, count: int, first_sample: int = 0) -> list[tuple[float, float]]:
    """The same, with the gradient's norm. None on ranks that have no part in the job."""
    import torch

    from copus_ext.run.switch import put_in_charge

    put_in_charge(job, layouts)
    found = []
    for number in range(count if job.has_part else 0):
        step = one_step(job, first_sample + number * job.plan.global_batch)
        known = torch.tensor([step.loss or 0.0, step.loss is not None], dtype=torch.float64)
        torch.distributed.all_reduce(known)
        found.append((float(known[0] / known[1]), float(step.grad_norm or 0.0)))
    return found
