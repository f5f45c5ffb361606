"""A walk through layouts: every switch timed and checked, with what it is compared with measured beside it."""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from copus_ext.adapters.job import Job
from copus_ext.bench.switch_bench import SwitchBench
from copus_ext.bench.switch_checkpoint import fingerprint, save, through_memory
from copus_ext.bench.switch_memory import present_bytes
from copus_ext.bench.switch_ours import OurSwitch, Switches, together
from copus_ext.bench.switch_setting import Checkpoint, Walk
from copus_ext.bench.switch_summary import Switched
from copus_ext.bench.switch_transport import raw_transport
from copus_ext.bench.workbench import memory_of_state
from copus_ext.core.plan import Plan

_STEPS_BEFORE = 2  # the optimizer has moments then


@dataclass(frozen=True)
class Effort:
    """What is measured of a walk.

    ``laps`` through it, with ``transports`` repetitions of the raw transport. From the second lap on, each switch is
    done through a checkpoint in folder ``memory`` as well: not before, or it would make the layout's process groups and
    our first visit find them. On the first lap each job is saved to ``disk`` before it leaves its layout.
    """

    laps: int
    transports: int
    memory: Path | None
    disk: Path | None = None


@dataclass(frozen=True)
class _OnRank:
    """Of one switch on one rank. Seconds and bytes; ``same``: as through a checkpoint."""

    seconds: dict[str, float]
    move_s: float
    rank_state: int
    peak_extra_rss: int
    peak_extra_counted: int | None
    same: bool


def measure(bench: SwitchBench, walk: Walk, effort: Effort) -> tuple[list[Switched], list[Checkpoint]]:
    """Collective over all ranks, which all get the same."""
    bench.begin(walk)
    first, *others = walk.plans(dist.get_world_size())
    job = bench.job(first)
    for _ in range(_STEPS_BEFORE):
        bench.advance(job)
    if effort.memory is not None:  # upstream imports and starts what it needs for the first one, which is not counted
        through_memory(bench, job, first, effort.memory / "warm-up")
    switches, found = Switches(bench), list[Switched]()
    checkpoints: list[Checkpoint] = []
    for lap in range(effort.laps):
        for plan in others:
            if lap == 0 and effort.disk is not None:
                checkpoints.append(_saved(job, plan, walk, effort.disk))
            job, one = _switch(bench, switches, job, plan, walk, effort if lap else replace(effort, memory=None))
            found.append(one)
            _tell(one)
    job.release()
    gc.collect()
    return found, checkpoints


def _switch(
    bench: SwitchBench, switches: Switches, job: Job, plan: Plan, walk: Walk, effort: Effort
) -> tuple[Job, Switched]:
    """One switch, with two steps behind it. The checkpoint goes first, since a switch ends the old job."""
    old = str(job.plan.layout)
    through = through_memory(bench, job, plan, effort.memory / "checkpoint") if effort.memory else None
    gc.collect()
    before, state = present_bytes(), memory_of_state(job)
    job, ours = switches.timed(job, plan)
    same = through is None or through.fingerprint == fingerprint(job)
    steps = (_timed_step(bench, job), _timed_step(bench, job))
    mine = _OnRank(
        seconds=ours.seconds,
        move_s=ours.move_s,
        rank_state=max(state, memory_of_state(job)),
        peak_extra_rss=max(0, ours.peak - max(before, present_bytes())),
        peak_extra_counted=ours.peak_extra,
        same=same,
    )
    figures = _figures(mine, ours, steps) | {"transport": asdict(raw_transport(ours.sent, effort.transports))}
    if through is not None:
        figures |= {"ram_save_s": through.save_s, "ram_load_s": through.load_s}
    else:
        figures["ram_same"] = None
    return job, Switched(walk.model.name, walk.kind.name, old, str(plan.layout), **figures)


def _figures(mine: _OnRank, ours: OurSwitch, steps: tuple[float, float]) -> dict[str, Any]:
    """Of seconds and shares the largest of any rank. Collective."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    ranks: list[_OnRank] = gathered
    counted = [one.peak_extra_counted / one.rank_state for one in ranks if one.peak_extra_counted is not None]
    return {
        "first_visit": ours.first_visit,
        "wire": ours.wire,
        "wall_s": ours.wall_s,
        "ahead_s": ours.ahead_s,
        "seconds": {name: max(one.seconds.get(name, 0.0) for one in ranks) for name in mine.seconds},
        "move_s": max(one.move_s for one in ranks),
        "bytes_moved": ours.bytes_moved,
        "bytes_minimum": ours.bytes_minimum,
        "exact": ours.exact,
        "rank_state_bytes": max(one.rank_state for one in ranks),
        "peak_extra_over_state_rss": max(one.peak_extra_rss / one.rank_state for one in ranks),
        "peak_extra_over_state_counted": max(counted, default=None),
        "first_step_s": steps[0],
        "second_step_s": steps[1],
        "ram_same": all(one.same for one in ranks),
    }


def _saved(job: Job, plan: Plan, walk: Walk, disk: Path) -> Checkpoint:
    old = str(job.plan.layout)
    seconds = save(job, disk / old)
    return Checkpoint(walk.kind.name, old, str(plan.layout), str(disk / old), seconds, job.args.iteration)


def _timed_step(bench: SwitchBench, job: Job) -> float:
    start = together()
    bench.advance(job)
    return together() - start


def _tell(one: Switched) -> None:
    """A line of progress."""
    if dist.get_rank():
        return
    ram = "" if one.ram_s is None else f", through a checkpoint in memory {one.ram_s:.2f} s"
    visit = "first time" if one.first_visit else "again"
    bare = f"{one.transport['best_s']:.3f}, {one.transport['fresh_s']:.3f} into fresh memory"
    moved = f"{one.move_s:.3f} s to move, the bare bytes {bare}"
    words = f"{one.model} {one.kind}: {one.old} to {one.new} ({visit}) {one.wall_s:.2f} s, {moved}{ram}"
    print(words, file=sys.stderr, flush=True)
