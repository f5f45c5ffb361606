"""Upstream's view of a layout from the place of any of its ranks: no group is made, nobody else takes part."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import global_vars

from copus_ext.adapters.layouts import globals_of_parallel_state, install_globals, make_groups
from copus_ext.adapters.replaced import replaced

# What only decides how ranks talk. Upstream would read files, set environment variables and wait for others.
_ABOUT_COMMUNICATION: dict[str, Any] = {
    "use_gloo_process_groups": False,
    "use_sharp": False,
    "sharp_enabled_group": None,
    "nccl_communicator_config_path": None,
    "high_priority_stream_groups": None,
}


class Seat:
    """The rank whose place is taken; set ``rank`` to take another's. ``groups`` then answer as that one's would.

    What upstream keeps in globals (who belongs to a group, by rank) stays as the first rank has it. That is the same
    for all ranks of a pipeline stage as far as the model is concerned, and it is these among which one can move.
    """

    groups: ProcessGroupCollection

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self._roles: defaultdict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
        everyone = tuple(range(world_size))
        self._world = StandInGroup(self, dict.fromkeys(everyone, everyone))

    def create_group(self, ranks: Sequence[int], *_: Any, group_desc: str, **__: Any) -> StandInGroup | None:
        """In place of upstream's function of this name: groups of one description are one group, seen by many."""
        role = self._roles[group_desc]
        role |= dict.fromkeys(ranks, tuple(ranks))
        return StandInGroup(self, role) if self.rank in ranks else None

    def answers(self) -> dict[str, Callable[..., Any]]:
        """In place of functions of torch.distributed: what is asked when groups and models are made."""
        return {
            "is_initialized": lambda: True,
            "get_rank": lambda group=None: (group or self._world).rank(),
            "get_world_size": lambda group=None: (group or self._world).size(),
            "get_process_group_ranks": lambda group=None: list((group or self._world).ranks),
        }


class StandInGroup:
    """A process group as the rank in ``seat`` would see its own. It answers questions and moves no data.

    Args:
        seat: whose group.
        members: by rank, all ranks of its group, in the group's order.
    """

    def __init__(self, seat: Seat, members: dict[int, tuple[int, ...]]) -> None:
        self._seat, self._members = seat, members

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks in the group's order."""
        return self._members[self._seat.rank]

    def rank(self) -> int:
        """Position in the group."""
        return self.ranks.index(self._seat.rank)

    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


@contextlib.contextmanager
def in_place_of(rank: int, world_size: int, args: argparse.Namespace) -> Iterator[Seat]:
    """Inside, upstream takes this process for ``rank`` of ``world_size`` in the layout of ``args``.

    All that upstream keeps in globals is as before when the block ends, also by an exception. Globals are the
    process's: no other thread may use torch.distributed or Megatron meanwhile. A collective inside fails.

    Args:
        rank: a rank of the layout; there need not be a process of that rank.
        world_size: ranks of the layout, whatever the number of processes.
        args: upstream's validated arguments for the layout.
    """
    seat = Seat(rank, world_size)
    found = globals_of_parallel_state()
    with (
        replaced(torch.distributed, **seat.answers()),
        replaced(parallel_state, create_group=seat.create_group),
        replaced(global_vars, _GLOBAL_ARGS=args),
        _hushed(),
    ):
        try:
            install_globals({name: {} if isinstance(value, dict) else None for name, value in found.items()})
            make_groups(argparse.Namespace(**{**vars(args), **_ABOUT_COMMUNICATION}))
            seat.groups = ProcessGroupCollection.use_mpu_process_groups()
            yield seat
        finally:
            install_globals(found)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Upstream's warnings of a model were given when a real one was built, and by one rank, not by each as rank 0."""
    found = logging.root.manager.disable
    logging.disable(max(found, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(found)
