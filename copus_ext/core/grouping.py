"""Into how many independent groups a step's sequences fall, for measuring the noise scale."""

from __future__ import annotations

from copus_ext.core.plan import Plan

MIN_GROUPS = 4  # fewer make N and S of a step much noisier (design: 4 groups need 1.2x the steps of 16)


def slices_per_rank(plan: Plan) -> int:
    """Equal slices to cut each rank's accumulation window into: the fewest that give ``MIN_GROUPS`` groups.

    Where the window has no divisor that large, as many slices as it has micro-batches.
    """
    micro_batches = plan.num_microbatches
    divisors = [d for d in range(1, micro_batches + 1) if micro_batches % d == 0]
    return next((d for d in divisors if d * plan.layout.dp >= MIN_GROUPS), micro_batches)


def why_unmeasurable(plan: Plan) -> str | None:
    """Why the noise scale can't be measured under this plan, or ``None`` where it can."""
    if plan.layout.cp > 1:
        return "the noise scale can't be measured: context-parallel ranks hold parts of one group's gradient"
    if plan.layout.ep > 1:
        return "the noise scale can't be measured: experts spread over data-parallel ranks mix the groups"
    if plan.layout.dp * plan.num_microbatches < 2:
        return "the noise scale can't be measured: one micro-batch a step makes one group, and two are needed"
    return None


def why_avoided(plan: Plan, base: Plan) -> str | None:
    """Why an adaptive run keeps away from a plan that could run: there it would learn too little about the noise.

    A run whose own flags rule out measuring has nothing to lose: then every plan is allowed.
    """
    if why_unmeasurable(base) is not None:
        return None
    groups = plan.layout.dp * plan.num_microbatches
    if groups < min(MIN_GROUPS, plan.global_batch):
        return f"{groups} micro-batches a step are too few groups to measure the noise scale well"
    return why_unmeasurable(plan)
