"""What can be said of every candidate at once: its gain with quartiles, what it costs, and what a trial is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.efficiency.goodput import (
    QUANTILES,
    critical_batch_quantiles,
    expected_improvement,
    gain_quantiles,
    has_upper_bound,
    statistical_efficiency,
)
from copus_ext.core.plan import Plan
from copus_ext.core.planner.decision import CandidateScore, Situation
from copus_ext.core.planner.objective import Objective
from copus_ext.core.planner.switch_rule import SwitchRule

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_LISTED = 48  # plans that a decision names; those that nobody would choose are counted


@dataclass(frozen=True)
class Outlook:
    """What can be said of n plans; number ``here`` is the current one."""

    plans: Candidates
    here: int
    allowed: Mask  # [n] may be chosen as far as batches and refusals go
    refused: Mask  # [n] cannot run
    throughput: Array  # [n] sequences per second
    log_worth: Array  # [n] median ln(throughput / current throughput), and what the objective adds
    gain: Array  # [n] median
    gain_low: Array  # [n] lower quartile
    gain_high: Array  # [n] upper quartile
    weighed: Array  # [n] the one of them that has to exceed what is needed
    cost_s: Array  # [n] of switching there
    needed: Array  # [n] gain from which on a switch is made
    trial_s: Array  # [n] seconds of training that trying a plan out is expected to win; -inf where it is known
    horizon_s: float
    critical_batch: float | None  # median; None if nothing is known
    batch_may_shrink: bool

    @property
    def current(self) -> Plan:
        """The plan in force."""
        return self.plans[self.here]

    @property
    def same_layout(self) -> Mask:
        """[n] plans in the present layout."""
        layouts, ids = self.plans.layouts
        return np.asarray(ids == layouts.index(self.current.layout))

    def worth_s(self, gain: Array) -> Array:
        """[n] seconds of training at the current speed that a switch wins by the end of the run."""
        return (1.0 + gain) * np.maximum(0.0, self.horizon_s - self.cost_s) - self.horizon_s


@dataclass(frozen=True)
class Limits:
    """What a policy allows itself. ``max_growth``: factor on the global batch in one decision, up or down; 1: none.

    ``trial_steps``: steps that trying a plan out takes.
    """

    max_growth: float
    trial_steps: int


def look(situation: Situation, objective: Objective, rule: SwitchRule, limits: Limits) -> Outlook:
    """Predict the current plan and every candidate."""
    plans = situation.candidates.with_first(situation.current)
    here = plans.row_of[situation.current]
    predictions = situation.throughput.predict_table(plans.table, _observed_steps(plans, situation))
    batches = plans.table.global_batch
    throughput = batches / predictions.step_time_s
    log_ratio, log_sd = np.log(throughput / throughput[here]), predictions.log_ratio_sd(here)
    log_c = situation.critical_ratio.quantiles(QUANTILES, situation.consumed_samples)
    critical = critical_batch_quantiles(situation.noise, log_c)
    worth = log_ratio + objective.log_bonus(batches / batches[here])
    gain_low, gain, gain_high = gain_quantiles(worth, log_sd, batches, float(batches[here]), critical)
    horizon_s = situation.samples_left / float(throughput[here])
    cost_s = situation.switch_cost.expected_many(situation.current, plans)
    may_shrink = situation.noise is not None and has_upper_bound(situation.noise)
    refused = _refused(plans, situation)
    barred = _barred(batches, float(batches[here]), critical is not None, may_shrink, limits.max_growth)
    allowed = ~refused & ~barred & (np.arange(len(plans)) != here)
    # A trial measures speed alone. What another batch is worth besides is taken at its lower quartile.
    speed = log_ratio + np.log1p(_efficiency_low(batches, float(batches[here]), critical))
    untried = allowed & (predictions.observed_steps == 0)
    trial_s = limits.trial_steps * float(predictions.step_time_s[here])
    return Outlook(
        plans=plans,
        here=here,
        allowed=allowed,
        refused=refused,
        throughput=throughput,
        log_worth=worth,
        gain=gain,
        gain_low=gain_low,
        gain_high=gain_high,
        weighed=rule.weighed(gain, gain_low),
        cost_s=cost_s,
        needed=rule.needed(cost_s, horizon_s),
        trial_s=_won_by_trials(untried, speed, log_sd, horizon_s, 2.0 * cost_s, trial_s),
        horizon_s=horizon_s,
        critical_batch=None if critical is None else float(np.median(critical)),
        batch_may_shrink=may_shrink,
    )


def first_largest(values: Array, among: Mask) -> int:
    """Number of the largest value among some; of equals, the first."""
    return int(np.argmax(np.where(among, values, -np.inf)))


def _observed_steps(plans: Candidates, situation: Situation) -> NDArray[np.int64]:
    """[n] steps of each plan that are remembered."""
    steps = np.zeros(len(plans), dtype=np.int64)
    for plan, count in situation.throughput.seen.steps.items():
        if (row := plans.row_of.get(plan)) is not None:
            steps[row] = count
    return steps


def _won_by_trials(
    untried: Mask, speed: Array, log_sd: Array, horizon_s: float, both_ways_s: Array, trial_s: float
) -> Array:
    """[n] seconds that trying a plan out is expected to win; -inf where it was tried, or may not be.

    ``speed`` and ``log_sd`` are of ln(speed / the present one); ``both_ways_s`` is the cost of going there and back.
    """
    won = np.full(untried.size, -np.inf)
    hope, fear = expected_improvement(speed[untried], log_sd[untried])
    won[untried] = horizon_s * hope - both_ways_s[untried] - trial_s * fear
    return won


def _efficiency_low(batches: Array, current: float, critical: Array | None) -> Array:
    """[n] lower quartiles of the gain that the batch alone makes."""
    sizes, size_of = np.unique(batches, return_inverse=True)
    low, _, _ = gain_quantiles(np.zeros(sizes.size), np.zeros(sizes.size), sizes, current, critical)
    return np.asarray(low[size_of])


def _refused(plans: Candidates, situation: Situation) -> Mask:
    """[n] whether a plan cannot run."""
    refused = np.zeros(len(plans), dtype=np.bool_)
    for plan in situation.rejected:
        if (row := plans.row_of.get(plan)) is not None and plan != situation.current:
            refused[row] = True
    return refused


def _barred(batches: Array, current: float, known: bool, may_shrink: bool, max_growth: float) -> Mask:
    """[n] whether a plan may not be chosen now because of its batch; :func:`why_barred` says why."""
    other = batches != current
    leap = np.maximum(batches / current, current / batches) > max_growth
    return np.asarray(other & (leap | (not known) | ((batches < current) & (not may_shrink))))


def why_barred(outlook: Outlook, row: int, max_growth: float) -> str:
    """Why a plan that can run may not be chosen now; empty if it may."""
    batch, current = outlook.plans[row].global_batch, outlook.current.global_batch
    if batch == current:
        return ""
    if max_growth == 1:
        return "the policy keeps the global batch"
    if outlook.critical_batch is None:
        return "the noise scale is not known yet"
    if batch < current and not outlook.batch_may_shrink:
        return "the noise scale has no upper bound yet, so the batch may not shrink"
    if max(batch / current, current / batch) > max_growth:
        return f"more than {max_growth:g} x from global batch {current} in one decision"
    return ""


def scores(outlook: Outlook, situation: Situation, max_growth: float) -> tuple[tuple[CandidateScore, ...], int]:
    """The current plan, the best others by gain, those that cannot run with the reason; and how many are not named."""
    runnable = np.flatnonzero(~outlook.refused & (np.arange(len(outlook.plans)) != outlook.here))
    best = runnable[np.argsort(-outlook.gain[runnable], kind="stable")]
    listed = [_score(outlook, row, max_growth) for row in (outlook.here, *best[: _LISTED - 1].tolist())]
    refused = [
        CandidateScore(plan, feasible=False, why_not=why)
        for plan, why in situation.rejected.items()
        if plan != situation.current
    ]
    unlisted = len(runnable) + 1 - len(listed) + max(0, len(refused) - _LISTED)
    return (*listed, *refused[:_LISTED]), unlisted


def _score(outlook: Outlook, row: int, max_growth: float) -> CandidateScore:
    plan, throughput = outlook.plans[row], float(outlook.throughput[row])
    efficiency = None
    if outlook.critical_batch is not None:
        efficiency = float(statistical_efficiency(float(plan.global_batch), outlook.critical_batch))
    goodput = None if efficiency is None else throughput * efficiency
    return CandidateScore(plan, throughput, efficiency, goodput, why_not=why_barred(outlook, row, max_growth))
