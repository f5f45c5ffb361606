"""The policy of a written schedule: the plan changes where the user said."""

from __future__ import annotations

from dataclasses import dataclass

from copus_ext.core.errors import UserError
from copus_ext.core.plan import Plan
from copus_ext.core.planner.decision import Decision, Situation
from copus_ext.core.planner.policy import FLAG, Options, Policy, PolicySettings
from copus_ext.core.planner.schedule import Schedule, parse_schedule


@dataclass(frozen=True)
class SchedulePolicy(Policy):
    """Follows ``schedule``; ``named`` is what it is called in explanations."""

    schedule: Schedule
    named: str = "schedule"

    def named_plans(self, base: Plan) -> tuple[Plan, ...]:
        """Those of the schedule."""
        return tuple(plan for _, plan in self.schedule.entries)

    def plan_at(self, consumed_samples: int) -> Plan:
        """What the schedule has there."""
        return self.schedule.plan_at(consumed_samples)

    def next_change(self, consumed_samples: int) -> int | None:
        """Where the schedule's next plan begins."""
        return self.schedule.next_change(consumed_samples)

    def decide(self, situation: Situation) -> Decision:
        """The plan that the schedule has for the samples consumed."""
        chosen = self.schedule.plan_at(situation.consumed_samples)
        if chosen != situation.current and chosen in situation.rejected:
            why = f"stay: the scheduled {chosen} was given up: {situation.rejected[chosen]}"
            return Decision(situation.current, situation.current, why)
        change = self.next_change(situation.consumed_samples)
        if chosen != situation.current:
            reason = f"switch to {chosen}: scheduled at {situation.consumed_samples} samples"
        elif change is not None:
            reason = f"stay: the {self.named} has no change before {change} samples"
        else:
            reason = f"stay: the {self.named} has no more changes"
        return Decision(
            chosen, situation.current, reason, upcoming=None if change is None else self.schedule.plan_at(change)
        )


def make(settings: PolicySettings, base: Plan, options: Options) -> Policy:
    """It has no options but ``--copus-schedule``."""
    if settings.schedule is None:
        raise UserError(f"{FLAG} schedule needs a schedule; give --copus-schedule")
    return SchedulePolicy(parse_schedule(settings.schedule, base))
