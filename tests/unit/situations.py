"""Situations for policies to decide in: step times that are known, and a noise scale as wide as wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.cost.hardware import shared_cpu
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.noise.noise_scale import NoiseEstimate
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.decision import Situation
from copus_ext.core.planner.switch_cost import RunningMean, SwitchCost

MODEL = ModelShape(layers=4, hidden=256, heads=8, kv_heads=8, ffn=1024, vocab=256, seq=64)
DATA, PIPE = Layout(dp=4), Layout(pp=4)
CURRENT = Plan(DATA, 1, 16)
SIZES = (4, 8, 16, 32, 64)


def known(value: float) -> NoiseEstimate:
    return NoiseEstimate(value, 0.98 * value, 1.02 * value, N=1.0, S=value, n_eff=500.0)


def measured(seconds: Mapping[Plan, float]) -> ThroughputModel:
    """Many equal steps of each plan: hardly anything is left to doubt."""
    model = ThroughputModel(MODEL, shared_cpu(cores=2, ranks=4, memory_bytes=24e9))
    for plan, step_time in seconds.items():
        for _ in range(50):
            model = model.observe(plan, step_time)
    return model


def line(layout: Layout, t0: float, t1: float) -> dict[Plan, float]:
    return {Plan(layout, 1, batch): t0 + t1 * batch for batch in SIZES}


def situation(
    seconds: Mapping[Plan, float], noise: NoiseEstimate | None, layout_cost: float = 1.0, **changes: object
) -> Situation:
    base = Situation(
        iteration=100,
        consumed_samples=1600,
        train_samples=101_600,
        current=CURRENT,
        steps_since_switch=100,
        noise=noise,
        throughput=measured(seconds),
        switch_cost=SwitchCost(RunningMean(layout_cost, 1), RunningMean(0.01, 1)),
        candidates=Candidates(tuple(seconds)),
    )
    return replace(base, **changes)  # type: ignore[arg-type]
