from __future__ import annotations

import json
from dataclasses import replace

from copus_ext.core.cost.hardware import shared_cpu
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.switch_cost import SwitchCost, first_switch_cost

MODEL = ModelShape(layers=4, hidden=64, heads=8, kv_heads=8, ffn=256, vocab=512, seq=32)
DATA = Plan(Layout(dp=4), 1, 8)
PIPE = Plan(Layout(pp=4), 1, 8)
START = first_switch_cost(MODEL, shared_cpu(cores=2, ranks=4, memory_bytes=24e9), world_size=4)


def test_staying_is_free() -> None:
    assert START.expected_s(DATA, DATA) == 0.0


def test_before_any_measurement_more_state_costs_more_and_a_batch_change_little() -> None:
    larger = first_switch_cost(
        replace(MODEL, layers=400), shared_cpu(cores=2, ranks=4, memory_bytes=24e9), world_size=4
    )
    assert (
        larger.expected_s(DATA, PIPE) > START.expected_s(DATA, PIPE) > START.expected_s(DATA, DATA.with_batch(16)) > 0
    )


def test_measurements_replace_the_expectation_with_their_mean() -> None:
    costs = START
    for seconds in (3.0, 1.0, 2.0):
        costs = costs.observe(DATA, PIPE, seconds)
    assert costs.expected_s(PIPE, DATA) == 2.0


def test_the_two_kinds_are_kept_apart() -> None:
    costs = START.observe(DATA, PIPE, 5.0)
    assert costs.batch_change == START.batch_change
    costs = costs.observe(DATA, DATA.with_batch(16), 0.5)
    assert (costs.expected_s(DATA, PIPE), costs.expected_s(DATA, DATA.with_batch(4))) == (5.0, 0.5)


def test_json_round_trip_is_bitwise() -> None:
    costs = START.observe(DATA, PIPE, 0.1).observe(DATA, PIPE, 0.7)
    assert SwitchCost.from_json(json.loads(json.dumps(costs.to_json()))) == costs
