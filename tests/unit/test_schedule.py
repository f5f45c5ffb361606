from __future__ import annotations

import pytest

from copus_ext.core.errors import UserError
from copus_ext.core.plan import Layout, Plan, parse_plan
from copus_ext.core.planner.schedule import parse_schedule

BASE = Plan(Layout(dp=4), micro_batch=2, global_batch=16)
EXAMPLE = "0:dp4,mbs2,gbs16 4000:tp2,pp2,mbs2,gbs32"


def test_plans_hold_from_their_start_to_the_next() -> None:
    schedule = parse_schedule(EXAMPLE, BASE)
    first, second = parse_plan("dp4,mbs2,gbs16", BASE), parse_plan("tp2,pp2,mbs2,gbs32", BASE)
    assert [schedule.plan_at(samples) for samples in (0, 3999, 4000, 10**9)] == [first, first, second, second]
    assert [schedule.next_change(samples) for samples in (0, 3999, 4000, 10**9)] == [4000, 4000, None, None]


def test_one_entry_never_changes() -> None:
    schedule = parse_schedule("0:pp4", BASE)
    assert schedule.next_change(0) is None
    assert schedule.plan_at(123) == Plan(Layout(dp=1, pp=4), 2, 16)


def test_following_the_schedule_step_by_step_hits_every_start() -> None:
    schedule = parse_schedule("0:gbs16,mbs2 96:gbs8,mbs2 200:gbs32,mbs2 232:pp4,gbs20,mbs2", BASE)
    consumed, visited = 0, set()
    while consumed < 500:
        visited.add(consumed)
        consumed += schedule.plan_at(consumed).global_batch
    assert {start for start, _ in schedule.entries} <= visited


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("dp4", "SAMPLES:PLAN"),
        ("zero:dp4", "SAMPLES:PLAN"),
        ("16:dp4", "must start at 0"),
        ("0:dp3,mbs2,gbs12", "3 ranks, and there are 4"),
        ("0:dp4,mbs2,gbs12", "not divisible"),
        ("0:dp4,xp2", "'xp2'"),
        ("0:dp4 32:pp4 32:tp4", "must start after"),
        ("0:dp4 64:pp4 32:tp4", "must start after"),
    ],
)
def test_a_bad_schedule_is_told_by_flag_entry_and_remedy(text: str, says: str) -> None:
    with pytest.raises(UserError, match="--copus-schedule") as error:
        parse_schedule(text, BASE)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("start", "nearest"), [(100, "96 or 112"), (10, "16")])
def test_a_start_between_two_steps_names_the_nearest_that_fit(start: int, nearest: str) -> None:
    with pytest.raises(UserError, match=f"'{start}:pp4'.*start it at {nearest}$"):
        parse_schedule(f"0:dp4,mbs2,gbs16 {start}:pp4", BASE)
