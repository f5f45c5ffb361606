from __future__ import annotations

import json
import math

import numpy as np
import pytest

from copus_ext.core.cost.hardware import shared_cpu
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.step_time import step_time_parts
from copus_ext.core.cost.throughput import STEP_SD, WINDOW, ThroughputModel
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
        math.hypot(KERNEL.common_sd, KERNEL.plan_sd),
        math.hypot(KERNEL.common_sd, KERNEL.plan_sd, KERNEL.part_sd),
    )
    assert (low < predictions.log_sd).all()
    assert (predictions.log_sd <= high).all()
    assert not predictions.observed_steps.any()


def test_observed_plans_are_interpolated_and_every_sd_shrinks() -> None:
    model, before = PRIOR, PRIOR.predict(PLANS).log_sd
    for number, plan in enumerate(PLANS[::7]):
        seconds = prior_seconds(plan) * (1.5 + 0.3 * math.sin(number))
        model = observe(model, plan, seconds)
        predictions = model.predict(PLANS)
        index = PLANS.index(plan)
        assert predictions.step_time_s[index] == pytest.approx(seconds, rel=0.01)
        assert predictions.log_sd[index] < 0.02
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
    assert sd.max() <= math.sqrt(2) * math.hypot(KERNEL.plan_sd, KERNEL.part_sd) < KERNEL.common_sd


def test_the_posterior_is_that_of_the_joint_normal() -> None:
    """Against conditioning the joint covariance of all plans directly, by its Schur complement."""
    model, joint = PRIOR, PRIOR.predict(PLANS).log_covariance()
    seen = [3, 10, 20]
    for index in seen:
        model = model.observe(PLANS[index], 2 * prior_seconds(PLANS[index]))
    noise = [history.log_median()[1] for history in model.histories]
    gain = joint[:, seen] @ np.linalg.inv(joint[np.ix_(seen, seen)] + np.diag(noise))
    predictions = model.predict(PLANS)
    np.testing.assert_allclose(predictions.log_covariance(), joint - gain @ joint[seen], atol=1e-9)
    corrections = np.log(predictions.step_time_s / [prior_seconds(plan) for plan in PLANS])
    np.testing.assert_allclose(corrections, gain @ np.full(3, math.log(2)), atol=1e-9)


def test_a_minority_of_odd_steps_does_no_harm() -> None:
    generator = np.random.default_rng(0)
    times = 0.2 * np.exp(0.05 * generator.standard_normal(50))
    times[::5] *= 20  # evaluations, checkpoints
    model = PRIOR
    for seconds in times:
        model = model.observe(DATA, float(seconds))
    predictions = model.predict([DATA])
    assert predictions.step_time_s[0] == pytest.approx(0.2, rel=0.04)
    assert predictions.log_sd[0] < 0.03


def test_the_error_of_a_median_shrinks_with_its_steps_as_draws_say() -> None:
    generator = np.random.default_rng(1)
    errors, claimed = [], []
    for _ in range(200):
        model = PRIOR
        for seconds in np.exp(STEP_SD * generator.standard_normal(20)):
            model = model.observe(DATA, float(seconds))
        median, variance = model.histories[0].log_median()
        errors.append(median)
        claimed.append(variance)
    assert np.mean(claimed) == pytest.approx(np.var(errors), rel=0.25)


def test_old_steps_are_forgotten_but_counted() -> None:
    model = observe(observe(PRIOR, DATA, 1.0, steps=5), DATA, 0.1, steps=WINDOW)
    predictions = model.predict([DATA])
    assert predictions.step_time_s[0] == pytest.approx(0.1, rel=0.01)
    assert predictions.observed_steps[0] == WINDOW + 5
    assert len(model.histories[0].window) == WINDOW


def test_observing_leaves_the_earlier_model_alone() -> None:
    PRIOR.observe(DATA, 1.0)
    assert PRIOR.histories == ()


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_cannot_be_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive number of seconds"):
        PRIOR.observe(DATA, seconds)


def test_json_round_trip_is_bitwise() -> None:
    model = observe(PRIOR, DATA, 0.1, steps=3).observe(PLANS[0], 1 / 3)
    back = ThroughputModel.from_json(json.loads(json.dumps(model.to_json())))
    assert back == model
    assert back.predict(PLANS).step_time_s.tobytes() == model.predict(PLANS).step_time_s.tobytes()
