"""What every rank of a layout holds, from the layout's arguments alone: nothing is sent, and no weights are allocated.

Upstream builds each pipeline stage once, on torch's meta device, in the place of one of its ranks. What each rank of
the stage holds of it is then said by the code that says it of a real job (``job_state``). Which of several optimizers
(Muon, and Adam for the rest) has a parameter is said by upstream's optimizer, built for the model on the meta device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.job_state import (
    PlacedTensor,
    UnsupportedReshard,
    is_layer_wise,
    placed_tensors,
    shards_of,
    state_of,
    uncovered,
)
from copus_ext.adapters.meta_model import META, Chunk, WholeLayers, build_on_meta, optimizer_on_meta
from copus_ext.adapters.optimizer_shards import Shard
from copus_ext.adapters.stand_in import Seat, in_place_of
from copus_ext.core.plan import Plan
from copus_ext.core.reshard.transfer import Holding


def holdings_of_layout(plan: Plan, args: argparse.Namespace, *, with_moments: bool) -> list[list[Holding]]:
    """By rank of the layout, what ``job_state(job, with_moments=...).holdings`` of a job built for ``plan`` is there.

    The layout's groups need not exist, and it may have more or fewer ranks than there are processes. Upstream's globals
    are other ones meanwhile, and then as they were: see :func:`in_place_of`.

    Args:
        plan: of which only the layout counts.
        args: upstream's validated arguments for it (``world_size`` of the layout, ``padded_vocab_size`` of the run).
        with_moments: as for ``job_state``.

    Returns:
        A list for each rank. Ranks that hold the same share one list, which is not to be changed.

    Raises:
        UnsupportedReshard: as by ``reshard`` and ``job_state``.
    """
    if reason := uncovered(args):
        raise UnsupportedReshard(reason)
    world_size = plan.layout.world_size
    found: dict[int, list[Holding]] = {}
    for rank in range(world_size):
        if rank not in found:
            with in_place_of(rank, world_size, args) as seat:
                found |= _holdings_of_stage(seat, args, with_moments)
    return [found[rank] for rank in range(world_size)]


def _holdings_of_stage(seat: Seat, args: argparse.Namespace, with_moments: bool) -> dict[int, list[Holding]]:
    """By rank, for all in the pipeline stage of ``seat``. They have the same tensors, in other places."""
    chunks = build_on_meta(args, seat.groups)
    model = [chunk.module for chunk in chunks]
    optimizer = optimizer_on_meta(chunks, args, seat.groups)
    whole = shards_of(optimizer)
    if args.use_distributed_optimizer:
        shards = _sharded(whole, chunks, seat.groups)
    elif is_layer_wise(args):
        shards = _in_layers(_in_fp32(whole), optimizer)
    else:
        shards = _Shards([_in_fp32(whole)], [{}])  # every rank keeps all
    found: dict[int, list[Holding]] = {}
    for rank in seat.groups.tp_dp_cp.ranks:
        if rank not in found:
            seat.rank = rank
            placed = placed_tensors(model, seat.groups.dp_cp)
            found |= _holdings_of_replicas(seat.groups, placed, shards, with_moments)
    return found


def _holdings_of_replicas(
    groups: ProcessGroupCollection, placed: list[PlacedTensor], shards: _Shards, with_moments: bool
) -> dict[int, list[Holding]]:
    """By rank, for all that have ``placed``. They differ in what their optimizers keep."""
    dense_ranks, expert_ranks = groups.dp_cp.ranks, groups.expt_dp.ranks
    of_place: dict[tuple[int, int], list[Holding]] = {}
    equal: dict[tuple[Holding, ...], list[Holding]] = {}  # in fp32 they are without moments, wherever the shards lie
    found = {}
    # Expert parallelism lies across data parallelism: only ranks that are in both groups have the same experts too.
    for rank in sorted({*dense_ranks} & {*expert_ranks}):
        # Optimizers are sharded over these groups, or over even slices of them (several instances).
        place = dense_ranks.index(rank) % len(shards.dense), expert_ranks.index(rank) % len(shards.expert)
        if place not in of_place:
            kept = shards.dense[place[0]] | shards.expert[place[1]]
            holdings = state_of(placed, kept, with_moments=with_moments).holdings
            of_place[place] = equal.setdefault(tuple(holdings), holdings)
        found[rank] = of_place[place]
    return found


class _Shards(NamedTuple):
    """What an optimizer keeps, by place in the group it is sharded over, and by ``id`` of the parameter."""

    dense: Sequence[dict[int, Shard]]
    expert: Sequence[dict[int, Shard]]


def _in_fp32(whole: Mapping[int, Shard]) -> dict[int, Shard]:
    """With fp32 copies of what is in half precision."""
    return {parameter: shard._replace(main=shard.main.detach().float()) for parameter, shard in whole.items()}


def _in_layers(kept: Mapping[int, Shard], optimizer: WholeLayers) -> _Shards:
    """Every parameter is one rank's of its group. Upstream makes no lists for groups of one rank: it keeps all."""
    given = [optimizer.dp_cp_params_list, optimizer.expt_dp_params_list]
    dense, expert = ([{id(p): kept[id(p)] for p in parameters} for parameters in one or []] for one in given)
    shared_out = {parameter for place in (*dense, *expert) for parameter in place}
    alone = {parameter: shard for parameter, shard in kept.items() if parameter not in shared_out}
    return _Shards([place | alone for place in dense or [{}]], expert or [{}])


def _sharded(whole: Mapping[int, Shard], chunks: list[Chunk], groups: ProcessGroupCollection) -> _Shards:
    """Every bucket of a buffer is cut evenly over the group, across the parameters in it."""
    shards = _Shards([{} for _ in groups.intra_dp_cp.ranks], [{} for _ in groups.intra_expt_dp.ranks])
    for chunk in chunks:
        for key, layout in chunk.layouts.items():
            by_place = shards.expert if key.is_expert_parallel else shards.dense
            for parameter, (start, stop, bucket) in layout.param_index_map.items():
                for place, first, end in _cuts(start, stop, layout.bucket_indices[bucket], len(by_place)):
                    main = torch.empty(end - first, dtype=torch.float32, device=META)
                    by_place[place][id(parameter)] = whole[id(parameter)]._replace(main=main, first=first - start)
    return shards


def _cuts(start: int, stop: int, bucket: tuple[int, int], ways: int) -> Iterator[tuple[int, int, int]]:
    """The places, of ``ways``, that have part of ``[start, stop)`` of a buffer, each with its part."""
    share = (bucket[1] - bucket[0]) // ways
    for place in range((start - bucket[0]) // share, ways):
        begin = bucket[0] + place * share
        if begin >= stop:
            return
        yield place, max(start, begin), min(stop, begin + share)
