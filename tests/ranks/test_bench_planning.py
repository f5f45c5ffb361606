"""The tool that times planning: what it plans for ranks that are not there moves the least."""

from __future__ import annotations

from typing import Any

from tests.ranks.harness import run_ranks


def _planned() -> list[dict[str, Any]]:
    from copus_ext.bench.planning import planned, planning_bench

    bench = planning_bench()
    return [planned(bench, "8B", ranks) for ranks in (8, 64)]


def test_planning_for_many_ranks_takes_one_process() -> None:
    few, many = run_ranks(1, _planned)[0]
    assert (few["from"], many["to"]) == ("dp4,tp2,sp,zero1", "dp8,tp4,pp2,sp,zero1")
    for found in (few, many):
        assert found["bytes_moved"] == found["bytes_minimum"] > 5e10
        assert found["round_mib"] == 1024, "gradients leave room for as much"
    assert many["transfers"] > few["transfers"] > many["rounds"]
