"""How long a decision takes: ``python tools/bench_decision.py [--candidates 10000]``; prints JSON.

A model of 13 billion parameters on 64 H100s, with plans in every dimension; times of the policy ``copus``, of what is
worked out once when a run starts, and of taking in one step and one measured noise scale. Medians over ``--repeats``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.cost.hardware_file import load_hardware
from copus_ext.core.cost.memory_model import MemoryModel
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.noise.noise_tracker import MeasuredStep, NoiseTracker
from copus_ext.core.noise.step_noise import StepEstimate
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.knowledge import Knowledge, measured_step_json
from copus_ext.core.planner.policy import PolicySettings
from copus_ext.core.planner.registry import make_policy
from copus_ext.core.planner.space import parse_space
from copus_ext.core.planner.switch_cost import first_switch_cost

_MODEL = ModelShape(layers=40, hidden=5120, heads=40, kv_heads=40, ffn=20480, vocab=51200, seq=2048, param_bytes=2)
_SPACE = "recompute=any zero1=any vpp=any mbs=1,2,4,8 gbs=16..16384"
_BASE = Plan(Layout(dp=32, tp=2, sequence_parallel=True, distributed_optimizer=True), 1, 256)
_MEASURED_PLANS = 12


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=20)
    flags = parser.parse_args()
    start = time.perf_counter()
    every = parse_space(_SPACE).plans(_BASE, _MODEL)
    spaced_s = time.perf_counter() - start
    candidates = Candidates(every.plans[: flags.candidates]).with_first(_BASE)
    start = time.perf_counter()
    _ = candidates.table, candidates.row_of, candidates.layouts
    columns_s = time.perf_counter() - start
    known = _known(candidates)
    policy = make_policy(PolicySettings(), _BASE)
    step = {"event": "step", "loss": 3.0, "step_time_s": 5.0, "consumed_samples": 30_000, "rate_share": 1.0}
    noise = {"event": "noise_scale", "steps": [measured_step_json(_measured(100))]}
    figures = {
        "candidates": len(candidates),
        "decision_ms": _median_ms(lambda: policy.decide(known.situation(100, 25_600, 10**7)).to_json(), flags.repeats),
        "step_event_ms": _median_ms(lambda: known.after(step), flags.repeats),
        "noise_event_ms": _median_ms(lambda: known.after(noise), flags.repeats),
        "once_columns_ms": round(1e3 * columns_s, 3),
        "once_space_ms": round(1e3 * spaced_s, 3),
        "plans_in_space": len(every),
    }
    print(json.dumps(figures))


def _known(candidates: Candidates) -> Knowledge:
    """What a run knows that has tried a few plans."""
    hardware = load_hardware("h100")
    throughput = ThroughputModel(_MODEL, hardware)
    for plan in (_BASE, *candidates.plans[:: max(1, len(candidates) // _MEASURED_PLANS)]):
        for number in range(64):
            throughput = throughput.observe(plan, 5.0 + 0.001 * number)
    known = Knowledge(
        plan=_BASE,
        candidates=candidates,
        noise=NoiseTracker.start("auto", 1e9),
        throughput=throughput,
        memory=MemoryModel(_MODEL, hardware.memory_bytes),
        switch_cost=first_switch_cost(_MODEL, hardware, _BASE.layout.world_size),
    )
    for iteration in range(1, 101):
        known = known.after({"event": "noise_scale", "steps": [measured_step_json(_measured(iteration))]})
    return replace(known, steps_since_switch=100)


def _measured(iteration: int) -> MeasuredStep:
    swing = 0.1 * (-1) ** iteration
    return MeasuredStep(iteration, StepEstimate(1.0 + swing, 1000.0 * (1.0 + swing)), None, 524_288.0, 256.0, 1e-4)


def _median_ms(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(times), 3)


if __name__ == "__main__":
    main()
