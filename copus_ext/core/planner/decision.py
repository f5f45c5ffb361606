"""What a decision is made from, and what it is: values that can be logged and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.efficiency.critical_ratio import CriticalRatio
from copus_ext.core.noise.noise_scale import NoiseEstimate
from copus_ext.core.noise.step_noise import StepEstimate
from copus_ext.core.plan import Plan
from copus_ext.core.planner.switch_cost import SwitchCost


@dataclass(frozen=True)
class Situation:
    """Everything a policy may look at. The time left follows from the samples left and the throughput.

    Attributes:
        noise: the smoothed noise scale; None before the first measured step.
        recent: mean of what the steps since the last decision gave, each counting alike; None where none was measured.
        critical_ratio: what is known of c, critical batch / noise scale.
        rejected: plans that can't be chosen now, with the reason: memory, upstream's validation, switches that failed.
        rate_share: the scheduled learning rate as a share of its peak; 1 until the warm-up is over.
        decisions: how many were made before this one.
        elapsed_s: seconds of steps so far.
        probed_s: seconds spent on branches that measured c.
        can_probe: whether there can be such branches.
    """

    iteration: int
    consumed_samples: int
    train_samples: int
    current: Plan
    steps_since_switch: int
    noise: NoiseEstimate | None
    throughput: ThroughputModel
    switch_cost: SwitchCost
    candidates: Candidates
    rejected: Mapping[Plan, str] = field(default_factory=dict)
    critical_ratio: CriticalRatio = field(default_factory=CriticalRatio)
    recent: StepEstimate | None = None
    rate_share: float = 1.0
    decisions: int = 0
    elapsed_s: float = 0.0
    probed_s: float = 0.0
    can_probe: bool = False

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
class Probe:
    """A branch that measures c: from here ``samples`` sequences under ``plan``, then back, and on as before."""

    plan: Plan
    samples: int


@dataclass(frozen=True)
class Decision:
    """The plan to go on with, and the numbers that say so. Gains are ratios - 1 of the best other candidate.

    Attributes:
        candidates: how the plans were seen that matter most; ``unlisted`` counts the others.
        gain: median; ``gain_low`` and ``gain_high`` are its quartiles.
        gain_needed: what it has to exceed; infinite where nothing could repay the switch in time.
        upcoming: the plan that is likeliest to be switched to next, for which groups and buffers may be made ready.
        probe: a branch to be made before training goes on under the current plan.
    """

    chosen: Plan
    current: Plan
    reason: str
    candidates: tuple[CandidateScore, ...] = ()
    unlisted: int = 0
    gain: float = math.nan  # these are not numbers where the policy weighs no gains
    gain_low: float = math.nan
    gain_high: float = math.nan
    gain_needed: float = math.nan
    switch_cost_s: float = math.nan
    horizon_s: float = math.nan
    upcoming: Plan | None = None
    probe: Probe | None = None

    @property
    def is_switch(self) -> bool:
        """Whether the plan changes."""
        return self.chosen != self.current

    def to_json(self) -> dict[str, Any]:
        """Plain values for the event log; None for what is infinite or was not weighed."""
        names = ("gain", "gain_low", "gain_high", "gain_needed", "switch_cost_s", "horizon_s")
        numbers = {name: getattr(self, name) for name in names}
        probe = None if self.probe is None else {"plan": str(self.probe.plan), "samples": self.probe.samples}
        return {
            "chosen": str(self.chosen),
            "current": str(self.current),
            "reason": self.reason,
            "upcoming": None if self.upcoming is None else str(self.upcoming),
            "probe": probe,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "unlisted": self.unlisted,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        }
