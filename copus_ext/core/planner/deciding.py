"""Asking a policy until what it wants can be had: the same in a run and when a run is replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from copus_ext.core.plan import Plan
from copus_ext.core.planner.decision import Decision, Situation
from copus_ext.core.planner.policy import Policy


def decide(
    policy: Policy, situation: Situation, refusal_of: Callable[[Plan], str | None]
) -> tuple[Decision, dict[Plan, str]]:
    """The policy's decision, and the plans that were found not to be possible on the way to it.

    Args:
        policy: who decides.
        situation: what is known.
        refusal_of: why a plan cannot be, as upstream's validation says; None where it can.
    """
    refused: dict[Plan, str] = {}
    decision = policy.decide(situation)
    while decision.is_switch and decision.chosen not in situation.rejected:
        why = refusal_of(decision.chosen)
        if why is None:
            return decision, refused
        refused[decision.chosen] = why
        situation = replace(situation, rejected={**situation.rejected, decision.chosen: why})
        decision = policy.decide(situation)
    if not decision.is_switch:
        return decision, refused
    reason = f"stay: {decision.chosen} was refused before: {situation.rejected[decision.chosen]}"
    return replace(decision, chosen=decision.current, reason=reason), refused
