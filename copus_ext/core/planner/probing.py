"""Whether to measure c now: what knowing it would win against what a branch of the run costs.

A branch (Merrill et al. 2025, arXiv 2505.23971) trains on the samples that come next at another global batch, is
compared with the run on the same validation sequences, and is thrown away; the run then goes on from where it left. So
it costs its own time and some evaluations, and tells c = Bc / noise scale better than anything the run shows by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.efficiency.goodput import QUANTILES, statistical_efficiency
from copus_ext.core.planner.decision import Probe, Situation
from copus_ext.core.planner.explain import duration
from copus_ext.core.planner.outlook import Outlook, first_largest

Array = NDArray[np.float64]

EVALUATIONS = 4  # on the way of each of the two branches
_LEAST_STEPS = 16  # of the larger batch: fewer only show how a run recovers from the change
_MOST_STEPS = 64
_EVALUATION_SHARE = 0.25  # of a branch's own time, on top, until one has been made
_WORTH = 2.0  # times what it costs that a probe has to be expected to win, as with trials of layouts


@dataclass(frozen=True)
class ProbePlan:
    """A probe that is worth it, with the sentence that says why."""

    probe: Probe
    reason: str


def worthwhile_probe(outlook: Outlook, situation: Situation, budget: float) -> ProbePlan | None:
    """A branch that measures c, where a run that stays for now hangs on c so much that it pays, within the budget.

    With c known, the best plan for that c would be chosen, and without the one that is best on average over c. What the
    first is expected to win over the second, c being as likely to have each of its quantiles, is the value of perfect
    information (Raiffa and Schlaifer 1961); a probe has to cost less than half of it.

    Args:
        outlook: what is known of the candidates.
        situation: what it was made from.
        budget: share of the run's time that probes may take in all.
    """
    if budget <= 0 or not situation.can_probe or outlook.critical_batch is None or not outlook.batch_may_shrink:
        return None
    wins = _wins_by_c(outlook, situation)
    known, unknown = np.maximum(wins.max(axis=0), 0.0).mean(), max(0.0, wins.mean(axis=1).max())
    value_s, hoped = float(known - unknown), np.maximum(wins, 0.0).mean(axis=1)
    batches = outlook.plans.table.global_batch
    rows = outlook.allowed & outlook.same_layout & (batches != outlook.current.global_batch) & (hoped > 0)
    if not rows.any() or not value_s > 0:
        return None
    batch = batches[first_largest(hoped, rows)]
    row = first_largest(outlook.throughput, rows & (batches == batch))
    return _within_budget(outlook, situation, row, value_s, budget)


def _wins_by_c(outlook: Outlook, situation: Situation) -> Array:
    """[n, QUANTILES] seconds that a switch to a plan wins by the end of the run, for equally likely values of c.

    Speeds and the noise scale are taken at their medians: what is asked is what c alone decides.
    """
    assert situation.noise is not None
    log_c = situation.critical_ratio.quantiles(QUANTILES, situation.consumed_samples)
    critical = np.exp(log_c) * situation.noise.value
    efficiency = np.asarray(statistical_efficiency(outlook.plans.table.global_batch[:, None], critical))
    gain = np.exp(outlook.log_worth)[:, None] * efficiency / efficiency[outlook.here]
    left = np.maximum(0.0, outlook.horizon_s - outlook.cost_s)
    wins = gain * left[:, None] - outlook.horizon_s
    return np.where(outlook.allowed[:, None], wins, -np.inf)


def _within_budget(outlook: Outlook, situation: Situation, row: int, value_s: float, budget: float) -> ProbePlan | None:
    plan, current = outlook.plans[row], outlook.current
    unit = EVALUATIONS * math.lcm(plan.global_batch, current.global_batch)
    larger = max(plan.global_batch, current.global_batch)
    seconds_per_sample = (1.0 + _EVALUATION_SHARE) / float(outlook.throughput[row])
    allowance_s = budget * (situation.elapsed_s + outlook.horizon_s) - situation.probed_s
    most = min(allowance_s / seconds_per_sample, situation.samples_left, max(unit, _MOST_STEPS * larger))
    samples = int(most // unit) * unit
    cost_s = samples * seconds_per_sample
    if samples < _LEAST_STEPS * larger or value_s < _WORTH * cost_s:
        return None
    median, low, high = situation.critical_ratio.interval(situation.consumed_samples)
    reason = (
        f"stay, and branch to global batch {plan.global_batch} for {samples} sequences: c is {median:.2g} "
        f"({low:.2g} to {high:.2g}), knowing it would win {duration(value_s)}, and finding out costs {duration(cost_s)}"
    )
    return ProbePlan(Probe(plan, samples), reason)
