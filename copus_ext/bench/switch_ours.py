"""Our switch under the clock: all that the benchmark knows of the inside of a switch and of its report."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from copus_ext.adapters.job import Job
from copus_ext.bench.switch_bench import SwitchBench
from copus_ext.bench.switch_memory import forget_peak, peak_bytes
from copus_ext.core.plan import Layout, Plan
from copus_ext.run.switch import Switcher

MOVE_PHASES = ("move",)


@dataclass(frozen=True)
class OurSwitch:
    """On this rank. ``wall_s`` lies between barriers; ``peak`` in bytes, ``peak_extra`` as the switch itself counts it.

    ``sent[source][target]``: bytes that the transfer plan takes from rank to rank, or leaves on a rank.
    """

    wall_s: float
    ahead_s: float
    seconds: dict[str, float]
    bytes_moved: int
    bytes_minimum: int
    exact: bool
    peak: int
    peak_extra: int | None
    first_visit: bool
    wire: str
    sent: list[list[int]]

    @property
    def move_s(self) -> float:
        """What the transport of the same bytes is compared with."""
        return sum(self.seconds.get(name, 0.0) for name in MOVE_PHASES)


class Switches:
    """Of one model with one optimizer."""

    def __init__(self, bench: SwitchBench) -> None:
        self._switcher = Switcher(bench.raw, bench.layouts)

    def timed(self, job: Job, plan: Plan) -> tuple[Job, OurSwitch]:
        """Take ``job`` to ``plan``, which was made ready ahead of it, as a run does. Collective over all ranks."""
        old, plans = job.plan.layout, self._switcher.plans.moves
        known = len(plans)
        start = together()
        self._switcher.prepare(job, plan, {})
        ahead_s = together() - start
        forget_peak()
        start = together()
        job, report = self._switcher.switch(job, plan, {})
        wall_s = together() - start
        return job, OurSwitch(
            wall_s=wall_s,
            ahead_s=ahead_s,
            seconds=dict(report.seconds),
            bytes_moved=report.bytes_moved,
            bytes_minimum=report.bytes_minimum,
            exact=report.exact,
            peak=peak_bytes(),
            peak_extra=report.peak_extra_bytes,
            first_visit=len(plans) > known,
            wire=wire.name if (wire := self._switcher.plans.wire) else "",
            sent=self._sent(old, plan.layout),
        )

    def _sent(self, old: Layout, new: Layout) -> list[list[int]]:
        """Bytes by source and target of the plan between two layouts, with the optimizer's moments."""
        plan = self._switcher.plans.moves[old, new, True, None][0].plan
        ranks = dist.get_world_size()
        sent = [[0] * ranks for _ in range(ranks)]
        for transfer in plan.transfers:
            sent[transfer.source][transfer.target] += transfer.nbytes
        return sent


def together() -> float:
    """The time when all ranks have come here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()
