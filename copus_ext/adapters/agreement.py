"""Small numbers of all ranks put together in few hops: what ranks wait for in a switch is mostly each other.

All ranks are those of the whole world, also where the job in charge is on part of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from copus_ext.adapters.world import whole_world

_FEW = 16  # ranks up to which everybody tells everybody: one hop, where a ring has two for every rank but one


def of_all_ranks(numbers: torch.Tensor) -> torch.Tensor:
    """[n] of each rank to [ranks, n]. Collective."""
    world = whole_world()
    gathered = torch.empty(world.size() * numbers.numel(), dtype=numbers.dtype, device=numbers.device)
    dist.all_to_all_single(gathered, numbers.repeat(world.size()), group=world)
    return gathered.view(world.size(), -1)


def added_up(numbers: torch.Tensor) -> torch.Tensor:
    """[n] of each rank, added up over ranks. Collective."""
    if whole_world().size() <= _FEW:
        return of_all_ranks(numbers).sum(0)
    total = numbers.clone()
    dist.all_reduce(total, group=whole_world())
    return total


def largest(number: int) -> int:
    """Of what all ranks give. Collective."""
    mine = torch.tensor([number], dtype=torch.int64, device=torch.cuda.current_device())
    if whole_world().size() <= _FEW:
        return int(of_all_ranks(mine).max())
    dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=whole_world())
    return int(mine)


def first_failure(mine: str | None) -> str | None:
    """What the first rank that failed says of it; ``None`` where none did. Collective."""
    return first_said(mine) if largest(int(mine is not None)) else None


def first_said(mine: str | None) -> str:
    """What the first rank says that has something to say, which one must have. Collective."""
    said: list[str | None] = [None] * whole_world().size()
    dist.all_gather_object(said, mine, group=whole_world())
    return next(words for words in said if words is not None)


def of_first_rank(value: Any) -> Any:
    """What rank 0 gives, on every rank. Collective. Rank 0 has a part in every job."""
    said = [value]
    dist.broadcast_object_list(said, src=0, group=whole_world())
    return said[0]
