"""The policy of a written schedule: the plan changes where the user said."""

from __future__ import annotations

from dataclasses import dataclass

from copus_ext.core.decision import Decision, Situation
from copus_ext.core.schedule import Schedule


@dataclass(frozen=True)
class SchedulePolicy:
    """Follows ``--copus-schedule``."""

    schedule: Schedule

    @property
    def searches(self) -> bool:
        """It needs no candidates."""
        return False

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
            reason = f"stay: the schedule has no change before {change} samples"
        else:
            reason = "stay: the schedule has no more changes"
        return Decision(
            chosen, situation.current, reason, upcoming=None if change is None else self.schedule.plan_at(change)
        )
