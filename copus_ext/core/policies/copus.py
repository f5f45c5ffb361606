"""The policy of the COPUS paper (arXiv 2604.26687): batch and layout together, by Goodput.

It differs from the paper in its switch rule: not a fixed threshold but the cost of the switch against the time left,
with the gain at its lower quartile over all that is uncertain. And instead of a profile made beforehand, layouts whose
speed is in doubt are tried out where what can be hoped of them outweighs going there and back; and where the decision
hangs on c, a branch may measure it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from copus_ext.core.plan import Plan
from copus_ext.core.planner.decision import Decision, Situation
from copus_ext.core.planner.explain import explain, explain_trial
from copus_ext.core.planner.objective import Objective, parse_objective
from copus_ext.core.planner.outlook import Limits, Outlook, first_largest, look, scores
from copus_ext.core.planner.policy import Options, Policy, PolicySettings
from copus_ext.core.planner.probing import ProbePlan, worthwhile_probe
from copus_ext.core.planner.switch_rule import SwitchRule, parse_switch_rule

_TRIAL_WORTH = 0.01  # of the time left: a trial that is expected to win less is not worth the unrest
_NEAR = -0.05  # gain from which on a plan is made ready


@dataclass(frozen=True)
class CopusPolicy(Policy):
    """Switches to the plan of the highest Goodput when that surely repays the switch.

    ``dwell_steps``: steps that a plan is kept at least. ``max_growth``: the largest factor on the global batch, up or
    down, in one decision, since the learning-rate rules are not meant for leaps; 1 keeps the batch. ``probe_budget``:
    share of the run's time that branches to measure c may take.
    """

    searches = True

    dwell_steps: int = 10
    max_growth: float = 2.0
    objective: Objective = field(default_factory=Objective)
    rule: SwitchRule = field(default_factory=SwitchRule)
    probe_budget: float = 0.0

    def decide(self, situation: Situation) -> Decision:
        """Weigh every candidate against the current plan."""
        outlook = look(situation, self.objective, self.rule, Limits(self.max_growth, self.dwell_steps))
        best = _best(outlook)
        switch = best is not None and bool(outlook.weighed[best] > outlook.needed[best])
        chosen = best if best is not None and switch else outlook.here
        reason = explain(outlook, best, switch, self.rule.threshold)
        trial, probe = int(np.argmax(outlook.trial_s)), None
        if situation.steps_since_switch < self.dwell_steps:
            chosen = outlook.here
            reason = f"stay: {situation.steps_since_switch} of {self.dwell_steps} steps since the last switch are done"
        elif not switch and outlook.trial_s[trial] > _TRIAL_WORTH * outlook.horizon_s:
            chosen = best = trial
            reason = explain_trial(outlook, trial)
        elif not switch and (planned := self._probe(outlook, situation)):
            probe, reason = planned.probe, planned.reason
        shown = outlook.here if best is None else best
        listed, unlisted = scores(outlook, situation, self.max_growth)
        return Decision(
            chosen=outlook.plans[chosen],
            current=situation.current,
            reason=reason,
            candidates=listed,
            unlisted=unlisted,
            gain=float(outlook.gain[shown]),
            gain_low=float(outlook.gain_low[shown]),
            gain_high=float(outlook.gain_high[shown]),
            gain_needed=float(outlook.needed[shown]),
            switch_cost_s=float(outlook.cost_s[shown]),
            horizon_s=outlook.horizon_s,
            upcoming=_upcoming(outlook),
            probe=probe,
        )

    def _probe(self, outlook: Outlook, situation: Situation) -> ProbePlan | None:
        """A branch that measures c; the paper's rule, which takes c as known, has none."""
        if self.rule.threshold is not None:
            return None
        return worthwhile_probe(outlook, situation, self.probe_budget)


def _best(outlook: Outlook) -> int | None:
    """Number of the plan to go to, or else of the one that comes nearest to paying; None if there is none at all.

    Of all that surely pay, the one expected to win most. Of equals, the first.
    """
    if not outlook.allowed.any():
        return None
    paying = outlook.allowed & (outlook.weighed > outlook.needed)
    if paying.any():
        return first_largest(outlook.worth_s(outlook.gain), paying)
    return first_largest(outlook.worth_s(outlook.weighed), outlook.allowed)


def _upcoming(outlook: Outlook) -> Plan | None:
    """The best plan in another layout, if it comes near: to have it ready costs part of a switch."""
    others = outlook.allowed & ~outlook.same_layout
    if not others.any():
        return None
    best = first_largest(outlook.gain, others)
    return outlook.plans[best] if outlook.gain[best] > _NEAR else None


def make(settings: PolicySettings, base: Plan, options: Options) -> Policy:
    """It has no options of its own; flags of the run say the rest."""
    return CopusPolicy(
        dwell_steps=settings.dwell_steps,
        max_growth=settings.max_growth,
        objective=parse_objective(settings.objective, settings.lr_rule),
        rule=parse_switch_rule(settings.switch_rule),
        probe_budget=settings.probe_budget,
    )
