"""The process groups of several layouts, alive in one process.

Upstream keeps the groups of *the* layout in module globals of ``parallel_state``, and much of it reads them there. So a
layout that was used once keeps a snapshot of those globals, and going to it again puts the snapshot back: no group is
made twice, none is destroyed. This is the one place of ours that touches those globals.

A layout may have fewer ranks than there are processes (:mod:`copus_ext.adapters.world`).
"""

from __future__ import annotations

import argparse
import copy
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.agreement import largest
from copus_ext.adapters.world import count_groups_from, groups_counted, has_part, make_default, whole_world
from copus_ext.core.plan import Layout


def globals_of_parallel_state() -> dict[str, Any]:
    """What upstream keeps of the layout that is active, by name."""
    names = [name for name in vars(parallel_state) if name.startswith("_") and name[1:2].isupper()]
    names.append("_global_process_group_list")
    return {name: _shallow_copy(getattr(parallel_state, name)) for name in names}


def _shallow_copy(value: Any) -> Any:
    """A container of its own; process groups themselves can't be copied and needn't be."""
    return copy.copy(value) if isinstance(value, dict | list) else value


def install_globals(snapshot: dict[str, Any]) -> None:
    """Put back what :func:`globals_of_parallel_state` gave."""
    for name, value in snapshot.items():
        setattr(parallel_state, name, _shallow_copy(value))


class LayoutGroups:
    """Process groups by layout. Make one before upstream initialises model parallelism.

    All ranks, also those that a layout leaves idle, must ask for the same layouts in the same order: making a layout's
    groups is collective.
    """

    def __init__(self) -> None:
        self._pristine = globals_of_parallel_state()
        self._snapshots: dict[Layout, dict[str, Any]] = {}
        self._active: Layout | None = None
        self._parts: dict[int, dist.ProcessGroup] = {}  # of the world, by the number of ranks

    @staticmethod
    def _key(layout: Layout) -> Layout:
        """What of a layout decides its groups."""
        return Layout(dp=layout.dp, tp=layout.tp, pp=layout.pp, vpp=layout.vpp, cp=layout.cp, ep=layout.ep)

    def adopt(self, layout: Layout) -> ProcessGroupCollection:
        """Take the groups that upstream has just made for ``layout``, which has all ranks, under this roof."""
        self._active = self._key(layout)
        self._parts[layout.world_size] = whole_world()
        self._snapshots[self._active] = globals_of_parallel_state()
        return ProcessGroupCollection.use_mpu_process_groups()

    def activate(self, layout: Layout, args: argparse.Namespace) -> ProcessGroupCollection:
        """Make ``layout`` the current one; ``args`` are upstream's validated arguments for it.

        torch's default group is the one of the layout's ranks from then on. A rank that the layout leaves idle gets an
        empty collection, and keeps the group of all.

        Raises:
            ValueError: there are not as many ranks.
        """
        key = self._key(layout)
        if key.world_size > whole_world().size():
            raise ValueError(f"{layout} takes {key.world_size} ranks, and there are {whole_world().size()}")
        if self._active is not None:  # upstream changes some of them as it goes
            self._snapshots[self._active] = globals_of_parallel_state()
        self._active = None  # if making groups fails, what there is by then is no layout's
        make_default(whole_world())
        if key in self._snapshots:
            install_globals(self._snapshots[key])
        else:
            install_globals(self._pristine)
            count_groups_from(largest(groups_counted()))  # upstream may have made some on part of the world
            make_groups(args)
            if key.world_size not in self._parts:
                self._parts[key.world_size] = _first_ranks(key.world_size, args)
        self._active = key
        self._snapshots[key] = globals_of_parallel_state()
        if not has_part(key.world_size):
            return ProcessGroupCollection()
        make_default(self._parts[key.world_size])
        return ProcessGroupCollection.use_mpu_process_groups()

    def __contains__(self, layout: Layout) -> bool:
        return self._key(layout) in self._snapshots


def _first_ranks(count: int, args: argparse.Namespace) -> dist.ProcessGroup:
    """A group of theirs; made by all ranks."""
    if count == whole_world().size():
        return whole_world()
    return dist.new_group(list(range(count)), timeout=timedelta(minutes=args.distributed_timeout_minutes))


def make_groups(args: argparse.Namespace) -> None:
    """Upstream's ``initialize_model_parallel`` with the arguments ``initialize_megatron`` gives it.

    On the first ``args.world_size`` ranks. The others make the same groups, and find none for themselves.
    """
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_comm_backend=args.pipeline_model_parallel_comm_backend,
        use_sharp=args.use_sharp,
        context_parallel_size=args.context_parallel_size,
        hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
        expert_model_parallel_size=args.expert_model_parallel_size,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
        nccl_communicator_config_path=args.nccl_communicator_config_path,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        create_gloo_process_groups=args.use_gloo_process_groups,
        high_priority_stream_groups=args.high_priority_stream_groups,
        sharp_enabled_group=args.sharp_enabled_group,
        local_world_size=args.world_size,
    )
