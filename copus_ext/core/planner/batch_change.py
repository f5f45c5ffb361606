"""What policies share that change the batch and keep the layout."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.efficiency.goodput import QUANTILES, critical_batch_quantiles
from copus_ext.core.plan import Plan
from copus_ext.core.planner.decision import Decision, Situation


def stay(situation: Situation, why: str) -> Decision:
    """The plan in force stays; ``why`` follows ``stay: ``."""
    return Decision(situation.current, situation.current, f"stay: {why}")


def change_to(situation: Situation, plan: Plan, why: str) -> Decision:
    """Go on with ``plan``; ``why`` follows its name."""
    return Decision(plan, situation.current, f"switch to {plan}: {why}")


def critical_batches(situation: Situation) -> NDArray[np.float64] | None:
    """[QUANTILES] equally likely critical batches, in sequences; None if nothing is known."""
    log_c = situation.critical_ratio.quantiles(QUANTILES, situation.consumed_samples)
    return critical_batch_quantiles(situation.noise, log_c)


def batches_here(situation: Situation) -> list[int]:
    """Global batches of the candidates in the present layout, in sequences, rising; the present one is among them."""
    here = {plan.global_batch for plan in situation.candidates if plan.layout == situation.current.layout}
    return sorted(here | {situation.current.global_batch})


def step_of(plan: Plan) -> int:
    """What a global batch has to be a multiple of under ``plan``, in sequences.

    Micro-batch x dp, and x pp where stages are interleaved (upstream's forward_backward_pipelining_with_interleaving).
    """
    return plan.micro_batch * plan.layout.dp * (plan.layout.pp if plan.layout.vpp > 1 else 1)


def at_batch(situation: Situation, batch: int) -> Plan | None:
    """The present layout at this global batch, in the micro-batch that is predicted fastest; of equals, the larger.

    Micro-batches are the present one and those that candidates have in this layout at this batch or a smaller one, if
    the largest of these was not rejected: what takes too much memory there takes no less beyond, and what has groups
    enough for the noise scale has no fewer.

    Returns:
        The plan in force where it has this batch. None where no micro-batch divides the batch, or all plans that there
        are were rejected.
    """
    here = situation.current
    if batch == here.global_batch:
        return here
    known = [plan for plan in situation.candidates if plan.layout == here.layout and plan.global_batch <= batch]
    nearest = {plan.micro_batch: plan for plan in sorted(known, key=lambda plan: plan.global_batch)}
    allowed = {micro for micro, plan in nearest.items() if plan == here or plan not in situation.rejected}
    micro_batches = allowed | ({here.micro_batch} - nearest.keys())
    return fastest(situation, _plans_of(here, batch, sorted(micro_batches, reverse=True)))


def _plans_of(here: Plan, batch: int, micro_batches: Iterable[int]) -> list[Plan]:
    fitting = [micro for micro in micro_batches if batch % (micro * here.layout.dp) == 0]
    plans = [here.with_batch(batch, micro) for micro in fitting]
    return [plan for plan in plans if batch % step_of(plan) == 0]


def fastest(situation: Situation, plans: Iterable[Plan]) -> Plan | None:
    """Of plans of one global batch, the one predicted fastest that was not rejected; the first of equals."""
    allowed = [plan for plan in plans if plan not in situation.rejected]
    if not allowed:
        return None
    return allowed[int(np.argmin(situation.throughput.predict(allowed).step_time_s))]


def first_possible(situation: Situation, batches: Iterable[int]) -> Plan | None:
    """:func:`at_batch` of the first of ``batches`` that can be had."""
    return next((plan for batch in batches if (plan := at_batch(situation, batch)) is not None), None)


def grown_to(situation: Situation, batch: int, why: str) -> Decision:
    """Grow to ``batch``, no further than the largest candidate; where that was rejected, to the next smaller one.

    Args:
        situation: of the decision.
        batch: what is asked for, in sequences; it is rounded up to what the present plan can run.
        why: what was compared, for the explanation.
    """
    current, batches = situation.current.global_batch, batches_here(situation)
    unit = step_of(situation.current)
    wanted = min(-(-batch // unit) * unit, batches[-1])
    if wanted <= current:
        return stay(situation, f"{why}, and {current} is the largest global batch there is")
    smaller = [size for size in reversed(batches) if current < size < wanted]
    plan = first_possible(situation, [wanted, *smaller])
    if plan is None:
        return stay(situation, f"{why}, but no global batch from {current} to {wanted} can be run")
    capped = f"; {batches[-1]} is the largest global batch there is" if wanted < batch else ""
    return change_to(situation, plan, why + capped)
