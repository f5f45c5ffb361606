"""How fast the bytes of a switch could go if nothing had to be planned, packed or checked."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_ITEM_BYTES = 4


@dataclass(frozen=True)
class Transport:
    """Seconds of the slowest rank: the best repetition and the median one, and the best into memory just taken."""

    best_s: float
    median_s: float
    fresh_s: float
    wire_bytes: int
    local_bytes: int


def raw_transport(sent: list[list[int]], repetitions: int) -> Transport:
    """The same bytes per pair of ranks, into memory that is there and was touched, and into fresh memory. Collective.

    All messages are under way at once, from contiguous buffers into contiguous ones, while what stays on the rank is
    copied. Fresh memory is what a switch has to fill that never holds two copies: on a CPU, where the system hands out
    zeros page by page, it may cost more than the bytes. An allocator that keeps memory hands it out again instead.

    Args:
        sent: bytes by source and target.
        repetitions: how often.
    """
    rank, ranks = dist.get_rank(), range(dist.get_world_size())
    outgoing = {peer: _buffer(sent[rank][peer]).fill_(1) for peer in ranks if sent[rank][peer]}

    def taken() -> dict[int, torch.Tensor]:
        return {peer: _buffer(sent[peer][rank]) for peer in ranks if sent[peer][rank]}

    kept = taken()
    _once(outgoing, lambda: kept)
    seconds = [_once(outgoing, lambda: kept) for _ in range(repetitions)]
    kept = {}
    fresh = [_once(outgoing, taken) for _ in range(repetitions)]
    local = sum(sent[peer][peer] for peer in ranks)
    return Transport(
        best_s=min(seconds),
        median_s=statistics.median(seconds),
        fresh_s=min(fresh),
        wire_bytes=sum(map(sum, sent)) - local,
        local_bytes=local,
    )


def _buffer(nbytes: int) -> torch.Tensor:
    return torch.empty(-(-nbytes // _ITEM_BYTES), dtype=torch.float32, device=torch.cuda.current_device())


def _once(outgoing: Mapping[int, torch.Tensor], take: Callable[[], Mapping[int, torch.Tensor]]) -> float:
    """Seconds that the slowest rank takes, to ``take`` the memory for what comes in among them."""
    rank = dist.get_rank()
    dist.barrier()
    start = time.perf_counter()
    incoming = take()
    operations = [dist.P2POp(dist.isend, buffer, peer) for peer, buffer in outgoing.items() if peer != rank]
    operations += [dist.P2POp(dist.irecv, buffer, peer) for peer, buffer in incoming.items() if peer != rank]
    works: list[Any] = dist.batch_isend_irecv(operations) if operations else []
    if rank in outgoing:
        incoming[rank].copy_(outgoing[rank])
    for work in works:
        work.wait()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = torch.tensor([time.perf_counter() - start], device=torch.cuda.current_device())
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)
