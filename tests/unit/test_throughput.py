from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from copus_ext.core.cost.hardware import shared_cpu
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.step_time import step_time_parts
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.cost.visits import STEP_SD, Visits
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.space import Space

MODEL = ModelShape(layers=4, hidden=256, heads=8, kv_heads=8, ffn=1024, vocab=256, seq=64)
HARDWARE = shared_cpu(cores=2, ranks=4, memory_bytes=24e9)
PRIOR = ThroughputModel(MODEL, HARDWARE)
KERNEL = PRIOR.kernel
DATA = Plan(Layout(dp=4), 1, 8)
PLANS = Space(mbs=(1, 2, 4), batches=(4, 8, 16, 32)).plans(DATA, MODEL).plans


def prior_seconds(plan: Plan) -> float:
    return step_time_parts(plan, MODEL, HARDWARE).total


def observe(model: ThroughputModel, plan: Plan, seconds: float, steps: int = 30) -> ThroughputModel:
    for _ in range(steps):
        model = model.observe(plan, seconds)
    return model


def test_before_any_step_it_is_the_closed_form_and_hardly_sure_of_it() -> None:
    predictions = PRIOR.predict(PLANS)
    np.testing.assert_allclose(predictions.step_time_s, [prior_seconds(plan) for plan in PLANS])
    low, high = (
        math.hypot(KERNEL.common_sd, KERNEL.plan_sd, KERNEL.own_sd, KERNEL.drift_sd),
        math.hypot(KERNEL.common_sd, KERNEL.plan_sd, KERNEL.own_sd, KERNEL.drift_sd, KERNEL.part_sd),
    )
    assert (low < predictions.log_sd).all()
    assert (predictions.log_sd <= high).all()
    assert not predictions.observed_steps.any()


def test_observed_plans_are_interpolated_and_every_sd_shrinks() -> None:
    model = replace(PRIOR, kernel=replace(KERNEL, own_sd=0.0, drift_sd=0.0))  # nothing to be learned of them
    before = model.predict(PLANS).log_sd
    for number, plan in enumerate(PLANS[::7]):
        seconds = prior_seconds(plan) * (1.5 + 0.3 * math.sin(number))
        model = observe(model, plan, seconds)
        predictions = model.predict(PLANS)
        index = PLANS.index(plan)
        assert predictions.step_time_s[index] == pytest.approx(seconds, rel=0.02)
        assert predictions.log_sd[index] < 0.03
        assert (predictions.log_sd <= before + 1e-12).all()
        before = predictions.log_sd


def test_a_machine_slower_than_thought_is_slower_everywhere_after_one_plan() -> None:
    predictions = observe(PRIOR, DATA, 5 * prior_seconds(DATA)).predict(PLANS)
    np.testing.assert_allclose(predictions.step_time_s, [5 * prior_seconds(plan) for plan in PLANS], rtol=0.3)


def test_plans_alike_are_known_better_than_plans_apart() -> None:
    model = observe(PRIOR, DATA, 0.1)
    same_layout, other_layout = Plan(Layout(dp=4), 1, 16), Plan(Layout(pp=4), 1, 16)
    near, far = model.predict([same_layout, other_layout]).log_sd
    assert near < far / 2


def test_the_ratio_of_two_plans_follows_from_the_covariance() -> None:
    model = observe(observe(PRIOR, DATA, 0.1, steps=3), Plan(Layout(tp=4), 1, 8), 0.3)
    predictions = model.predict(PLANS)
    covariance = predictions.log_covariance()
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), predictions.log_sd, atol=1e-6)
    assert np.linalg.eigvalsh(covariance).min() > -1e-9
    reference = PLANS.index(DATA)
    for index in (0, reference, len(PLANS) - 1):
        contrast = np.zeros(len(PLANS))
        contrast[index] += 1
        contrast[reference] -= 1
        expected = math.sqrt(max(0.0, float(contrast @ covariance @ contrast)))
        assert predictions.log_ratio_sd(reference)[index] == pytest.approx(expected, abs=1e-6)


def test_the_common_error_cancels_in_a_ratio() -> None:
    sd = PRIOR.predict(PLANS).log_ratio_sd(0)
    assert sd[0] == 0.0
    assert sd.max() <= math.sqrt(2) * math.hypot(KERNEL.plan_sd, KERNEL.own_sd, KERNEL.part_sd) < KERNEL.common_sd


def test_the_posterior_is_that_of_the_joint_normal() -> None:
    """Against conditioning the joint covariance of all plans, now and at the visits, by its Schur complement."""
    model, joint = PRIOR, KERNEL.between(PRIOR.predict(PLANS).features, PRIOR.predict(PLANS).features)
    seen = [3, 10, 20, 3]
    for index, seconds in zip(seen, (50.0, 100.0, 150.0, 200.0), strict=True):
        model = model.observe(PLANS[index], seconds)
    predictions = model.predict(PLANS)
    times = np.array([25.0, 100.0, 225.0, 400.0])
    own = [[(a.layout, a.micro_batch) == (b.layout, b.micro_batch) for b in PLANS] for a in PLANS]
    drift, joint = predictions.drift_sd**2, joint + predictions.own_sd**2 * np.array(own)
    apart = np.exp(-np.abs(np.subtract.outer(times, [*times, 500.0])) / KERNEL.drift_s)
    within = (
        joint[np.ix_(seen, seen)] + drift * apart[:, :4] + np.diag(model.seen.log_medians()[1] + KERNEL.visit_sd**2)
    )
    gain = np.linalg.solve(within, joint[seen] + drift * apart[:, 4:])
    expected = joint + drift - gain.T @ within @ gain
    np.testing.assert_allclose(predictions.log_covariance(), expected, atol=1e-9)
    off = np.log([seconds / prior_seconds(PLANS[i]) for i, seconds in zip(seen, (50, 100, 150, 200), strict=True)])
    corrections = np.log(predictions.step_time_s / [prior_seconds(plan) for plan in PLANS])
    np.testing.assert_allclose(corrections, gain.T @ off, atol=1e-9)


def test_a_machine_that_became_slower_is_slower_for_the_plan_seen_before() -> None:
    """Another plan was tried in between: no reason to go back to it."""
    other, model = Plan(Layout(pp=4), 1, 8), PRIOR
    for turn in range(4):
        model = observe(model, DATA, 1.0 + 0.02 * turn, steps=60)
        model = observe(model, other, 1.0 + 0.02 * turn, steps=20) if turn == 0 else model
    predictions = model.predict([DATA, other])
    assert predictions.step_time_s == pytest.approx([1.06, 1.06], rel=0.02)
    log_ratio = math.log(predictions.step_time_s[0] / predictions.step_time_s[1])
    assert abs(log_ratio) < 2 * predictions.log_ratio_sd(0)[1] < 0.03


def drifting(sd: float, seed: int) -> ThroughputModel:
    """Sixty visits to twelve plans of a machine that drifts by so much."""
    generator = np.random.default_rng(seed)
    model, drift, last = PRIOR, sd * generator.standard_normal(), 0.0
    for number in range(60):
        plan = PLANS[number % 12]
        stay = math.exp(-(model.seen.now_s - last) / KERNEL.drift_s)
        drift, last = drift * stay + sd * math.sqrt(1 - stay**2) * generator.standard_normal(), model.seen.now_s
        visit = math.exp(drift + KERNEL.visit_sd * generator.standard_normal())
        for noise in np.exp(0.01 * generator.standard_normal(10)):
            model = model.observe(plan, 6.0 * prior_seconds(plan) / prior_seconds(DATA) * visit * noise)
    return model


@pytest.mark.parametrize("seed", range(3))
def test_how_much_a_machine_drifts_is_learned(seed: int) -> None:
    quiet, restless = (drifting(sd, seed).predict(PLANS) for sd in (0.001, 0.08))
    assert quiet.drift_sd < KERNEL.drift_sd < restless.drift_sd
    assert quiet.log_ratio_sd(0)[7] < restless.log_ratio_sd(0)[7]


@pytest.mark.parametrize("seed", range(3))
def test_how_large_own_deviations_are_is_learned_and_kept_as_the_batch_grows(seed: int) -> None:
    generator = np.random.default_rng(seed)
    factors = {(plan.layout, plan.micro_batch): math.exp(0.2 * generator.standard_normal()) for plan in PLANS}
    small, large = ([plan for plan in PLANS if plan.global_batch == batch] for batch in (16, 32))
    smooth, odd = PRIOR, PRIOR
    for plan in small:
        smooth = observe(smooth, plan, prior_seconds(plan))
        odd = observe(odd, plan, prior_seconds(plan) * factors[plan.layout, plan.micro_batch])
    predicted = odd.predict(large)
    assert smooth.predict(large).own_sd == KERNEL.own_sd < 0.04 < predicted.own_sd
    off = predicted.step_time_s / [prior_seconds(p) * factors[p.layout, p.micro_batch] for p in large] - 1.0
    assert np.median(np.abs(off)) < 0.03


def test_a_layout_keeps_its_own_deviation_when_the_batch_grows() -> None:
    kernel = replace(KERNEL, own_sd=0.1)
    model = observe(replace(PRIOR, kernel=kernel), DATA, prior_seconds(DATA))
    larger, layout, micro_batch = Plan(Layout(dp=4), 1, 16), Plan(Layout(dp=2, tp=2), 1, 8), Plan(Layout(dp=4), 2, 8)
    predictions = model.predict([DATA, larger, layout, micro_batch, DATA])
    sd = predictions.log_ratio_sd(0)
    assert sd[4] == pytest.approx(0.0, abs=1e-6), "the same plan"
    assert sd[1] < 0.1 < sd[[2, 3]].min()
    covariance = predictions.log_covariance()
    assert covariance[0, 0] == pytest.approx(covariance[0, 4])


def test_logs_from_before_own_deviations_are_decided_as_then() -> None:
    values = observe(PRIOR, DATA, 0.1).to_json()
    assert ThroughputModel.from_json(values).kernel == KERNEL
    del values["kernel"]["own_sd"], values["options"]["fused_adam"], values["options"]["fused_accumulation"]
    before = ThroughputModel.from_json(values)
    assert before.kernel == replace(KERNEL, own_sd=0.0)
    assert before.predict(PLANS).own_sd == 0.0
    assert before.options == PRIOR.options


def test_after_a_break_the_machine_may_be_another_but_plans_compare_as_before() -> None:
    model = observe(observe(PRIOR, DATA, 0.1), Plan(Layout(tp=4), 1, 8), 0.3)
    plans = [DATA, *PLANS]
    before, behind = model.predict(plans), model.after_a_break().predict(plans)
    assert (behind.log_sd > before.log_sd).all()
    assert before.log_sd[0] < KERNEL.drift_sd < behind.log_sd[0] < 2 * KERNEL.drift_sd
    np.testing.assert_allclose(behind.log_ratio_sd(0), before.log_ratio_sd(0), atol=1e-9)
    again = observe(model.after_a_break(), DATA, 0.1, steps=1)
    assert len(again.seen.visits) == len(model.seen.visits) + 1, "steps behind a break are another visit"


def test_a_minority_of_odd_steps_does_no_harm() -> None:
    generator = np.random.default_rng(0)
    times = 0.2 * np.exp(0.05 * generator.standard_normal(50))
    times[::5] *= 20  # evaluations, checkpoints
    model = PRIOR
    for seconds in times:
        model = model.observe(DATA, float(seconds))
    predictions = model.predict([DATA])
    assert predictions.step_time_s[0] == pytest.approx(0.2, rel=0.04)
    assert predictions.log_sd[0] < 0.04


@pytest.mark.parametrize("steps", range(1, 70, 3))
def test_a_single_odd_step_does_no_harm_wherever_it_comes(steps: int) -> None:
    model = observe(PRIOR, Plan(Layout(pp=4), 1, 8), 1.0, steps=16)
    generator = np.random.default_rng(steps)
    for seconds in np.exp(0.02 * generator.standard_normal(40 + steps)):
        model = model.observe(DATA, float(seconds))
    model = model.observe(DATA, 5.0)
    predictions = model.predict([DATA])
    assert predictions.step_time_s[0] == pytest.approx(1.0, abs=0.03)
    assert predictions.drift_sd <= KERNEL.drift_sd


def test_the_error_of_a_median_shrinks_with_its_steps_as_draws_say() -> None:
    generator = np.random.default_rng(1)
    errors, claimed = [], []
    for _ in range(200):
        seen = Visits()
        for seconds in np.exp(STEP_SD * generator.standard_normal(16)):
            seen = seen.add(DATA, float(seconds))
        medians, variances = seen.log_medians()
        errors.append(medians[0])
        claimed.append(variances[0])
    assert np.mean(claimed) == pytest.approx(np.var(errors), rel=0.25)


def test_a_plan_that_became_faster_is_known_to_be_and_its_steps_are_counted() -> None:
    model = observe(observe(PRIOR, DATA, 1.0, steps=5), DATA, 0.9, steps=400)
    predictions = model.predict([DATA])
    assert predictions.step_time_s[0] == pytest.approx(0.9, rel=0.01)
    assert predictions.observed_steps[0] == 405


def test_observing_leaves_the_earlier_model_alone() -> None:
    PRIOR.observe(DATA, 1.0)
    assert PRIOR.seen == Visits()


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_cannot_be_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive number of seconds"):
        PRIOR.observe(DATA, seconds)


def test_json_round_trip_is_bitwise() -> None:
    model = observe(PRIOR, DATA, 0.1, steps=3).observe(PLANS[0], 1 / 3)
    back = ThroughputModel.from_json(json.loads(json.dumps(model.to_json())))
    assert back == model
    assert back.predict(PLANS).step_time_s.tobytes() == model.predict(PLANS).step_time_s.tobytes()
