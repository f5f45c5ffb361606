"""A run without a job: steps of a world that is known, decided on and logged as those of a real run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.cost.hardware import shared_cpu
from copus_ext.core.cost.memory_model import MemoryModel
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.events import Event, plain
from copus_ext.core.noise.noise_tracker import MeasuredStep, NoiseTracker
from copus_ext.core.noise.step_noise import StepEstimate
from copus_ext.core.plan import Plan
from copus_ext.core.planner.deciding import decide
from copus_ext.core.planner.knowledge import Knowledge, measured_step_json
from copus_ext.core.planner.policy import PolicySettings
from copus_ext.core.planner.registry import make_policy
from copus_ext.core.planner.space import parse_space
from copus_ext.core.planner.switch_cost import RunningMean, SwitchCost

MODEL = ModelShape(layers=4, hidden=256, heads=8, kv_heads=8, ffn=1024, vocab=256, seq=64)
HARDWARE = shared_cpu(cores=2, ranks=4, memory_bytes=24e9)


@dataclass
class World:
    """What is true, and how it is seen.

    ``noise_scale`` by consumed samples; ``step_time_s`` of a plan before noise; gradients of ``dimensions`` equal
    eigenvalues, in ``groups`` groups a step; the loss falls as dL/dE = -SE(B) k E^-1.3 with c = ``c``.
    """

    noise_scale: Callable[[float], float]
    step_time_s: Callable[[Plan], float]
    c: float = 2.0
    step_sd: float = 0.03
    dimensions: float = 30.0
    groups: int = 4
    seed: int = 0
    refused: dict[Plan, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._loss = 4.0

    def estimate(self, batch: int, samples: float) -> StepEstimate:
        """N and S of one step, with the variances of Gaussian gradients; |G|^2 is 1."""
        trace = self.noise_scale(samples)
        square = trace**2 / self.dimensions
        n = self.groups
        var_n = 4 * trace / self.dimensions / batch + 2 * square / batch**2 * n / (n - 1)
        var_s = 2 * square / (n - 1)
        z = self._random.standard_normal(2)
        return StepEstimate(1.0 + math.sqrt(var_n) * z[0], trace + math.sqrt(var_s) * z[1])

    def seconds(self, plan: Plan) -> float:
        """Of one step."""
        return self.step_time_s(plan) * math.exp(self.step_sd * self._random.standard_normal())

    def loss(self, batch: int, samples: float) -> float:
        """Of one step, from whose samples the model then learns."""
        seen = self._loss + 0.5 / math.sqrt(batch) * self._random.standard_normal()
        efficiency = 1.0 / (1.0 + batch / (self.c * self.noise_scale(samples)))
        self._loss -= 2.0 * efficiency * batch * max(samples, 100.0) ** -1.3
        return float(seen)


def simulate(
    world: World,
    settings: PolicySettings,
    base: Plan,
    steps: int,
    space: str = "gbs=4..256",
    interval: int = 20,
    switch_s: float = 0.3,
) -> list[Event]:
    """The events of a run of so many steps of ``base`` in samples, through JSON and back as a log has them."""
    events: list[Event] = []
    train_samples = steps * base.global_batch
    policy = make_policy(settings, base)
    candidates = parse_space(space).plans(base, MODEL).with_first(base) if policy.searches else Candidates(())
    throughput = ThroughputModel(MODEL, HARDWARE)
    known = Knowledge(
        plan=base,
        candidates=candidates,
        noise=NoiseTracker.start("auto", half_life_tokens=100.0 * base.global_batch * MODEL.seq),
        throughput=throughput,
        memory=MemoryModel(MODEL, HARDWARE.memory_bytes),
        switch_cost=SwitchCost(RunningMean(1.0)),
    )
    iteration = samples = 0

    def record(event: str, **fields: object) -> None:
        nonlocal known
        written = {"event": event, "time_s": 0.0, "iteration": iteration, "consumed_samples": samples}
        happened = plain({**written, **fields})
        known = known.after(happened)
        events.append(json.loads(json.dumps(happened, allow_nan=False)))

    record(
        "run_start",
        resumed_from=None,
        base=base.to_json(),
        settings=settings.to_json(),
        space=space,
        searches=policy.searches,
        noise_estimator="auto",
        train_samples=train_samples,
        model=asdict(MODEL),
        knowledge=known.to_json(),
    )
    while samples + known.plan.global_batch <= train_samples:
        batch = known.plan.global_batch
        loss, seconds = world.loss(batch, samples), world.seconds(known.plan)
        iteration, samples = iteration + 1, samples + batch
        record("step", loss=loss, step_time_s=seconds, plan=str(known.plan), rate_share=1.0)
        measured = MeasuredStep(iteration, world.estimate(batch, samples), None, 64.0 * batch, batch, 1.0)
        record("noise_scale", steps=[measured_step_json(measured)])
        if iteration % interval:
            continue
        situation = known.situation(iteration, samples, train_samples)
        decision, refused = decide(policy, situation, world.refused.get)
        told = [[plan.to_json(), why] for plan, why in refused.items()]
        record("decision", **decision.to_json(), refused=told, rate_noise_scale=None)
        if decision.is_switch:
            cost = switch_s if decision.chosen.layout != decision.current.layout else 0.005
            record(
                "switch",
                **{"from": str(decision.current), "to": str(decision.chosen)},
                parts=decision.chosen.to_json(),
                seconds={"move": cost},
            )
    return events


def plans_of(events: list[Event]) -> list[tuple[int, str]]:
    """Where the run went: iteration of each switch, and the plan."""
    return [(event["iteration"], event["to"]) for event in events if event["event"] == "switch"]
