"""What a run has learned: a value that every event of its log moves on, so that a log can be gone through again.

A run records an event and takes it in by the same call (``copus_ext.run.telemetry``). What it knows when it decides is
therefore what the log says, no more: :mod:`copus_ext.core.planner.replay` goes through the log and comes to the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.cost.memory_model import MemoryModel
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.efficiency.critical_batch import Interval
from copus_ext.core.efficiency.critical_ratio import PROBE, CriticalRatio, EfficiencyRatio, from_slopes
from copus_ext.core.efficiency.loss_trend import LossTrend
from copus_ext.core.events import Event
from copus_ext.core.noise.grouping import why_avoided
from copus_ext.core.noise.noise_tracker import MeasuredStep, NoiseTracker
from copus_ext.core.noise.step_noise import StepEstimate
from copus_ext.core.plan import Plan, plan_from_json
from copus_ext.core.planner.decision import Situation
from copus_ext.core.planner.switch_cost import SwitchCost

UNSETTLED_STEPS = 2  # after a switch: their times say more about caches than about the plan


@dataclass(frozen=True)
class Recent:
    """Sums over the steps measured since the last decision or switch."""

    steps: int = 0
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of N, S and P

    def add(self, estimate: StepEstimate) -> Recent:
        """With one more step; one that is not finite says nothing. P is not finite where nobody asked for it."""
        if not (math.isfinite(estimate.N) and math.isfinite(estimate.S)):
            return self
        n, s, p = (total + value for total, value in zip(self.sums, estimate, strict=True))
        return Recent(self.steps + 1, (n, s, p))

    def mean(self) -> StepEstimate | None:
        """Each step counting alike; None without steps."""
        return StepEstimate(*(total / self.steps for total in self.sums)) if self.steps else None


@dataclass(frozen=True)
class Knowledge:
    """The estimators as they stand. :meth:`after` takes in one event.

    Attributes:
        plan: in force.
        candidates: the plans to choose from.
        avoided: candidates that the run keeps away from, with the reason (:func:`plans_avoided`).
        rejected: plans that upstream refused or a switch to which failed; what memory speaks against comes on top.
        rate_noise_scale: in sequences, what learning rates are by that follow it; ``inf`` until one is known.
        rate_share: the scheduled learning rate as a share of its peak, 1 until the warm-up is over.
        elapsed_s: seconds of steps.
        probed_s: seconds spent on branches that measured c.
        can_probe: whether there can be such branches; they need validation sequences.
    """

    plan: Plan
    candidates: Candidates
    noise: NoiseTracker
    throughput: ThroughputModel
    memory: MemoryModel
    switch_cost: SwitchCost
    critical_ratio: CriticalRatio = field(default_factory=CriticalRatio)
    trend: LossTrend = field(default_factory=LossTrend)
    recent: Recent = field(default_factory=Recent)
    avoided: Mapping[Plan, str] = field(default_factory=dict)
    rejected: Mapping[Plan, str] = field(default_factory=dict)
    rate_noise_scale: float = math.inf
    rate_share: float = 1.0
    steps_since_switch: int = 0
    decisions: int = 0
    elapsed_s: float = 0.0
    probed_s: float = 0.0
    can_probe: bool = False

    def after(self, event: Event) -> Knowledge:
        """What is known when ``event`` has happened; most kinds of events teach nothing."""
        teaches = _TEACHES.get(event["event"])
        return self if teaches is None else teaches(self, event)

    def objections(self) -> dict[Plan, str]:
        """Which candidates can't be chosen now, and why: refused for good, or by what memory is thought to do."""
        return {**self.memory.objections(self.candidates), **self.avoided, **self.rejected}

    def situation(self, iteration: int, consumed_samples: int, train_samples: int) -> Situation:
        """What a policy is shown."""
        return Situation(
            iteration=iteration,
            consumed_samples=consumed_samples,
            train_samples=train_samples,
            current=self.plan,
            steps_since_switch=self.steps_since_switch,
            noise=self.noise.estimate(),
            throughput=self.throughput,
            switch_cost=self.switch_cost,
            candidates=self.candidates,
            rejected=self.objections(),
            critical_ratio=self.critical_ratio,
            recent=self.recent.mean(),
            rate_share=self.rate_share,
            decisions=self.decisions,
            elapsed_s=self.elapsed_s,
            probed_s=self.probed_s,
            can_probe=self.can_probe,
        )

    def with_rejected(self, plan: Plan, why: str) -> Knowledge:
        """With a plan that is not to be chosen any more."""
        return replace(self, rejected={**self.rejected, plan: why})

    def to_json(self) -> dict[str, Any]:
        """Plain values without infinities; all but candidates and those avoided, which follow from the flags."""
        return {
            "plan": self.plan.to_json(),
            "noise": self.noise.to_json(),
            "throughput": self.throughput.to_json(),
            "memory": self.memory.to_json(),
            "switch_cost": self.switch_cost.to_json(),
            "critical_ratio": self.critical_ratio.to_json(),
            "trend": self.trend.to_json(),
            "recent": [self.recent.steps, *self.recent.sums] if self.recent.steps else None,
            "rejected": [[plan.to_json(), why] for plan, why in self.rejected.items()],
            "rate_noise_scale": self.rate_noise_scale if math.isfinite(self.rate_noise_scale) else None,
            **{name: getattr(self, name) for name in _PLAIN},
        }

    @staticmethod
    def from_json(
        values: Mapping[str, Any], candidates: Candidates, avoided: Mapping[Plan, str] | None = None
    ) -> Knowledge:
        """Inverse of :meth:`to_json`, to the last bit. What an earlier version saved has less; the rest starts anew."""
        throughput = ThroughputModel.from_json(values["throughput"])
        capacity = values["memory"].get("capacity", throughput.hardware.memory_bytes)
        memory = MemoryModel(throughput.model, capacity, throughput.options).restored(values["memory"])
        recent, scale = values.get("recent"), values.get("rate_noise_scale")
        return Knowledge(
            plan=plan_from_json(values["plan"]),
            candidates=candidates,
            noise=NoiseTracker.from_json(values["noise"]),
            throughput=throughput,
            memory=memory,
            switch_cost=SwitchCost.from_json(values["switch_cost"]),
            critical_ratio=CriticalRatio.from_json(values.get("critical_ratio", {"observations": ()})),
            trend=LossTrend.from_json(values["trend"]) if "trend" in values else LossTrend(),
            recent=Recent() if recent is None else Recent(recent[0], _three(recent[1:])),
            avoided=avoided or {},
            rejected={plan_from_json(plan): why for plan, why in values.get("rejected", ())},
            rate_noise_scale=math.inf if scale is None else float(scale),
            **{name: values[name] for name in _PLAIN if name in values},
        )


_PLAIN = ("rate_share", "steps_since_switch", "decisions", "elapsed_s", "probed_s", "can_probe")


def _number(value: float | None) -> float:
    """Of the log, where what is not finite is null."""
    return math.nan if value is None else float(value)


def plans_avoided(candidates: Candidates, base: Plan, estimator: str) -> dict[Plan, str]:
    """Candidates under which too little would be learned of the noise scale, each with the reason."""
    return {plan: why for plan in candidates if (why := why_avoided(plan, base, estimator))}


def _three(values: list[float | None]) -> tuple[float, float, float]:
    n, s, p = map(_number, values)
    return n, s, p


def measured_step_json(step: MeasuredStep) -> list[float | None]:
    """``[iteration, N, S, P, batch, tokens, temperature, full N, full S]``."""
    full = (math.nan, math.nan) if step.full is None else step.full[:2]
    return [step.iteration, *step.estimate, step.batch, step.tokens, step.temperature, *full]


def measured_step_from_json(values: list[float | None]) -> MeasuredStep:
    """Inverse of :func:`measured_step_json`; a full measurement that is not finite is none, as for the tracker."""
    n, s, p, batch, tokens, temperature, *full = map(_number, values[1:])
    whole = StepEstimate(*full)
    known = math.isfinite(whole.N) and math.isfinite(whole.S)
    return MeasuredStep(
        int(values[0] or 0), StepEstimate(n, s, p), whole if known else None, tokens, batch, temperature
    )


# -- what events teach


def _step(known: Knowledge, event: Event) -> Knowledge:
    taken = known.steps_since_switch + 1
    throughput = known.throughput
    if taken > UNSETTLED_STEPS:
        throughput = throughput.observe(known.plan, event["step_time_s"])
    trend = known.trend.step(event["loss"], known.plan.global_batch, event["consumed_samples"])
    return replace(
        known,
        throughput=throughput,
        trend=trend,
        critical_ratio=_learned(known, trend, event["consumed_samples"]),
        steps_since_switch=taken,
        elapsed_s=known.elapsed_s + event["step_time_s"],
        rate_share=event["rate_share"],
    )


def _learned(known: Knowledge, trend: LossTrend, consumed_samples: int) -> CriticalRatio:
    """What the losses around a change of the batch say of c, when they have come to say something."""
    noise, slopes = known.noise.estimate(), trend.observation()
    if noise is None or slopes is None:
        return known.critical_ratio
    return known.critical_ratio.observe(from_slopes(slopes, consumed_samples, noise))


def _noise_scale(known: Knowledge, event: Event) -> Knowledge:
    noise, recent = known.noise, known.recent
    for values in event["steps"]:
        step = measured_step_from_json(values)
        noise, recent = noise.update(step), recent.add(step.estimate)
    return replace(known, noise=noise, recent=recent)


def _memory(known: Knowledge, event: Event) -> Knowledge:
    return replace(known, memory=known.memory.observe(plan_from_json(event["parts"]), event["peak_bytes"]))


def _switch(known: Knowledge, event: Event) -> Knowledge:
    old, new = known.plan, plan_from_json(event["parts"])
    seconds = sum(event["seconds"].values()) - event["seconds"].get("rehearse", 0.0)  # a plan is rehearsed once
    trend, ratio = known.trend, known.critical_ratio
    if old.global_batch != new.global_batch:
        trend = trend.batch_changed()
        ratio = _learned(known, trend, event["consumed_samples"])
    return replace(
        known,
        plan=new,
        switch_cost=known.switch_cost.observe(old, new, seconds),
        throughput=known.throughput.later(),
        noise=known.noise.after_switch(old, new),
        trend=trend,
        critical_ratio=ratio,
        recent=Recent(),  # of steps under one plan only
        steps_since_switch=0,
    )


def _fault(known: Knowledge, event: Event) -> Knowledge:
    if event["kind"] == "probe":
        return replace(known, can_probe=False, steps_since_switch=0)
    if event["kind"] not in ("switch", "memory"):
        return known
    plan = plan_from_json(event["parts"])
    memory = known.memory.ran_out(plan) if event["kind"] == "memory" else known.memory
    return replace(known.with_rejected(plan, event["message"]), memory=memory, steps_since_switch=0)


def _decision(known: Knowledge, event: Event) -> Knowledge:
    for plan, why in event["refused"]:
        known = known.with_rejected(plan_from_json(plan), why)
    scale = event["rate_noise_scale"]
    return replace(
        known,
        recent=Recent(),
        decisions=known.decisions + 1,
        rate_noise_scale=math.inf if scale is None else scale,
    )


def _probe(known: Knowledge, event: Event) -> Knowledge:
    spent = replace(known, probed_s=known.probed_s + event["seconds"], steps_since_switch=0)
    if event["log_ratio"] is None:
        return spent
    found = EfficiencyRatio(
        PROBE,
        event["start_samples"],
        event["batch_from"],
        event["batch_to"],
        event["log_ratio"],
        event["log_sd"],
        *_interval(event["noise_scale"]),
    )
    return replace(spent, critical_ratio=spent.critical_ratio.observe(found))


def _interval(values: list[float | None]) -> Interval:
    """An end that is open, or a value that is, is null in the log."""
    value, low, high = values
    return Interval(*(math.inf if end is None else end for end in (value, low, high)))


_TEACHES: dict[str, Callable[[Knowledge, Event], Knowledge]] = {
    "step": _step,
    "noise_scale": _noise_scale,
    "memory": _memory,
    "switch": _switch,
    "fault": _fault,
    "decision": _decision,
    "probe": _probe,
}
