"""What ranks that share a machine's cores really reach: a second of measuring instead of figures from a box."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from copus_ext.core.cost.hardware import Hardware

_ROWS, _WIDTH = 128, 512  # of the matrices multiplied: the size of a small model's layers
_COPY_BYTES = 16 * 2**20
_MESSAGE_BYTES = 8 * 2**20
_SMALL_BYTES = 64 * 2**10
_BETWEEN = 4  # matrix products between two small messages
_REPEATS = 9


def measure_shared_cpu(hardware: Hardware) -> Hardware:
    """``hardware`` with its speeds measured on this machine. Collective over all ranks, which must be on one node.

    Args:
        hardware: gives what is not measured: memory, ranks, overheads.

    Returns:
        The same on every rank: medians of a few repetitions, averaged over the ranks.
    """
    world_size = dist.get_world_size()
    # Constants: drawing would move the generator that the run, perhaps a resumed one, is about to train with.
    left, right = torch.full((_ROWS, _WIDTH), 0.5), torch.full((_WIDTH, _WIDTH), 0.5)
    source = torch.ones(_COPY_BYTES // 4)
    copy, message, small = source.clone(), torch.ones(_MESSAGE_BYTES // 4), torch.ones(_SMALL_BYTES // 4)

    def compute() -> None:
        for _ in range(_BETWEEN):
            torch.mm(left, right)

    def compute_and_reduce() -> None:
        compute()
        dist.all_reduce(small)

    work = 2.0 * _ROWS * _WIDTH * _WIDTH
    dist.barrier()  # ranks that come late would leave their cores to the others
    together = work / _median_seconds(lambda: torch.mm(left, right), 40)
    dist.barrier()
    alone = 0.0
    if dist.get_rank() == 0:  # the others wait in the barrier
        alone = work / _median_seconds(lambda: torch.mm(left, right), 40)
    dist.barrier()
    copied = 2.0 * _COPY_BYTES / _median_seconds(lambda: copy.copy_(source), 2)  # read and written
    # Between computing: ranks that share cores first have to be given one before they can take part.
    hops = 2 * math.log2(max(2, world_size))
    latency = max(0.0, _median_seconds(compute_and_reduce, 4) - _median_seconds(compute, 4)) / hops
    reduce_s = _median_seconds(lambda: dist.all_reduce(message), 1)
    traffic = 2 * (world_size - 1) / world_size * _MESSAGE_BYTES
    figures = torch.tensor([together, alone * world_size, copied, latency, reduce_s], dtype=torch.float64)
    dist.all_reduce(figures)
    together, alone, copied, latency, reduce_s = (figures / world_size).tolist()
    if world_size == 1:
        return replace(hardware, flops=alone, node_flops=alone, memory_bandwidth=copied)
    cores = hardware.node_flops / hardware.flops  # that there are to share: what is measured can't be more
    wire_s = max(reduce_s - hops * latency, 0.5 * reduce_s)
    return replace(
        hardware,
        flops=alone,
        node_flops=min(together * world_size, alone * cores),
        memory_bandwidth=copied,
        intra_node_bandwidth=traffic / wire_s,
        latency_s=latency,
    )


def forget_peak_memory() -> None:
    """Let :func:`peak_memory` begin anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int | None:
    """Bytes: the most that tensors have taken of the device, and what lies beside the allocator; None on CPU.

    Not what the allocator holds: that may be what another plan needed. Nor what a CPU's memory holds: that is shared.
    """
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    return int(torch.cuda.max_memory_allocated() + beside)


def _median_seconds(action: Callable[[], object], times: int) -> float:
    """Median seconds of ``action``, which is done ``times`` times a measurement."""
    action()
    measured = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(times):
            action()
        measured.append((time.perf_counter() - start) / times)
    return statistics.median(measured)
