"""This rank's part of a job's state as boxes of logical tensors.

Coordinates come from Megatron's own ``sharded_state_dict`` of the model, so grouped-query attention, gated MLPs, tied
embeddings, experts and new models come with it. Two logical tensors stand for a parameter:

- ``weight:<name>``: its fp32 main parameter (bf16, fp16) or, in fp32, the parameter itself. Half-precision weights are
  derived from it. Buffers and frozen parameters of the model are weights too, as they are.
- ``moments:<name>``: the optimizer's tensors for it, together.

An axis that Megatron prepends (layer, expert) goes into the name: ``weight:decoder.layers.mlp.linear_fc1.weight[3]``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model

from copus_ext.adapters.exchange import Piece
from copus_ext.adapters.job import Job
from copus_ext.adapters.optimizer_shards import Shard, UnknownOptimizer, optimizer_shards
from copus_ext.core.reshard.geometry import Box, flat_range_boxes, intersect, shift, strides
from copus_ext.core.reshard.transfer import Holding

_COVERED = ("adam", "sgd", "muon", "lion")
_UNCOVERED = {
    "use_megatron_fsdp": "--use-megatron-fsdp",
    "use_torch_fsdp2": "--use-torch-fsdp2",
    "use_precision_aware_optimizer": "--use-precision-aware-optimizer",
    "optimizer_cpu_offload": "--optimizer-cpu-offload",
    "fp8_param_gather": "--fp8-param-gather",
    "fp4_param_gather": "--fp4-param-gather",
}


class UnsupportedReshard(ValueError):
    """A job whose state this code does not know how to move; said before anything is moved."""


@dataclass
class JobState:
    """Pieces of this rank, and what they hold: ``holdings[i].piece`` is an index into ``pieces``."""

    pieces: list[Piece] = field(default_factory=list)
    holdings: list[Holding] = field(default_factory=list)

    def adopt(self, expected: list[Holding]) -> bool:
        """Have ``expected`` for its own list if both are equal, and say so: a list is soon compared with itself."""
        if self.holdings != expected:
            return False
        self.holdings = expected
        return True

    def add(self, kind: str, piece: Piece, boxes: list[LocalBox]) -> None:
        """Put a piece in, with the logical boxes of the whole local tensor that it is a flat range of."""
        number = len(self.pieces)
        self.pieces.append(piece)
        item_bytes = sum(t.element_size() for t in piece.tensors)
        count = piece.tensors[0].numel()
        if count == math.prod(piece.shape):  # the usual case, without looking for what two boxes have in common
            self.holdings += [Holding(f"{kind}:{name}", box, number, start, item_bytes) for name, box, start in boxes]
            return
        stop = piece.first + count
        for part in flat_range_boxes(piece.shape, piece.first, stop):
            for name, box, start in boxes:
                common = intersect(part, Box(start, box.shape))
                if common:
                    held = Box(shift(box.offset, common.offset, start), common.shape)
                    self.holdings.append(Holding(f"{kind}:{name}", held, number, common.offset, item_bytes))


class LocalBox(NamedTuple):
    """``box`` of logical tensor ``name`` starts at index ``start`` of a local tensor."""

    name: str
    box: Box
    start: tuple[int, ...]


class PlacedTensor(NamedTuple):
    """A model's tensor on this rank, and where its parts lie in logical tensors."""

    tensor: torch.Tensor
    boxes: list[LocalBox]


def uncovered(args: argparse.Namespace) -> str | None:
    """Why a job with these validated arguments cannot be moved; None where it can."""
    flags = [flag for name, flag in _UNCOVERED.items() if getattr(args, name, False)]
    if flags:
        return f"the state of a job with {flags[0]} cannot be moved between layouts yet"
    if args.cuda_graph_impl != "none":  # graphs name the memory that they were captured with
        return f"a job with --cuda-graph-impl {args.cuda_graph_impl} cannot be moved between layouts yet"
    if args.optimizer not in _COVERED:
        return f"the state of --optimizer {args.optimizer} cannot be moved between layouts yet"
    if is_layer_wise(args):
        if not args.bf16:
            return f"--optimizer {args.optimizer} with --use-distributed-optimizer needs --bf16 in megatron-core 0.19.2"
        if args.overlap_param_gather:
            return (
                f"the state of --optimizer {args.optimizer} with --overlap-param-gather "
                "cannot be moved between layouts yet"
            )
    return None


def is_layer_wise(args: argparse.Namespace) -> bool:
    """Whether upstream's optimizer gives whole tensors to ranks, and not even shares of a buffer.

    Validation puts an argument of its own in place of ``use_distributed_optimizer``.
    """
    if args.optimizer in ("adam", "sgd"):
        return False
    return bool(args.use_distributed_optimizer or getattr(args, "use_layer_wise_distributed_optimizer", False))


def job_state(job: Job, *, with_moments: bool) -> JobState:
    """Everything of ``job`` on this rank that has to be in another layout too.

    Args:
        job: its state is looked at, not changed; but moments that the optimizer has not made yet are allocated.
        with_moments: False where no optimizer step was made yet, so that there are none.

    Raises:
        UnsupportedReshard: a tensor that cannot be placed in logical coordinates.
    """
    if not job.has_part:
        return JobState()
    # The job's own group: without it, upstream asks parallel_state, where another layout may be active.
    placed = placed_tensors(job.model, job.groups.dp_cp)
    return state_of(placed, shards_of(job.optimizer), with_moments=with_moments)


def placed_tensors(model: Sequence[Any], dp_cp: Any) -> list[PlacedTensor]:
    """What Megatron would checkpoint of a model's parameters and buffers on this rank, each tensor once.

    Args:
        model: its chunks on this rank, wrapped or not.
        dp_cp: the data and context parallel group.

    Raises:
        UnsupportedReshard: a tensor that cannot be placed, or one that Megatron does not name or copies.
    """
    placed: dict[int, PlacedTensor] = {}
    for entry in _entries(model, dp_cp):
        if id(entry.data) not in placed:
            placed[id(entry.data)] = PlacedTensor(entry.data, _local_boxes(entry))
    _check_complete(model, placed.keys())
    return list(placed.values())


def state_of(placed: Iterable[PlacedTensor], shards: Mapping[int, Shard], *, with_moments: bool) -> JobState:
    """Pieces of a rank that has these tensors of the model.

    Args:
        placed: in the order in which Megatron names them.
        shards: what the optimizer keeps on that rank, by ``id`` of the tensor.
        with_moments: as for ``job_state``.
    """
    state = JobState()
    for tensor, boxes in placed:
        shard = shards.get(id(tensor))
        weight = _weight(tensor, shard)
        if weight is not None:
            state.add("weight", weight, boxes)
        if with_moments and shard is not None and shard.moments:
            state.add("moments", Piece(tuple(tensor.shape), shard.first, _moments(shard)), boxes)
    return state


def shards_of(optimizer: Any) -> dict[int, Shard]:
    """What this rank's part of ``optimizer`` keeps, by ``id`` of the model's parameter.

    Raises:
        UnsupportedReshard: an optimizer that this code does not know.
    """
    try:
        return optimizer_shards(optimizer)
    except UnknownOptimizer as error:
        raise UnsupportedReshard(f"{error}, and cannot be moved between layouts yet") from error


def _entries(model: Sequence[Any], dp_cp: Any) -> Iterator[Any]:
    for chunk in model:
        entries = unwrap_model(chunk).sharded_state_dict(metadata={"dp_cp_group": dp_cp})
        for entry in nested_values(entries):
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.data.numel():
                yield entry
            elif not isinstance(entry, ShardedObject | ShardedTensor | ShardedTensorFactory):
                raise UnsupportedReshard(f"the model keeps a {type(entry).__name__} that is not sharded state")


def _local_boxes(entry: Any) -> list[LocalBox]:
    """Where each part of a local tensor lies in its logical tensor; a gated MLP's has two parts."""
    if isinstance(entry, ShardedTensor):
        return [_local_box(entry, (0,) * entry.data.dim())]
    # A stand-in without memory tells where the factory cuts: its parts are views at their offsets.
    stand_in = torch.empty(entry.data.shape, dtype=entry.data.dtype, device="meta")
    boxes = []
    for part in _parts(entry.build_fn(entry.key, stand_in, entry.replica_id, None)):
        if part.data._base is not stand_in or part.data.stride() != stand_in.stride():
            raise UnsupportedReshard(f"Megatron stores {entry.key} rearranged, so it has no place in coordinates")
        boxes.append(_local_box(part, _index_of(part.data.storage_offset(), tuple(stand_in.shape))))
    return boxes


def _parts(built: Any) -> list[Any]:
    return list(nested_values(built)) if isinstance(built, dict | list) else [built]


def _index_of(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for step in strides(shape):
        position, flat = divmod(flat, step)
        index.append(position)
    return tuple(index)


def _local_box(entry: ShardedTensor, start: tuple[int, ...]) -> LocalBox:
    prepended = entry.prepend_axis_num
    place = "".join(f"[{i}]" for i in entry.global_offset[:prepended])
    return LocalBox(f"{entry.key}{place}", Box(tuple(entry.global_offset[prepended:]), tuple(entry.data.shape)), start)


def _weight(tensor: torch.Tensor, shard: Shard | None) -> Piece | None:
    """Of a parameter or buffer, what has to be moved; None where the main parameter is on other ranks altogether."""
    if shard is not None and shard.main.dtype != tensor.dtype:
        return Piece(tuple(tensor.shape), shard.first, (_flat(shard.main),))
    if shard is None and tensor.requires_grad and tensor.dtype != torch.float32:
        return None
    # In fp32 a distributed optimizer's main parameters are views of the whole ones, which every rank holds anyway.
    return Piece(tuple(tensor.shape), 0, (_flat(tensor),))


def _moments(shard: Shard) -> tuple[torch.Tensor, ...]:
    """The optimizer's tensors, made (not filled) where they are not there."""
    kept = shard.optimizer.state[shard.main]
    for name in shard.moments:
        if kept.get(name) is None:
            kept[name] = torch.empty_like(shard.main, memory_format=torch.contiguous_format, requires_grad=False)
    return tuple(_flat(kept[name]) for name in shard.moments)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1)


def _check_complete(model: Sequence[Any], seen: Set[int]) -> None:
    """Every parameter was seen, and nothing but parameters and buffers: a copy could not be written to."""
    parameters = {id(p): name for chunk in model for name, p in chunk.named_parameters()}
    buffers = {id(b) for chunk in model for b in unwrap_model(chunk).buffers()}
    missing = parameters.keys() - seen
    if missing:
        raise UnsupportedReshard(f"Megatron's sharded state does not name parameter {parameters[missing.pop()]}")
    if seen - parameters.keys() - buffers:
        raise UnsupportedReshard("Megatron's sharded state holds copies of tensors, which cannot be written to")
