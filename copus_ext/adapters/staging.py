"""Does a stream fit on the device, or does what is held have to go through host memory?"""

from __future__ import annotations

import torch

from copus_ext.adapters.agreement import largest
from copus_ext.adapters.job_memory import Side
from copus_ext.adapters.world import whole_world
from copus_ext.core.reshard.streaming import Stream


def has_to_be_staged(plan: Stream, old: Side, new: Side) -> bool:
    """Whether any rank has less memory free than the stream takes of it in between. Collective. Never on a CPU.

    Gradients and derived weights of the old job must be gone.
    """
    if old.memory.device.type != "cuda":
        return False
    short = extra_bytes(plan, old, new, whole_world().rank()) > free_bytes(old.memory.device)
    return bool(largest(int(short)))


def extra_bytes(plan: Stream, old: Side, new: Side, rank: int) -> int:
    """What a stream takes on this rank at its worst, beyond what is held when it begins; with room for packing."""
    first, *freed = old.freed_with(plan.released_by(rank))
    held = worst = -old.memory.kept.total(first)
    filled: set[int] = set()
    for this, then_free in zip(plan.rounds, freed, strict=True):
        arriving = set(new.of(t.given.piece for t in this.transfers if t.target == rank)) - filled
        filled |= arriving
        held += new.memory.kept.total(arriving)
        worst = max(worst, held + plan.limit_bytes)
        held -= old.memory.kept.total(then_free)
    return max(worst, new.memory.nbytes - old.memory.kept.held)


def free_bytes(device: torch.device) -> int:
    """Of a GPU; what its allocator keeps for later included."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
