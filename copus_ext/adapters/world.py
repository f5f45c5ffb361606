"""Jobs on part of the world: all processes stay, and a layout of ``n`` ranks is on the first ``n`` of them.

Much of upstream talks to torch's default group, which is the one of all processes: ``get_world_size()``, barriers,
whatever names no group. A job on part of the world would wait there for ranks that have no part in it. So while such a
job is in charge, its ranks have the group of that part for the default one, and upstream sees a world of ``n`` ranks.
A rank has the same number in both, since the part is the first ``n``. On the other ranks nothing of upstream runs.

Two things are of the whole world, whoever is in charge. Groups are made by all ranks
(:class:`~copus_ext.adapters.layouts.LayoutGroups`), since torch names them by counting, and ranks that count
differently would wait for each other under different names. And a reshard is between all ranks: what is agreed on
there, and sent, names its group (:func:`whole_world`).
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import distributed_c10d


def whole_world() -> dist.ProcessGroup:
    """The group of all processes, whichever is the default one: the first, since all others are made out of it."""
    return next(iter(distributed_c10d._world.pg_map))


def has_part(ranks: int) -> bool:
    """Whether this process is among the first ``ranks``."""
    return whole_world().rank() < ranks


def make_default(group: dist.ProcessGroup) -> None:
    """Let what names no group be over ``group``, whose ranks must be the first ones of the world, this one among them.

    There is no public name for it.
    """
    if distributed_c10d._world.default_pg is not group:
        distributed_c10d._update_default_pg(group)


def groups_counted() -> int:
    """How many groups this rank has counted so far; what torch names the next one by."""
    return distributed_c10d._world.group_count


def count_groups_from(number: int) -> None:
    """Name the next group by ``number``, which must be no smaller than :func:`groups_counted`."""
    distributed_c10d._world.group_count = number
