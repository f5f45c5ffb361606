"""Logical tensors of a job, put together from all ranks, and checked to be the same on all that hold them.

Each rank puts together its share of them, also one that has no part in the job: ask all ranks what they found.
"""

from __future__ import annotations

import pickle
import zlib
from typing import Any

import numpy as np

Part = tuple[str, tuple[int, ...], "np.ndarray[Any, Any]"]  # of a tensor, from an offset on, the bits as integers


def full_weights(job: Any) -> dict[str, Any]:
    """The model's own parameters and buffers, by the coordinates of Megatron's checkpoints: this rank's share."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.utils import unwrap_model

    parts = []
    for chunk in job.model:
        entries = unwrap_model(chunk).sharded_state_dict(metadata={"dp_cp_group": job.groups.dp_cp})
        apply_factories(entries)
        for entry in nested_values(entries):
            if isinstance(entry, ShardedTensor):
                place, bits = entry.global_offset, _bits(entry.data)
                parts.append(
                    (f"{entry.key} {entry.data.dtype}", place, bits.reshape((1,) * entry.prepend_axis_num + bits.shape))
                )
    return _together(parts)


def full_state(job: Any) -> dict[str, Any]:
    """Main parameters and optimizer moments (none before the first step), by logical tensor: this rank's share."""
    from copus_ext.adapters.carry import optimizer_step
    from copus_ext.adapters.job_state import job_state

    state = job_state(job, with_moments=optimizer_step(job) >= 0)
    parts = []
    for holding in state.holdings:
        views = state.pieces[holding.piece].views(holding.start, holding.box.shape)
        parts += [(f"{holding.key}#{n} {view.dtype}", holding.box.offset, _bits(view)) for n, view in enumerate(views)]
    return _together(parts)


def _bits(tensor: Any) -> np.ndarray[Any, Any]:
    """NumPy knows no bfloat16, and what is compared are bits. Of a copy: memory shared with NumPy can't be moved."""
    import torch

    integers = getattr(torch, f"int{8 * tensor.element_size()}")
    return tensor.detach().clone().view(integers).numpy()


def _together(mine: list[Part]) -> dict[str, Any]:
    import torch.distributed as dist

    from copus_ext.adapters.world import whole_world

    world = whole_world()
    shares: list[list[Part]] = [[] for _ in range(world.size())]
    for part in mine:
        shares[zlib.crc32(part[0].encode()) % world.size()].append(part)
    everyone: list[Any] = [None] * world.size()
    dist.all_gather_object(everyone, [pickle.dumps(share) for share in shares if mine], group=world)
    found: dict[str, list[Part]] = {}
    assert any(everyone), "nobody holds anything"
    for theirs in filter(None, everyone):
        for part in pickle.loads(theirs[world.rank()]):
            found.setdefault(part[0], []).append(part)
    return {name: _whole(parts) for name, parts in found.items()}


def _whole(parts: list[Part]) -> np.ndarray[Any, Any]:
    """A tensor of all its parts."""
    name, _, first = parts[0]
    ends = [[o + n for o, n in zip(offset, bits.shape, strict=True)] for _, offset, bits in parts]
    whole = np.zeros([max(axis) for axis in zip(*ends, strict=True)], first.dtype)
    known = np.zeros(whole.shape, bool)
    for _, offset, bits in parts:
        window = tuple(slice(o, o + n) for o, n in zip(offset, bits.shape, strict=True))
        assert ((whole[window] == bits) | ~known[window]).all(), f"replicas of {name} differ"
        whole[window], known[window] = bits, True
    assert known.all(), f"nobody holds part of {name}"
    return whole


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(np.array_equal(bits, right[name]) for name, bits in left.items())
