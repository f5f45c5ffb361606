"""Process groups of several layouts in one process: made once, right after every change, and never leaked."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from copus_ext.core.plan import Layout, Plan
from tests.ranks.harness import run_ranks

LAYOUTS = (Layout(dp=4), Layout(tp=2, pp=2), Layout(pp=4), Layout(dp=2, tp=2), Layout(dp=2, pp=2, vpp=2))


def walk(rounds: int) -> tuple[list[tuple[int, int, int]], list[list[tuple[Any, ...]]], int]:
    """Resources held and the groups this rank is in, after each round of layouts; threads in which gloo polls."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from copus_ext.adapters.arguments import arguments_for
    from tests.ranks.tiny import raw_arguments, start_upstream

    raw = raw_arguments()
    _, layouts, _ = start_upstream(raw, Plan(LAYOUTS[0], 1, 8))
    held, groups = [], []
    for _ in range(rounds):
        seen = []
        for layout in LAYOUTS:
            layouts.activate(layout, arguments_for(raw, Plan(layout, 1, 8), padded_vocab_size=128))
            seen.append(_sum_over(parallel_state))
        groups.append(seen)
        held.append((len(dist.distributed_c10d._world.pg_map), len(os.listdir("/proc/self/task")), _descriptors()))
    return held, groups, _threads().count("gloo_tcp_loop")


def _sum_over(parallel_state: Any) -> tuple[Any, ...]:
    """Sizes, and sums of ranks over the tensor, pipeline and data-parallel groups, by real collectives."""
    import torch
    import torch.distributed as dist

    sums = []
    for group in (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_data_parallel_group(),
    ):
        total = torch.tensor([dist.get_rank()])
        dist.all_reduce(total, group=group)
        sums.append((group.size(), int(total)))
    return (*sums, parallel_state.get_virtual_pipeline_model_parallel_world_size())


def _threads() -> list[str]:
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            names.append(task.joinpath("comm").read_text().strip())
    return names


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_going_round_the_layouts_makes_every_group_once() -> None:
    for held, groups, polling in run_ranks(4, walk, 6):
        assert groups[1:] == groups[:-1], "a layout has other groups the second time"
        assert [(sums[0][0], sums[1][0], sums[2][0], sums[3]) for sums in groups[0]] == [
            (layout.tp, layout.pp, layout.dp, layout.vpp if layout.vpp > 1 else None) for layout in LAYOUTS
        ]
        assert len(set(held[1:])) == 1, f"process groups, threads, descriptors by round: {held}"
        assert polling == 1, "each gloo group has a thread that polls"
