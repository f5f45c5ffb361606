"""A run is simulated and logged, and its decisions are made again from the log."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.events import Event, plain
from copus_ext.core.noise.noise_tracker import MeasuredStep
from copus_ext.core.noise.step_noise import StepEstimate
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.knowledge import Knowledge, measured_step_from_json, measured_step_json
from copus_ext.core.planner.policy import PolicySettings
from copus_ext.core.planner.replay import replay
from copus_ext.core.planner.space import parse_space
from copus_ext.run.knowledge import carried_on
from tests.unit.simulated_run import MODEL, World, plans_of, simulate

BASE = Plan(Layout(dp=4), 1, 16)
REFUSED = Plan(Layout(pp=4), 1, 8)  # what the run would try first


def step_time_s(plan: Plan) -> float:
    """Pipelines save time that does not depend on the batch, and lose some that does."""
    return 0.25 / plan.layout.pp + (0.05 + 0.002 * plan.layout.pp + 0.02 * (plan.layout.tp - 1)) * plan.global_batch


@cache
def recorded(policy: str = "copus") -> list[Event]:
    """A run whose noise scale grows from 2 to 160."""
    world = World(lambda samples: 2.0 + samples / 40, step_time_s, refused={REFUSED: "upstream says no"})
    schedule = "0:dp4,mbs1,gbs16 800:pp4,mbs1,gbs32" if policy == "schedule" else None
    return simulate(world, PolicySettings(policy, schedule=schedule, probe_budget=0.0), BASE, steps=400)


@pytest.mark.parametrize("policy", ["copus", "static", "schedule"])
def test_every_decision_is_made_again_to_the_last_bit(policy: str) -> None:
    events = recorded(policy)
    again = list(replay(events))
    assert len(again) == sum(event["event"] == "decision" for event in events) > 5
    assert [each.differences for each in again] == [()] * len(again)


def test_it_would_notice_a_last_bit() -> None:
    events = json.loads(json.dumps(recorded()))
    for event in events:
        if event["event"] == "step":
            event["step_time_s"] *= 1 + 1e-15
    assert any(each.differences for each in replay(events))


def test_other_settings_tell_what_would_have_been_decided() -> None:
    assert len(plans_of(recorded())) > 1
    cautious = list(replay(recorded(), {"switch_rule": "threshold:9"}))
    assert not any(each.decision.reason.startswith("switch") for each in cautious)
    static = list(replay(recorded(), {"policy": "static"}))
    assert {each.decision.reason for each in static} == {"stay: the policy is static"}
    narrow = list(replay(recorded(), space="tp=1 pp=1 gbs=16,32"))
    assert {
        str(score.plan)
        for each in narrow
        for score in each.decision.candidates
        if each.recorded["current"] == str(BASE)
    } == {str(BASE), str(BASE.with_batch(32))}


def test_a_plan_that_was_refused_on_the_way_is_refused_again() -> None:
    refused = [event["refused"] for event in recorded() if event["event"] == "decision" and event["refused"]]
    assert refused, "the run never came across the plan"
    assert sum(map(len, refused)) == 1, "it was asked for again"
    assert str(REFUSED) not in [plan for _, plan in plans_of(recorded())]


def test_what_is_known_survives_a_checkpoint_in_mid_run() -> None:
    """Saved as JSON after every 50th event and read again, the rest of the log teaches the same."""
    events = recorded()
    candidates = parse_space("gbs=4..256").plans(BASE, MODEL)
    known = Knowledge.from_json(events[0]["knowledge"], candidates)
    again = known
    for number, event in enumerate(events):
        known = known.after(event)
        again = again.after(event)
        if number % 50 == 0:
            again = Knowledge.from_json(json.loads(json.dumps(plain(again.to_json()), allow_nan=False)), candidates)
    assert plain(again.to_json()) == plain(known.to_json())
    assert known.steps_since_switch > 0
    assert known.rejected == {REFUSED: "upstream says no"}


def test_a_failed_switch_is_known_of_and_one_without_memory_too() -> None:
    known = Knowledge.from_json(recorded()[0]["knowledge"], Candidates((BASE, REFUSED)))
    fault = {"event": "fault", "message": "no room", "plan": str(REFUSED), "parts": REFUSED.to_json()}
    assert known.after({**fault, "kind": "switch"}).objections() == {REFUSED: "no room"}
    assert REFUSED in known.after({**fault, "kind": "memory"}).memory.exhausted
    assert known.after({**fault, "kind": "prepare"}) == known
    assert not known.after({**fault, "kind": "probe"}).can_probe


@pytest.mark.parametrize("full", [None, StepEstimate(3.0, 4.0)])
def test_a_measured_step_comes_back_from_the_log(full: StepEstimate | None) -> None:
    step = MeasuredStep(7, StepEstimate(-0.1, 2.0, 0.5), full, 1024.0, 16.0, 1e-4)
    assert measured_step_from_json(json.loads(json.dumps(plain(measured_step_json(step))))) == step
    spoiled = step._replace(estimate=StepEstimate(math.nan, 1.0, math.nan))
    back = measured_step_from_json(json.loads(json.dumps(plain(measured_step_json(spoiled)))))
    assert math.isnan(back.estimate.N)
    assert back.estimate.S == 1.0


def test_a_log_without_knowledge_says_so() -> None:
    old = [{key: value for key, value in recorded()[0].items() if key != "knowledge"}]
    with pytest.raises(ValueError, match="can't be replayed"):
        list(replay(old))
    with pytest.raises(ValueError, match="run_start"):
        list(replay(recorded()[1:3]))


@pytest.mark.parametrize(("noise", "seed"), [(16.0, 0), (60.0, 1), (200.0, 2)])
def test_under_a_stationary_noise_scale_plans_are_not_changed_back_and_forth(noise: float, seed: int) -> None:
    """At most one switch per 1,000 steps once plans have been tried out; steps scatter by 10 %, gradients by a lot."""
    world = World(lambda samples: noise, step_time_s, step_sd=0.1, dimensions=8.0, seed=seed)
    events = simulate(world, PolicySettings(probe_budget=0.0), BASE, steps=1200)
    steps = max(event["iteration"] for event in events)
    late = [iteration for iteration, _ in plans_of(events) if iteration > 300]
    assert steps > 700
    assert len(late) <= max(1, steps / 1000)


def test_a_policy_may_open_dimensions_that_the_flag_does_not_name() -> None:
    """Mist chooses recompute and ZeRO-1; a run that was static is replayed under it."""
    again = list(replay(recorded("static"), {"policy": "layout-only"}, space="tp=1 pp=1 gbs=16"))
    plans = {score.plan.layout for each in again for score in each.decision.candidates}
    assert {layout.recompute for layout in plans} == {"none", "selective", "full"}
    assert {layout.distributed_optimizer for layout in plans} == {True, False}
    named = list(replay(recorded("static"), {"policy": "layout-only"}, space="tp=1 pp=1 gbs=16 zero1=off"))
    assert not any(s.plan.layout.distributed_optimizer for each in named for s in each.decision.candidates)


def test_a_run_resumed_on_a_device_with_other_memory_is_replayed_with_that_memory() -> None:
    """Step times stay those of the saved run's hardware; what fits is what fits now."""
    start = recorded()[0]
    candidates = parse_space("gbs=4..256").plans(BASE, MODEL)
    saved = Knowledge.from_json(start["knowledge"], candidates)
    needed = saved.memory.predict(candidates.table)
    small = replace(saved.memory, capacity=float(np.median(needed)) / 0.9)
    resumed = carried_on(replace(saved, memory=small), saved, hardware_is_named=False)
    again = Knowledge.from_json(json.loads(json.dumps(plain(resumed.to_json()))), candidates)
    assert 0 < len(resumed.objections()) < len(candidates)
    assert again.objections() == resumed.objections()


def test_what_an_earlier_version_saved_is_gone_on_from() -> None:
    kept = ("plan", "noise", "throughput", "memory", "switch_cost")
    old = {name: recorded()[0]["knowledge"][name] for name in kept}
    old["memory"] = {name: old["memory"][name] for name in ("peaks", "exhausted")}
    known = Knowledge.from_json(old, Candidates(()))
    assert known.plan == BASE
    assert known.memory.capacity == known.throughput.hardware.memory_bytes
    assert (known.critical_ratio.observations, known.decisions, known.rejected) == ((), 0, {})


def test_settings_without_bounds_come_back() -> None:
    settings = PolicySettings(max_growth=math.inf)
    assert PolicySettings.from_json(json.loads(json.dumps(plain(settings.to_json())))) == settings


def test_another_space_is_kept_away_from_the_same_plans_as_a_run() -> None:
    """One micro-batch a step makes one group, of which no noise scale can be measured."""
    again = list(replay(recorded(), space="tp=1,2 pp=2 mbs=any gbs=8"))
    scores = [score for each in again for score in each.decision.candidates]
    assert any("one micro-batch a step makes one group" in score.why_not for score in scores)
    assert not any(score.feasible for score in scores if score.plan.num_microbatches * score.plan.layout.dp < 2)
