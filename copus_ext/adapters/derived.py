"""Half-precision weights are not moved: what they are follows from main parameters, where those have arrived."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.distributed.param_and_grad_buffer import shard_buffer

from copus_ext.adapters.agreement import largest
from copus_ext.adapters.job import Job
from copus_ext.adapters.job_state import is_layer_wise
from copus_ext.adapters.optimizer_shards import inner_optimizers
from copus_ext.adapters.wire import MemoryWire, Parcel, ReadFailed, Wire
from copus_ext.adapters.world import whole_world


def derive_weights(job: Job, wire: Wire | None = None) -> bool:
    """Make half-precision weights, of which a distributed optimizer has some, and the others come from other ranks.

    Collective over all processes. Those of other ranks come over ``wire`` if it is memory and upstream does not overlap
    its gathers, for then each bucket group has flags that only its own functions set; and else by messages.

    Returns:
        Whether ``wire`` may be used again: the same on every rank, which have all told by a message.
    """
    args = job.args
    if not (args.bf16 or args.fp16):
        return True
    for wrapper in inner_optimizers(job.optimizer):
        wrapper._copy_main_params_to_model_params()
    if is_layer_wise(args) and job.has_part:
        job.optimizer.allgather_params()
    if not args.use_distributed_optimizer:
        return True
    memory = wire if isinstance(wire, MemoryWire) and not args.overlap_param_gather else None
    if memory is not None and _read(job, memory):
        return True
    _gather(job)
    return memory is None


def finish_gathers(job: Job) -> None:
    """Where gathering updated weights overlaps with the next forward pass, some are still on their way, or old."""
    if job.args.overlap_param_gather:
        _gather(job)


def _gather(job: Job) -> None:
    for chunk in job.model:
        chunk.start_param_sync(force_sync=True)


def _read(job: Job, wire: MemoryWire) -> bool:
    """Whether every rank could read what it lacks."""
    sent, received = [], []
    for ranks, bucket in _buckets(job):
        shards = shard_buffer(bucket, len(ranks))
        mine = shards[ranks.index(whole_world().rank())]
        others = [(rank, shard) for rank, shard in zip(ranks, shards, strict=True) if shard is not mine]
        sent += [Parcel(rank, mine) for rank, _ in others]
        received += [Parcel(rank, shard) for rank, shard in others]
    failed = False
    try:
        wire.carry(sent, received, lambda: None)
    except ReadFailed:
        failed = True
    return not largest(int(failed))  # by a message, behind which weights may change


def _buckets(job: Job) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Weights that are gathered together, and the ranks that each have an equal share of them, in that order."""
    for chunk in job.model:
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            ranks = dist.get_process_group_ranks(group.intra_distributed_optimizer_instance_group)
            yield from ((ranks, bucket.param_data) for bucket in group.buckets)
