"""Small numbers of all ranks put together in few hops: what ranks wait for in a switch is mostly each other."""

from __future__ import annotations

import torch
import torch.distributed as dist

_FEW = 16  # ranks up to which everybody tells everybody: one hop, where a ring has two for every rank but one


def of_all_ranks(numbers: torch.Tensor) -> torch.Tensor:
    """[n] of each rank to [ranks, n]. Collective."""
    world = dist.get_world_size()
    gathered = torch.empty(world * numbers.numel(), dtype=numbers.dtype, device=numbers.device)
    dist.all_to_all_single(gathered, numbers.repeat(world))
    return gathered.view(world, -1)


def added_up(numbers: torch.Tensor) -> torch.Tensor:
    """[n] of each rank, added up over ranks. Collective."""
    if dist.get_world_size() <= _FEW:
        return of_all_ranks(numbers).sum(0)
    total = numbers.clone()
    dist.all_reduce(total)
    return total


def largest(number: int) -> int:
    """Of what all ranks give. Collective."""
    mine = torch.tensor([number], dtype=torch.int64, device=torch.cuda.current_device())
    if dist.get_world_size() <= _FEW:
        return int(of_all_ranks(mine).max())
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return int(mine)


def first_failure(mine: str | None) -> str | None:
    """What the first rank that failed says of it; ``None`` where none did. Collective."""
    return first_said(mine) if largest(int(mine is not None)) else None


def first_said(mine: str | None) -> str:
    """What the first rank says that has something to say, which one must have. Collective."""
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return next(words for words in said if words is not None)
