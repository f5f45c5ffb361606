"""Batch alone: the layout is fixed, and the batch follows the critical batch. What the COPUS paper compares with.

The critical batch is c x noise scale (McCandlish et al. 2018, arXiv 1812.06162), at the median of what is known of
both. The COPUS paper (arXiv 2604.26687) starts such runs from a layout that is chosen for small batches or for large
ones; that is ``start``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from copus_ext.core.efficiency.goodput import has_upper_bound
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.batch_change import batches_here, change_to, critical_batches, fastest, first_possible, stay
from copus_ext.core.planner.decision import Decision, Situation
from copus_ext.core.planner.policy import Options, Policy, PolicySettings

GIVEN, PESSIMISTIC, OPTIMISTIC = "given", "pessimistic", "optimistic"

MARGIN = 1.2  # beyond the geometric mean of two batches; our choice, not tuned


@dataclass(frozen=True)
class CriticalBatchPolicy(Policy):
    """Goes to the global batch of the present layout that is nearest, in ratio, to the critical batch.

    Two neighbours are not flipped between: the critical batch has to be beyond their geometric mean by ``MARGIN``.
    ``max_growth``: largest factor on the batch in one decision, up or down. ``start``: which layout the first decision
    goes to, the one predicted fastest at the smallest (pessimistic) or largest (optimistic) global batch of the space.
    """

    searches = True

    dwell_steps: int = 10
    max_growth: float = 2.0
    start: str = GIVEN

    def decide(self, situation: Situation) -> Decision:
        """First the layout, then batches."""
        if situation.decisions == 0 and self.start != GIVEN:
            return self._first_layout(situation)
        if situation.steps_since_switch < self.dwell_steps:
            return stay(
                situation, f"{situation.steps_since_switch} of {self.dwell_steps} steps since the last switch are done"
            )
        critical = critical_batches(situation)
        if critical is None:
            return stay(situation, "the noise scale is not known yet, so the batch stays")
        return self._follow(situation, float(np.exp(np.median(np.log(critical)))))

    def _follow(self, situation: Situation, critical: float) -> Decision:
        """To the nearest batch that may be had, if the critical one is clearly nearer to it than to the present one."""
        current = situation.current.global_batch
        said = f"the critical batch is {critical:.4g} sequences (median)"
        plan = first_possible(situation, self._nearest(situation, critical))
        if plan is None or plan.global_batch == current:
            return stay(situation, f"{said}, and of the global batches allowed now {current} is the nearest in ratio")
        other = plan.global_batch
        middle = math.sqrt(current * other)
        grows = other > current
        needed = middle * MARGIN if grows else middle / MARGIN
        if (critical > needed) != grows:
            side = "above" if grows else "below"
            return stay(situation, f"{said}, and has to be {side} {needed:.4g} for a change from {current} to {other}")
        verb, side = ("grows", "above") if grows else ("shrinks", "below")
        return change_to(situation, plan, f"{said}, {side} {needed:.4g} from where on the batch {verb} to {other}")

    def _nearest(self, situation: Situation, critical: float) -> list[int]:
        """The batches that may be had now, in sequences, the nearest in ratio first."""
        current = situation.current.global_batch
        may_shrink = situation.noise is not None and has_upper_bound(situation.noise)
        near = [
            batch
            for batch in batches_here(situation)
            if max(batch / current, current / batch) <= self.max_growth and (batch >= current or may_shrink)
        ]
        return sorted(near, key=lambda batch: (abs(math.log(batch / critical)), batch != current))

    def _first_layout(self, situation: Situation) -> Decision:
        """The layout predicted fastest at an end of the space; the batch stays, or goes to the nearest it can run."""
        size, batch = ("smallest", min) if self.start == PESSIMISTIC else ("largest", max)
        plans = situation.candidates.with_first(situation.current)
        end = batch(plan.global_batch for plan in plans)
        at_end = [plan for plan in plans if plan.global_batch == end]
        times = situation.throughput.predict(at_end).step_time_s
        for row in np.argsort(times, kind="stable").tolist():
            plan = next(self._under(situation, at_end[row].layout), None)
            if plan is None:
                continue
            why = f"predicted fastest at the {size} global batch of the space, {end}, with {times[row]:.3g} s a step"
            if plan.layout == situation.current.layout:
                return stay(situation, f"the present layout is {why}")
            return change_to(situation, plan, f"its layout is {why}")
        return stay(situation, "no layout of the space can be run")

    def _under(self, situation: Situation, layout: Layout) -> Iterator[Plan]:
        """What can be run under a layout, the batch nearest to the present one first; the present plan as it is."""
        if layout == situation.current.layout:
            yield situation.current
        current = situation.current.global_batch
        here = [plan for plan in situation.candidates if plan.layout == layout]
        sizes = sorted({plan.global_batch for plan in here}, key=lambda size: abs(math.log(size / current)))
        for size in sizes:
            plan = fastest(situation, [plan for plan in here if plan.global_batch == size])
            if plan is not None:
                yield plan


def make(settings: PolicySettings, base: Plan, options: Options) -> Policy:
    """Option ``start``: given, pessimistic or optimistic."""
    start = options.choice("start", (GIVEN, PESSIMISTIC, OPTIMISTIC))
    return CriticalBatchPolicy(settings.dwell_steps, settings.max_growth, start)
