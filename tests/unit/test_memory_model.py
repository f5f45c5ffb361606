from __future__ import annotations

import json

import numpy as np
import pytest

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.cost.memory import peak_bytes
from copus_ext.core.cost.memory_model import MOST_OF_MEMORY, MemoryModel
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.plan_table import PlanTable
from copus_ext.core.plan import Layout, Plan

MODEL = ModelShape(layers=8, hidden=64, heads=8, kv_heads=8, ffn=256, vocab=512, seq=32)
WHOLE, HALF, SPLIT = Plan(Layout(dp=4), 4, 16), Plan(Layout(dp=4), 2, 16), Plan(Layout(tp=2, pp=2), 1, 16)
PLANS = Candidates((WHOLE, HALF, SPLIT))
TABLE = PlanTable.of(PLANS)
COUNTED = peak_bytes(TABLE, MODEL)
ROOM = MemoryModel(MODEL, capacity=1e12)


def test_before_any_measurement_it_is_the_closed_form() -> None:
    np.testing.assert_array_equal(ROOM.predict(TABLE), COUNTED)
    assert ROOM.objections(PLANS) == {}


def test_splitting_a_model_makes_it_fit() -> None:
    tight = MemoryModel(MODEL, capacity=float(COUNTED[[0, 2]].mean()) / MOST_OF_MEMORY)
    assert "at most 90 %" in tight.objections(PLANS)[WHOLE]
    assert SPLIT not in tight.objections(PLANS)


def test_what_the_allocator_took_beyond_the_count_is_expected_of_every_plan() -> None:
    measured = ROOM.observe(SPLIT, float(COUNTED[2]) + 5e9)
    np.testing.assert_allclose(measured.predict(TABLE), COUNTED + 5e9)
    more = measured.observe(WHOLE, float(COUNTED[0]) + 1e9).observe(HALF, float(COUNTED[1]) + 4e9)
    np.testing.assert_allclose(more.predict(TABLE), COUNTED + 4e9, err_msg="the median of three")


def test_the_largest_peak_of_a_plan_counts() -> None:
    measured = ROOM.observe(SPLIT, 9e9).observe(SPLIT, 7e9)
    assert measured.peaks == ((SPLIT, 9e9),)


def test_what_ran_out_is_not_tried_again_and_nor_is_what_needs_more() -> None:
    failed = ROOM.ran_out(HALF).objections(PLANS)
    assert failed[HALF] == "ran out of memory before"
    assert "less ran out" in failed[WHOLE]
    assert SPLIT not in failed


def test_a_plan_that_ran_before_is_not_doubted_because_a_smaller_one_failed() -> None:
    assert WHOLE not in ROOM.observe(WHOLE, float(COUNTED[0])).ran_out(HALF).objections(PLANS)


@pytest.mark.parametrize("peak", [0.0, -1.0, float("nan"), float("inf")])
def test_a_peak_that_cannot_be_is_refused(peak: float) -> None:
    with pytest.raises(ValueError, match="positive number of bytes"):
        ROOM.observe(SPLIT, peak)


def test_what_was_learned_survives_json() -> None:
    learned = ROOM.observe(SPLIT, 9e9).ran_out(HALF)
    assert ROOM.restored(json.loads(json.dumps(learned.to_json()))) == learned
