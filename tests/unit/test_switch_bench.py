from __future__ import annotations

import json
from typing import Any

import pytest

from copus_ext.bench.switch_setting import KINDS, LAYOUTS, REFERENCE, Walk
from copus_ext.bench.switch_summary import Restarted, Switched, summarise


def _switched(**other: Any) -> Switched:
    values: dict[str, Any] = {
        "model": "30M",
        "kind": "adam-fp32",
        "old": "dp4",
        "new": "dp1,tp4",
        "first_visit": False,
        "ahead_s": 0.3,
        "wall_s": 0.5,
        "seconds": {"move": 0.2},
        "move_s": 0.2,
        "bytes_moved": 100,
        "bytes_minimum": 100,
        "exact": True,
        "rank_state_bytes": 1000,
        "peak_extra_over_state_rss": 0.25,
        "peak_extra_over_state_counted": None,
        "first_step_s": 0.3,
        "second_step_s": 0.2,
        "transport": {"best_s": 0.1, "median_s": 0.15, "fresh_s": 0.25, "wire_bytes": 100, "local_bytes": 0},
    }
    return Switched(**(values | other))


def test_first_visits_count_in_the_summary_and_stand_beside_it() -> None:
    again = {"ram_save_s": 1.0, "ram_load_s": 1.0, "ram_same": True}
    found = summarise([_switched(first_visit=True, wall_s=1.0), _switched(**again), _switched(**again)], [])
    assert found["speedup_vs_ram_checkpoint_min"] == pytest.approx(2.0)
    assert found["speedup_vs_ram_checkpoint_median"] == pytest.approx(4.0)
    assert found["switch_s_first_visit_median"] == 1.0
    assert found["switch_s_later_median"] == 0.5
    assert found["ram_checkpoint_all_same"] is True


def test_a_switch_is_compared_with_its_own_restart_or_one_alike_and_else_with_the_shortest() -> None:
    restarts = [
        Restarted("adam-fp32", "dp4", "dp1,tp4", save_s=1.0, start_s=19.0),
        Restarted("adam-fp32", "dp1,tp4", "dp4", save_s=1.0, start_s=9.0),
    ]
    assert summarise([_switched()], restarts)["speedup_vs_restart_min"] == pytest.approx(40.0)
    other = _switched(kind="adam-bf16-zero1", old="dp4,zero1", new="dp1,tp4,zero1")
    assert summarise([other], restarts)["speedup_vs_restart_min"] == pytest.approx(40.0)
    assert summarise([_switched(new="dp1,pp4")], restarts)["speedup_vs_restart_min"] == pytest.approx(20.0)
    assert summarise([_switched()], [])["speedup_vs_restart_min"] is None


def test_another_optimizer_is_not_compared_with_this_ones_checkpoint() -> None:
    found = summarise([_switched(ram_save_s=1.0, ram_load_s=1.0), _switched(kind="sgd-momentum", wall_s=0.1)], [])
    assert found["speedup_vs_ram_checkpoint_min"] == found["speedup_vs_ram_checkpoint_median"] == pytest.approx(4.0)


@pytest.mark.parametrize(("moved", "minimum", "ratio"), [(150, 100, 1.5), (0, 0, 1.0), (100, 100, 1.0)])
def test_bytes_are_compared_with_the_fewest_that_had_to_move(moved: int, minimum: int, ratio: float) -> None:
    found = summarise([_switched(bytes_moved=moved, bytes_minimum=minimum)], [])
    assert found["bytes_moved_over_min_max"] == ratio


def test_bytes_where_none_had_to_move_are_more_than_the_fewest() -> None:
    assert _switched(bytes_moved=1, bytes_minimum=0).bytes_moved_over_min > 1


def test_memory_is_as_the_switch_counts_it_and_else_as_the_system_does() -> None:
    switches = [_switched(peak_extra_over_state_counted=0.1), _switched(peak_extra_over_state_rss=0.05)]
    found = summarise(switches, [])
    assert found["peak_extra_over_rank_state_max"] == 0.1
    assert found["peak_extra_over_rank_state_max_rss"] == 0.25


def test_moving_is_compared_with_the_best_transport() -> None:
    found = summarise([_switched()], [])
    assert found["move_over_memcpy_bound_median"] == pytest.approx(2.0)
    assert found["move_over_fresh_transport_median"] == pytest.approx(0.8)


def test_one_inexact_switch_shows() -> None:
    assert not summarise([_switched(), _switched(exact=False)], [])["all_exact"]


def test_a_switch_goes_through_json() -> None:
    one = _switched(ram_save_s=1.0, ram_load_s=2.0, ram_same=True)
    values = json.loads(json.dumps(one.to_json()))
    assert values["ram_s"] == 3.0
    assert values["first_step_over_second"] == pytest.approx(1.5)
    assert Switched.from_json(values) == one


@pytest.mark.parametrize("name", list(KINDS))
def test_walks_are_plans_for_four_ranks(name: str) -> None:
    plans = Walk(REFERENCE, KINDS[name], LAYOUTS).plans(4)
    assert {plan.layout.world_size for plan in plans} == {4}
    assert all(plan.layout.distributed_optimizer == ("zero1" in name) for plan in plans)


def test_the_reference_has_about_thirty_million_parameters() -> None:
    assert REFERENCE.parameters == pytest.approx(30e6, rel=0.05)
