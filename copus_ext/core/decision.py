"""What a decision is made from, and what it is: values that can be logged and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from copus_ext.core.noise_scale import NoiseEstimate
from copus_ext.core.plan import Plan
from copus_ext.core.switch_cost import SwitchCost
from copus_ext.core.throughput import ThroughputModel


@dataclass(frozen=True)
class Situation:
    """Everything a policy may look at. The time left follows from the samples left and the throughput."""

    iteration: int
    consumed_samples: int
    train_samples: int
    current: Plan
    steps_since_switch: int
    noise: NoiseEstimate | None
    throughput: ThroughputModel
    switch_cost: SwitchCost
    candidates: tuple[Plan, ...]
    rejected: Mapping[Plan, str] = field(default_factory=dict)  # by upstream's own validation, with its reason

    @property
    def samples_left(self) -> int:
        """Sequences still to be trained on."""
        return max(0, self.train_samples - self.consumed_samples)


@dataclass(frozen=True)
class CandidateScore:
    """How one plan was seen. Throughput and Goodput in sequences per second; None where nothing was computed."""

    plan: Plan
    throughput: float | None = None
    efficiency: float | None = None
    goodput: float | None = None
    feasible: bool = True
    why_not: str = ""  # why it cannot run, or may not be chosen now

    def to_json(self) -> dict[str, Any]:
        """Plain values for the event log."""
        return {
            "plan": str(self.plan),
            "throughput": self.throughput,
            "efficiency": self.efficiency,
            "goodput": self.goodput,
            "feasible": self.feasible,
            "why_not": self.why_not,
        }


@dataclass(frozen=True)
class Decision:
    """The plan to go on with, and the numbers that say so. Gains are ratios - 1 of the best other candidate.

    ``upcoming``: the plan that is likeliest to be switched to next, for which groups and buffers may be made ready.
    """

    chosen: Plan
    current: Plan
    reason: str
    candidates: tuple[CandidateScore, ...] = ()
    gain: float = math.nan  # these are not numbers where the policy weighs no gains
    gain_low: float = math.nan  # lower quartile
    gain_needed: float = math.nan  # infinite if nothing could repay the switch in time
    switch_cost_s: float = math.nan
    horizon_s: float = math.nan
    upcoming: Plan | None = None

    @property
    def is_switch(self) -> bool:
        """Whether the plan changes."""
        return self.chosen != self.current

    def to_json(self) -> dict[str, Any]:
        """Plain values for the event log; None for what is infinite or was not weighed."""
        names = ("gain", "gain_low", "gain_needed", "switch_cost_s", "horizon_s")
        numbers = {name: getattr(self, name) for name in names}
        return {
            "chosen": str(self.chosen),
            "current": str(self.current),
            "reason": self.reason,
            "upcoming": None if self.upcoming is None else str(self.upcoming),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        }
