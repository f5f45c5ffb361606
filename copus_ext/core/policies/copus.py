"""The policy of the COPUS paper (arXiv 2604.26687): batch and layout together, by Goodput.

It differs from the paper in its switch rule: not a fixed threshold but the cost of the switch against the time left,
with the gain at its lower quartile over all that is uncertain. And instead of a profile made beforehand, layouts whose
speed is in doubt are tried out where what can be hoped of them outweighs going there and back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.decision import CandidateScore, Decision, Situation
from copus_ext.core.goodput import (
    critical_batch_quantiles,
    expected_improvement,
    gain_quantiles,
    has_upper_bound,
    statistical_efficiency,
)
from copus_ext.core.plan import Plan

Array = NDArray[np.float64]

_TRIAL_WORTH = 0.01  # of the time left: a trial that is expected to win less is not worth the unrest
_NEAR = -0.05  # gain from which on a plan is made ready


def gain_needed(switch_cost_s: float, horizon_s: float) -> float:
    """The gain from which on a switch pays: C / (H - C), infinite where the switch takes all the time left.

    With it, (H - C) seconds at 1 + gain are worth more than H seconds at 1.
    """
    return switch_cost_s / (horizon_s - switch_cost_s) if horizon_s > switch_cost_s else math.inf


@dataclass(frozen=True)
class _Outlook:
    """What can be said of n plans; number 0 is the current one."""

    plans: tuple[Plan, ...]
    throughput: Array  # [n] sequences per second
    gain: Array  # [n] median
    gain_low: Array  # [n] lower quartile
    cost_s: Array  # [n] of switching there
    needed: Array  # [n] gain that repays the cost
    trial_s: Array  # [n] seconds of training that trying a plan out is expected to win; -inf where it is known
    horizon_s: float
    critical_batch: float | None  # median; None if unknown
    batch_may_shrink: bool

    def worth_s(self, gain: Array) -> Array:
        """[n] seconds of training at the current speed that a switch wins by the end of the run."""
        return (1.0 + gain) * np.maximum(0.0, self.horizon_s - self.cost_s) - self.horizon_s


@dataclass(frozen=True)
class CopusPolicy:
    """Switches to the plan of the highest Goodput when that surely repays the switch.

    ``dwell_steps``: steps that a plan is kept at least. ``max_growth``: the largest factor on the global batch, up or
    down, in one decision; the learning-rate rules are not meant for leaps.
    """

    dwell_steps: int = 10
    max_growth: float = 2.0

    @property
    def searches(self) -> bool:
        """It chooses from the space."""
        return True

    def next_change(self, consumed_samples: int) -> int | None:
        """Nothing is known beforehand."""
        return None

    def decide(self, situation: Situation) -> Decision:
        """Weigh every candidate against the current plan."""
        outlook = _look(situation, self.dwell_steps)
        barred = tuple(self._why_barred(plan, outlook) for plan in outlook.plans)
        best = _best(outlook, np.array([not why for why in barred]))
        switch = best > 0 and outlook.gain_low[best] > outlook.needed[best]
        chosen, reason = (best if switch else 0), _explain(outlook, best, bool(switch))
        trial = int(np.argmax(outlook.trial_s))
        if situation.steps_since_switch < self.dwell_steps:
            chosen = 0
            reason = f"stay: {situation.steps_since_switch} of {self.dwell_steps} steps since the last switch are done"
        elif not switch and outlook.trial_s[trial] > _TRIAL_WORTH * outlook.horizon_s:
            chosen = best = trial
            reason = _explain_trial(outlook, trial)
        return Decision(
            chosen=outlook.plans[chosen],
            current=situation.current,
            reason=reason,
            candidates=_scores(situation, outlook, barred),
            gain=float(outlook.gain[best]),
            gain_low=float(outlook.gain_low[best]),
            gain_needed=float(outlook.needed[best]),
            switch_cost_s=float(outlook.cost_s[best]),
            horizon_s=outlook.horizon_s,
            upcoming=_upcoming(outlook, np.array([not why for why in barred])),
        )

    def _why_barred(self, plan: Plan, outlook: _Outlook) -> str:
        """Why a plan that could run may not be chosen now; empty if it may."""
        batch, current_batch = plan.global_batch, outlook.plans[0].global_batch
        if batch == current_batch:
            return ""
        if outlook.critical_batch is None:
            return "the noise scale is not known yet"
        if batch < current_batch and not outlook.batch_may_shrink:
            return "the noise scale has no upper bound yet, so the batch may not shrink"
        if max(batch / current_batch, current_batch / batch) > self.max_growth:
            return f"more than {self.max_growth:g} x from global batch {current_batch} in one decision"
        return ""


def _look(situation: Situation, trial_steps: int) -> _Outlook:
    """Predict the current plan and every candidate that can run; a trial of one takes ``trial_steps`` steps."""
    current = situation.current
    others = [plan for plan in situation.candidates if plan != current and plan not in situation.rejected]
    plans = tuple(dict.fromkeys([current, *others]))
    predictions = situation.throughput.predict(plans)
    batches = np.array([plan.global_batch for plan in plans], dtype=np.float64)
    throughput = batches / predictions.step_time_s
    critical = critical_batch_quantiles(situation.noise)
    log_ratio = np.log(throughput / throughput[0])
    log_sd = predictions.log_ratio_sd(0)
    gain, gain_low = gain_quantiles(log_ratio, log_sd, batches, float(current.global_batch), critical)
    horizon_s = situation.samples_left / float(throughput[0])
    cost_s = np.array([situation.switch_cost.expected_s(current, plan) for plan in plans])
    hope, fear = expected_improvement(log_ratio, log_sd)
    trial_s = horizon_s * hope - 2.0 * cost_s - trial_steps * float(predictions.step_time_s[0]) * fear
    # A trial measures speed alone, so plans are tried at the present batch, where speed is all there is to gain.
    untried = (predictions.observed_steps == 0) & (batches == current.global_batch)
    return _Outlook(
        plans=plans,
        throughput=throughput,
        gain=gain,
        gain_low=gain_low,
        cost_s=cost_s,
        trial_s=np.where(untried, trial_s, -np.inf),
        needed=np.array([gain_needed(cost, horizon_s) for cost in cost_s]),
        horizon_s=horizon_s,
        critical_batch=None if critical is None else float(np.median(critical)),
        batch_may_shrink=situation.noise is not None and has_upper_bound(situation.noise),
    )


def _best(outlook: _Outlook, allowed: NDArray[np.bool_]) -> int:
    """Number of the plan to go to, or else of the one that comes nearest to paying; 0 if there is none at all.

    Of all that surely pay, the one expected to win most. Of equals, the first.
    """
    others = allowed & (np.arange(allowed.size) > 0)
    if not others.any():
        return 0
    paying = others & (outlook.gain_low > outlook.needed)
    if paying.any():
        return int(np.argmax(np.where(paying, outlook.worth_s(outlook.gain), -np.inf)))
    return int(np.argmax(np.where(others, outlook.worth_s(outlook.gain_low), -np.inf)))


def _upcoming(outlook: _Outlook, allowed: NDArray[np.bool_]) -> Plan | None:
    """The best plan in another layout, if it comes near: to have it ready costs part of a switch."""
    here = outlook.plans[0].layout
    others = allowed & np.array([plan.layout != here for plan in outlook.plans])
    if not others.any():
        return None
    best = int(np.argmax(np.where(others, outlook.gain, -np.inf)))
    return outlook.plans[best] if outlook.gain[best] > _NEAR else None


def _explain(outlook: _Outlook, best: int, switch: bool) -> str:
    """The decision in one sentence."""
    if best == 0:
        reason = "stay: there is no other plan to choose from"
    else:
        gain, low, needed = (_percent(float(x[best])) for x in (outlook.gain, outlook.gain_low, outlook.needed))
        cost, left = _duration(float(outlook.cost_s[best])), _duration(outlook.horizon_s)
        if switch:
            reason = (
                f"switch to {outlook.plans[best]}: gain {gain} (lower quartile {low}), "
                f"{needed} repays a {cost} switch in the {left} left"
            )
        elif math.isinf(outlook.needed[best]):
            reason = f"stay: a {cost} switch to {outlook.plans[best]} takes all of the {left} left"
        else:
            reason = (
                f"stay: {outlook.plans[best]} would gain {gain} (lower quartile {low}), "
                f"and needs {needed} to repay a {cost} switch in the {left} left"
            )
    return reason + _caveat(outlook)


def _explain_trial(outlook: _Outlook, trial: int) -> str:
    """Why a plan is tried out, in one sentence."""
    return (
        f"try {outlook.plans[trial]}: gain {_percent(float(outlook.gain[trial]))} (lower quartile "
        f"{_percent(float(outlook.gain_low[trial]))}) is in doubt, and finding out is expected to win "
        f"{_duration(float(outlook.trial_s[trial]))} of the {_duration(outlook.horizon_s)} left"
    ) + _caveat(outlook)


def _caveat(outlook: _Outlook) -> str:
    """What was not open to decision."""
    if outlook.critical_batch is None:
        return "; the noise scale is not known yet, so the batch stays"
    return "" if outlook.batch_may_shrink else "; the noise scale has no upper bound yet, so the batch may only grow"


def _scores(situation: Situation, outlook: _Outlook, barred: tuple[str, ...]) -> tuple[CandidateScore, ...]:
    """Every plan with its numbers, then those that upstream rejected with its reason."""
    runnable = []
    for plan, throughput, why_not in zip(outlook.plans, outlook.throughput.tolist(), barred, strict=True):
        efficiency = None
        if outlook.critical_batch is not None:
            efficiency = float(statistical_efficiency(float(plan.global_batch), outlook.critical_batch))
        goodput = None if efficiency is None else throughput * efficiency
        runnable.append(CandidateScore(plan, throughput, efficiency, goodput, why_not=why_not))
    rejected = [
        CandidateScore(plan, feasible=False, why_not=why)
        for plan, why in situation.rejected.items()
        if plan != situation.current
    ]
    return (*runnable, *rejected)


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 7200 else f"{seconds / 3600:.1f} h"
