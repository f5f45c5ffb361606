"""Into how many independent groups a step's sequences fall, and who reads their gradients."""

from __future__ import annotations

from typing import NamedTuple

from copus_ext.core.plan import Plan

MIN_GROUPS = 4  # sixteen need 0.7 to 0.9 times as many steps (tools/bench_noise_scale.py)

DP_GROUPS, SLICES, SKETCH, LAYERNORM, ADAM = "dp-groups", "slices", "sketch", "layernorm", "adam"
AUTO = "auto"
ESTIMATORS = (AUTO, DP_GROUPS, SLICES, SKETCH, LAYERNORM, ADAM)


class StepShape(NamedTuple):
    """What of a plan and its model decides how a step's gradients can be told apart.

    ``edp`` ranks share an expert's gradient; ``tied``: embeddings lie on two pipeline stages.
    """

    dp: int
    edp: int
    cp: int
    ep: int
    micro_batch: int
    num_microbatches: int
    tied: bool = False

    @staticmethod
    def of(plan: Plan) -> StepShape:
        """The shape of a step under ``plan``, experts being cut as the dense layers are."""
        layout = plan.layout
        edp = max(1, layout.dp * layout.cp // layout.ep)
        return StepShape(layout.dp, edp, layout.cp, layout.ep, plan.micro_batch, plan.num_microbatches)


class Grouping(NamedTuple):
    """``slices`` of each rank's accumulation window, and how many groups that makes in all."""

    estimator: str
    slices: int
    dense_groups: int
    expert_groups: int  # those of the dense layers where there are no separate experts


def grouping_of(shape: StepShape, estimator: str = AUTO, min_groups: int = MIN_GROUPS) -> Grouping:
    """How a step is measured: the fewest equal slices that make ``min_groups`` groups, of experts too.

    Where the window has no divisor that large, as many slices as it has micro-batches. ``auto`` takes exact square
    norms where that needs neither slices nor sums over ranks of whole gradients, and sketches elsewhere.
    """
    if estimator == AUTO:
        exact = shape.dp >= MIN_GROUPS and shape.cp == shape.ep == 1 and not shape.tied
        estimator = DP_GROUPS if exact else SKETCH
    if estimator == LAYERNORM:
        batch = shape.dp * shape.micro_batch * shape.num_microbatches
        return Grouping(estimator, 1, batch, batch)
    independent = shape.dp if shape.ep == 1 else shape.edp
    slices = 1 if estimator == DP_GROUPS else _fewest_slices(shape.num_microbatches, independent, min_groups)
    return Grouping(estimator, slices, shape.dp * slices, independent * slices)


def _fewest_slices(micro_batches: int, independent: int, min_groups: int) -> int:
    divisors = (d for d in range(1, micro_batches + 1) if micro_batches % d == 0)
    return next((d for d in divisors if d * independent >= min_groups), micro_batches)


def with_inner_products(estimator: str) -> str:
    """Who reads inner products of gradients where ``estimator`` is asked for.

    Raises:
        ValueError: it has square norms only, or norm layers only.
    """
    if estimator in (DP_GROUPS, SLICES, LAYERNORM):
        raise ValueError(_because(f"{estimator} gives no inner products of gradients; sketch does"))
    return SKETCH if estimator == AUTO else estimator


def why_unmeasurable(shape: StepShape, estimator: str = AUTO) -> str | None:
    """Why the noise scale can't be measured in such steps, or ``None`` where it can."""
    grouping = grouping_of(shape, estimator)
    if shape.cp > 1 and grouping.estimator in (DP_GROUPS, SLICES):
        return _because(f"context-parallel ranks hold parts of a group's gradient, which {estimator} can't add up")
    if shape.ep > 1 and shape.ep % shape.cp:
        return _because("context-parallel ranks of one group feed several replicas of an expert")
    if grouping.dense_groups < 2:
        if grouping.estimator == DP_GROUPS and shape.num_microbatches > 1:
            return _because("dp-groups needs two data-parallel ranks; slices and sketch do with one")
        return _because("one micro-batch a step makes one group, and two are needed")
    if grouping.expert_groups < 2:
        return _because("every expert sees one group a step, and two are needed; give more micro-batches")
    return None


def why_unmeasurable_in_a_run(shape: StepShape, estimator: str = AUTO) -> str | None:
    """The same for a run, which corrects norm layers by full measurements and so has to be able to make them."""
    return why_unmeasurable(shape, _in_full(estimator))


def _in_full(estimator: str) -> str:
    """Who reads the whole gradient in a run with that estimator."""
    return AUTO if estimator == LAYERNORM else estimator


def _because(reason: str) -> str:
    return f"the noise scale can't be measured: {reason}"


def why_avoided(plan: Plan, base: Plan, estimator: str = AUTO) -> str | None:
    """Why an adaptive run keeps away from a plan that could run: there it would learn too little about the noise.

    A run whose own flags rule out measuring has nothing to lose: then every plan is allowed. And one whose own plan has
    few groups may have as few under others.
    """
    estimator = _in_full(estimator)
    if why_unmeasurable(StepShape.of(base), estimator) is not None:
        return None
    if reason := why_unmeasurable(StepShape.of(plan), estimator):
        return reason
    groups, of_base = (grouping_of(StepShape.of(p), estimator).dense_groups for p in (plan, base))
    if groups < min(MIN_GROUPS, of_base, plan.global_batch):
        return f"{groups} groups a step are too few to measure the noise scale well"
    return None
