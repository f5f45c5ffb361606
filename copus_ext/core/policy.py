"""The interface of policies, and how one is found by its name."""

from __future__ import annotations

from typing import Protocol

from copus_ext.core.decision import CandidateScore, Decision, Situation
from copus_ext.core.errors import UserError
from copus_ext.core.policies.copus import CopusPolicy
from copus_ext.core.policies.schedule import SchedulePolicy
from copus_ext.core.policies.static import StaticPolicy
from copus_ext.core.schedule import Schedule

__all__ = ["POLICIES", "CandidateScore", "Decision", "Policy", "Situation", "make_policy"]

POLICIES = ("copus", "static", "schedule")


class Policy(Protocol):
    """Chooses plans. A pure function of what it is shown: the same situation gives the same decision."""

    @property
    def searches(self) -> bool:
        """Whether it chooses among the candidates of ``--copus-space``; else it needs none."""

    def next_change(self, consumed_samples: int) -> int | None:
        """Samples at which a change is already known to come, so that a step must end there; None if there is none."""

    def decide(self, situation: Situation) -> Decision:
        """The plan to go on with from here, and why."""


def make_policy(name: str, schedule: Schedule | None = None, dwell_steps: int = 10, max_growth: float = 2.0) -> Policy:
    """The policy called ``name``.

    Raises:
        UserError: no such policy, or a schedule that is missing or would not be followed.
    """
    if name not in POLICIES:
        raise UserError(f"--copus-policy {name}: there is no such policy; choose one of {', '.join(POLICIES)}")
    if name == "schedule":
        if schedule is None:
            raise UserError("--copus-policy schedule needs a schedule; give --copus-schedule")
        return SchedulePolicy(schedule)
    if schedule is not None:
        raise UserError(f"--copus-policy {name} does not follow --copus-schedule; use --copus-policy schedule")
    return CopusPolicy(dwell_steps, max_growth) if name == "copus" else StaticPolicy()
