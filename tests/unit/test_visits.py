from __future__ import annotations

import json
import random

import pytest

from copus_ext.core.cost.visits import BLOCK, KEPT, Visits
from copus_ext.core.plan import Layout, Plan

A, B, C = (Plan(layout, 1, 8) for layout in (Layout(dp=4), Layout(tp=4), Layout(pp=4)))


def added(visits: Visits, plan: Plan, steps: int, seconds: float = 0.5) -> Visits:
    for _ in range(steps):
        visits = visits.add(plan, seconds)
    return visits


def test_steps_are_put_together_until_the_plan_changes_or_there_are_enough() -> None:
    seen = added(added(added(Visits(), A, 3 * BLOCK + 3), B, 2), A, 1)
    visits = [(visit.plan, len(visit.window)) for visit in seen.visits]
    assert visits == [(A, BLOCK), (A, BLOCK), (A, BLOCK + 3), (B, 2), (A, 1)]
    assert [visit.start_s for visit in seen.visits[1:]] == [visit.end_s for visit in seen.visits[:-1]]
    assert seen.steps == {A: 3 * BLOCK + 4, B: 2}


def test_the_clock_counts_measured_seconds() -> None:
    seen = added(added(Visits(), A, 4, 0.25), B, 2, 1.5)
    assert [(visit.start_s, visit.middle_s, visit.end_s) for visit in seen.visits] == [(0.0, 0.5, 1.0), (1.0, 2.5, 4.0)]
    assert seen.now_s == 4.0


def test_a_break_ends_a_visit_and_leaves_all_of_it_long_ago() -> None:
    seen = added(added(Visits(), A, 2).after_a_break(), A, 2)
    assert len(seen.visits) == 2
    assert seen.visits[1].start_s - seen.visits[0].end_s > 1e4
    assert Visits().after_a_break() == Visits()


def test_time_in_which_nothing_is_measured_passes_and_ends_a_visit() -> None:
    seen = added(added(Visits(), A, 2).later(3.0).later(), A, 1)
    assert [(visit.start_s, len(visit.window)) for visit in seen.visits] == [(0.0, 2), (4.0, 1)]


def test_of_a_long_stay_the_first_and_the_last_visit_are_kept_longest() -> None:
    seen = added(added(added(Visits(), A, 20 * BLOCK), B, 1), A, 2 * KEPT * BLOCK)
    assert len(seen.visits) == KEPT
    first, last, between, *behind = seen.visits
    assert (first.plan, first.start_s) == (A, 0.0)
    assert (last.plan, last.end_s) == (A, between.start_s), "the last one before plans changed"
    assert between.plan == B
    assert behind[0].start_s == between.end_s, "the first one after"
    assert seen.now_s == 0.5 * (20 * BLOCK + 1 + 2 * KEPT * BLOCK)


@pytest.mark.parametrize("seed", range(5))
def test_no_plan_is_forgotten_as_long_as_there_is_room_for_one_visit_to_each(seed: int) -> None:
    plans, seen, draw = [A.with_batch(8 * k) for k in range(1, KEPT + 1)], Visits(), random.Random(seed)
    draw.shuffle(plans)
    for plan in [*plans, *draw.choices(plans, k=200)]:
        seen = added(seen, plan, draw.randrange(1, 3))
        assert len(seen.visits) <= KEPT
    assert set(seen.steps) == set(plans)
    starts = [visit.start_s for visit in seen.visits]
    assert starts == sorted(starts)


def test_visits_come_back_from_json_to_the_last_bit() -> None:
    seen = added(added(Visits(), A, 3, 1 / 3), C, 20, 0.1).after_a_break()
    assert Visits.from_json(json.loads(json.dumps(seen.to_json()))) == seen
