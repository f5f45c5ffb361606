"""What a run knows of its noise scale: by every estimator, over switches, and through a checkpoint."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from copus_ext.core.noise.grouping import ESTIMATORS, Grouping
from copus_ext.core.noise.noise_scale import StepEstimate
from copus_ext.core.noise.noise_tracker import MeasuredStep, NoiseTracker
from copus_ext.core.plan import Layout, Plan
from copus_ext.run.noise_meter import GradientMeter

OLD = Plan(Layout(dp=4), 2, 32)


def measured(count: int, seed: int = 0, factor: float = 1.0) -> list[MeasuredStep]:
    """Steps of noise scale 20 on which norm layers read half of it; every fourth is measured in full."""
    random = np.random.default_rng(seed)
    steps = []
    for number in range(count):
        n, s = 1.0 + 0.5 * random.standard_normal(), 20.0 + 2.0 * random.standard_normal()
        full = StepEstimate(n, factor * s)
        cheap = StepEstimate(0.1 * n, 0.05 * factor * s)
        steps.append(MeasuredStep(number, cheap, full if number % 4 == 0 else None, 2048, 32, 1e-4))
    return steps


def after(tracker: NoiseTracker, steps: list[MeasuredStep]) -> NoiseTracker:
    for step in steps:
        tracker = tracker.update(step)
    return tracker


def value_of(tracker: NoiseTracker) -> float:
    estimate = tracker.estimate()
    assert estimate is not None
    return estimate.value


def test_norm_layers_are_corrected_and_others_taken_as_they_are() -> None:
    steps = measured(200)
    assert value_of(after(NoiseTracker.start("layernorm", 1e9), steps)) == pytest.approx(20.0, rel=0.15)
    assert value_of(after(NoiseTracker.start("auto", 1e9), steps)) == pytest.approx(10.0, rel=0.15)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_is_known_before_the_first_step_and_all_is_after_a_checkpoint(estimator: str) -> None:
    start = NoiseTracker.start(estimator, 1e6)
    assert start.estimate() is None
    first = after(start, measured(30)).after_switch(OLD, Plan(Layout(pp=4), 2, 32))
    loaded = NoiseTracker.from_json(json.loads(json.dumps(first.to_json())))
    assert loaded == first
    assert after(loaded, measured(30, seed=1)) == after(first, measured(30, seed=1))


def test_a_resumed_run_goes_on_with_what_measured_the_same_thing() -> None:
    saved = after(NoiseTracker.start("auto", 1e6), measured(30))
    resumed = NoiseTracker.start("sketch", 2e6).carried_on(saved)
    assert value_of(resumed) == value_of(saved)
    assert resumed == NoiseTracker.start("sketch", 2e6).carried_on(resumed), "the half-life is for the flags to say"
    for other in ("adam", "layernorm"):
        assert NoiseTracker.start(other, 1e6).carried_on(saved).estimate() is None


def test_a_switch_that_changes_the_gradients_is_suspect_and_others_are_not() -> None:
    before = after(NoiseTracker.start("auto", 1e9), measured(40))
    layout, batch = Plan(Layout(pp=4), 2, 32), Plan(Layout(dp=4), 2, 64)

    def suspect(new: Plan, factor: float) -> bool | None:
        verdict = after(before.after_switch(OLD, new), measured(20, seed=3, factor=factor)).verdict()
        return None if verdict is None else verdict.suspect

    assert suspect(layout, 1.0) is False
    assert suspect(layout, 2.0) is True
    assert suspect(batch, 2.0) is None, "with the batch, the gradients may change"


class Collector:
    """Stands for :class:`GradientNoise`: hands out numbers every fourth step, and remembers when it was attached."""

    batch = 8

    def __init__(self, name: str) -> None:
        self.grouping, self.attached, self.kept = Grouping(name, 1, 4, 4), False, 0

    def attach(self) -> None:
        self.attached = True

    def detach(self) -> None:
        self.attached = False

    def step(self, grad_norm: float | None) -> list[StepEstimate]:
        assert self.attached
        self.kept += 1
        return self.flush() if self.kept == 4 else []

    def flush(self) -> list[StepEstimate]:
        told, self.kept = [StepEstimate(1.0, 2.0)] * self.kept, 0
        return told


def test_the_first_steps_and_one_in_sixteen_are_measured_in_full() -> None:
    made: dict[str, Any] = {}

    def collector_of(name: str) -> Any:
        made[name] = Collector(name)
        return made[name]

    meter = GradientMeter(collector_of, "layernorm", "adam", seq_length=64)
    with meter:
        told = [step for number in range(1, 42) for step in meter.step(number, 1.0, 1e-3)] + meter.flush()
        assert made["layernorm"].attached
    assert not made["layernorm"].attached
    assert not made["auto"].attached
    assert [step.iteration for step in told] == list(range(1, 42))
    assert [step.iteration for step in told if step.full] == [*range(1, 9), 16, 32]
    assert {(step.tokens, step.batch) for step in told} == {(8 * 64, 8)}
