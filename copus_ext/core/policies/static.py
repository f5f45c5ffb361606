"""The policy of a plain run: the plan never changes."""

from __future__ import annotations

from dataclasses import dataclass

from copus_ext.core.plan import Plan
from copus_ext.core.planner.decision import Decision, Situation
from copus_ext.core.planner.policy import Options, Policy, PolicySettings


@dataclass(frozen=True)
class StaticPolicy(Policy):
    """Keeps the plan it is given."""

    def decide(self, situation: Situation) -> Decision:
        """Stay."""
        return Decision(situation.current, situation.current, "stay: the policy is static")


def make(settings: PolicySettings, base: Plan, options: Options) -> Policy:
    """It has no options."""
    return StaticPolicy()
