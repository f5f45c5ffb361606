"""A run's decisions made again from its log: the same to the last bit, or what other settings would have decided."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.events import Event, plain
from copus_ext.core.plan import plan_from_json
from copus_ext.core.planner.deciding import decide
from copus_ext.core.planner.decision import Decision
from copus_ext.core.planner.knowledge import Knowledge, plans_avoided
from copus_ext.core.planner.policy import Policy, PolicySettings
from copus_ext.core.planner.registry import make_policy
from copus_ext.core.planner.space import parse_space


@dataclass(frozen=True)
class Replayed:
    """One decision of a run, and what it comes to when it is made again."""

    recorded: Event
    decision: Decision

    @property
    def differences(self) -> tuple[str, ...]:
        """Fields in which the two are not the same, to the last bit of every number."""
        # Through JSON, as the recorded one has been.
        again = json.loads(json.dumps(plain(self.decision.to_json())))
        return tuple(name for name, value in again.items() if value != self.recorded.get(name))


def _start(start: Event, changes: dict[str, Any], space: str | None) -> tuple[Policy, Knowledge]:
    """The policy of an attempt, and what was known when it began."""
    base = plan_from_json(start["base"])
    policy = make_policy(replace(PolicySettings.from_json(start["settings"]), **changes), base)
    candidates = Candidates(())
    if policy.searches:
        asked = parse_space(start["space"] if space is None else space).opened(policy.opens)
        model = ModelShape(**start["model"])
        candidates = asked.plans(base, model).with_first(base) if space is None else asked.candidates(base, model)
    avoided = plans_avoided(candidates, base, start["noise_estimator"])
    return policy, Knowledge.from_json(start["knowledge"], candidates, avoided)


def replay(
    events: Sequence[Event], changes: dict[str, Any] | None = None, space: str | None = None
) -> Iterator[Replayed]:
    """Go through the events of a run and decide wherever it decided, knowing what it knew.

    Under other settings that tells what would have been decided at each of these points, and not how a run with them
    would have gone on: what is known stays what the recorded run saw.

    Args:
        events: as :func:`copus_ext.core.events.read_events` gives them.
        changes: fields of :class:`PolicySettings` that are to be other than recorded.
        space: another ``--copus-space``.

    Raises:
        UserError: settings that can't be.
        ValueError: events that hold no run of an adaptive job.
    """
    policy: Policy | None = None
    for event in events:
        if event["event"] == "run_start":
            if "knowledge" not in event:
                raise ValueError("this run was recorded without what it knew; it can't be replayed")
            policy, known = _start(event, changes or {}, space)
            train_samples = event["train_samples"]
            continue
        if policy is None:
            raise ValueError("the events do not begin with a run_start")
        if event["event"] == "decision":
            situation = known.situation(event["iteration"], event["consumed_samples"], train_samples)
            refused = {plan_from_json(plan): why for plan, why in event["refused"]}
            decision, _ = decide(policy, situation, refused.get)
            yield Replayed(event, decision)
        known = known.after(event)
