"""Logical tensors of a job, put together from all ranks, and checked to be the same on all that hold them.

Ranks that have no part in the job get them, too.
"""

from __future__ import annotations

from typing import Any


def full_weights(job: Any) -> dict[str, Any]:
    """The model's own parameters and buffers, by the coordinates of Megatron's checkpoints."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.utils import unwrap_model

    parts = []
    for chunk in job.model:
        entries = unwrap_model(chunk).sharded_state_dict(metadata={"dp_cp_group": job.groups.dp_cp})
        apply_factories(entries)
        for entry in nested_values(entries):
            if isinstance(entry, ShardedTensor):
                place, tensor = entry.global_offset, entry.data.detach()
                added = (1,) * entry.prepend_axis_num
                parts.append((entry.key, place, tensor.reshape(added + tuple(tensor.shape)).clone()))
    return _together(parts)


def full_state(job: Any) -> dict[str, Any]:
    """Main parameters and optimizer moments (none before the first step), by logical tensor."""
    from copus_ext.adapters.carry import optimizer_step
    from copus_ext.adapters.job_state import job_state

    state = job_state(job, with_moments=optimizer_step(job) >= 0)
    parts = []
    for holding in state.holdings:
        views = state.pieces[holding.piece].views(holding.start, holding.box.shape)
        parts += [(f"{holding.key}#{n}", holding.box.offset, view.clone()) for n, view in enumerate(views)]
    return _together(parts)


def _together(mine: list[tuple[str, tuple[int, ...], Any]]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from copus_ext.adapters.world import whole_world

    everyone: list[Any] = [None] * whole_world().size()
    dist.all_gather_object(everyone, mine, group=whole_world())
    found: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
    for name, offset, tensor in (part for parts in everyone for part in parts):
        found.setdefault(name, []).append((offset, tensor))
    full = {}
    for name, parts in found.items():
        ends = [[o + n for o, n in zip(offset, t.shape, strict=True)] for offset, t in parts]
        whole = torch.zeros([max(axis) for axis in zip(*ends, strict=True)], dtype=parts[0][1].dtype)
        known = torch.zeros(whole.shape, dtype=torch.bool)
        for offset, tensor in parts:
            window = tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))
            agrees = (whole[window] == tensor) | ~known[window]
            assert agrees.all(), f"replicas of {name} differ"
            whole[window], known[window] = tensor, True
        assert known.all(), f"nobody holds part of {name}"
        full[name] = whole
    return full


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Bit for bit."""
    import torch

    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())
