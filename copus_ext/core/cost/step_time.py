"""How long a step takes, in closed form: the prior that measurements correct."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from copus_ext.core.cost.hardware import Hardware
from copus_ext.core.cost.layer_time import LayerTime, layer_time, output_layer_time, tokens
from copus_ext.core.cost.links import all_reduce_s, bandwidth
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import RunOptions
from copus_ext.core.cost.plan_table import PlanTable
from copus_ext.core.plan import Plan

# Bytes of memory traffic of the optimizer step, per parameter.
_ADAM_BYTES = 28  # parameter (main parameter), gradient and two moments read, all but the gradient written
_TORCH_ADAM_BYTES = 80  # the same, one operation after another: decay 8, moments 12 + 20, divisor 24, update 16
_CLIP_BYTES = 12  # gradient read for its norm, read and written to scale it
_ZERO_GRADIENT_BYTES = 4
_P2P_OVERLAPPED = 0.5  # of the messages between stages, where the interleaved schedule overlaps them


@dataclass(frozen=True)
class StepTimeParts:
    """Seconds of a step by what they are spent on, as the slowest rank sees them; they add up to ``total``. [n]."""

    matmul: Any
    attention: Any
    traffic: Any  # element-wise work, which memory bandwidth limits
    overhead: Any  # launching kernels
    tensor: Any  # all-reduces of tensor parallelism
    context: Any  # keys and values on their way round, as far as attention does not hide them
    expert: Any  # tokens on their way to experts and back
    bubble: Any  # waiting for other pipeline stages
    pipeline: Any  # sending activations and their gradients between stages
    data: Any  # reducing gradients, gathering parameters
    optimizer: Any
    fixed: Any

    @property
    def compute(self) -> Any:
        """Forward and backward passes."""
        return self.matmul + self.attention + self.traffic + self.overhead

    @property
    def total(self) -> Any:
        """Seconds of the whole step."""
        return sum(self.columns())

    def columns(self) -> Iterator[Any]:
        """The parts in the order of the fields."""
        return (getattr(self, field.name) for field in fields(self))


PARTS = tuple(field.name for field in fields(StepTimeParts))
_IN_LAYERS = ("matmul", "attention", "traffic", "overhead", "tensor", "context", "expert")


def step_time_parts(
    plan: Plan, model: ModelShape, hardware: Hardware, options: RunOptions | None = None
) -> StepTimeParts:
    """Predicted seconds of one step of ``plan``, by component."""
    parts = step_times(PlanTable.of([plan]), model, hardware, options or RunOptions())
    return StepTimeParts(*(float(column[0]) for column in parts.columns()))


def step_times(table: PlanTable, model: ModelShape, hardware: Hardware, options: RunOptions) -> StepTimeParts:
    """Predicted seconds of one step of each of n plans, by component.

    A pipeline of p stages of v chunks runs m micro-batches in the time of m on the slowest stage plus (p - 1) / v of
    the others (Narayanan et al. 2021, arXiv 2104.04473, section 2.2). That holds for ranks with a device each. Where
    ranks share cores, one that waits leaves its core to another, so the step takes the longer of that critical path
    and all work divided by the speed of all cores.
    """
    micro_steps, fill = table.num_microbatches, (table.pp - 1) / table.vpp
    layer = layer_time(table, model, hardware, options)
    head = output_layer_time(table, model, hardware, options)
    layers, last_layers = _layers_of_stages(table, model)
    with_head = last_layers * layer.total + head.total > layers * layer.total
    slowest = {
        name: np.where(
            with_head,
            last_layers * getattr(layer, name) + getattr(head, name),
            layers * getattr(layer, name),
        )
        for name in _IN_LAYERS
    }
    hop = _hop_seconds(table, model, hardware, options)
    stage = layers * layer.total
    data = _data_seconds(table, model, hardware, options, layer)
    optimizer = _optimizer_seconds(table, model, hardware, options)
    fixed = np.full_like(stage, hardware.step_overhead_s)
    path = StepTimeParts(
        **{name: micro_steps * seconds for name, seconds in slowest.items()},
        bubble=fill * stage,
        pipeline=(micro_steps + fill) * hop,
        data=data,
        optimizer=optimizer,
        fixed=fixed,
    )
    # Of an average rank, which unlike the slowest one has its share of the output layer.
    computing = micro_steps * (model.layers * _on_cores(layer) + _on_cores(head)) / table.pp
    mean_micro_step = (model.layers * layer.total + head.total) / table.pp + hop
    others = micro_steps * mean_micro_step - computing + data + optimizer + fixed
    return _share_devices(path, computing, others, stage, table, hardware)


def _on_cores(part: LayerTime | StepTimeParts) -> Any:
    """What takes longer where ranks share cores. The rest is measured with all ranks at it, and takes what it takes."""
    return part.matmul + part.attention + part.overhead


def _layers_of_stages(table: PlanTable, model: ModelShape) -> tuple[Any, Any]:
    """[n] layers on a stage in the middle, and on the last one, which has the output layer as well.

    Where layers do not divide evenly, the first and the last stage are taken to have fewer, as is usual.
    """
    full = np.ceil(model.layers / (table.pp * table.vpp) - 1e-9) * table.vpp
    missing = full * table.pp - model.layers
    return full, np.maximum(full - missing / 2, 0.0)


def _share_devices(
    path: StepTimeParts, computing: Any, others: Any, stage: Any, table: PlanTable, hardware: Hardware
) -> StepTimeParts:
    """Stretch what is computed to the time that all work takes on fewer devices; waiting shrinks as it stretches.

    ``computing`` and ``others`` are seconds of an average rank, all of its work together. While a pipeline fills, its
    first stages alone cannot keep all devices busy: k stages of g ranks have work after k forward passes, so with room
    for d = devices / g stages the idle part is (d - 1) / 2 of a stage's seconds.
    """
    ranks = table.world_size
    devices = hardware.busy_devices(ranks)
    room = np.maximum(1.0, devices * table.pp / ranks)
    all_work = computing * ranks / devices + others
    total = np.maximum(path.total, all_work + (room - 1.0) / 2.0 * stage / table.vpp)
    bubble = np.minimum(path.bubble, total - all_work)
    on_path = _on_cores(path)
    stretch = 1.0 + (total - bubble - (path.total - path.bubble)) / on_path
    stretched = {name: getattr(path, name) * stretch for name in ("matmul", "attention", "overhead")}
    return replace(path, **stretched, bubble=bubble)


def _hop_seconds(table: PlanTable, model: ModelShape, hardware: Hardware, options: RunOptions) -> Any:
    """Seconds one stage sends in one micro-batch: activations on, gradients back, once per model chunk."""
    split = table.sequence_parallel | options.scatter_gather
    size = tokens(table, model) * model.hidden * model.param_bytes / np.where(split, table.tp, 1.0)
    rate = bandwidth(table.world_size, table.world_size // table.pp, hardware)
    overlapped = options.overlap_p2p & (table.vpp > 1)
    exposed = hardware.reached.pipeline_exposed * np.where(overlapped, _P2P_OVERLAPPED, 1.0)
    return np.where(table.pp > 1, 2 * table.vpp * (size / rate + hardware.latency_s) * exposed, 0.0)


def _rank_params(table: PlanTable, model: ModelShape) -> tuple[Any, Any]:
    """[n] dense and [n] expert parameters on a rank that also holds an embedding: the fullest one."""
    layers, _ = _layers_of_stages(table, model)
    embeddings = np.where((table.pp > 1) | model.tied, 1.0, 2.0) * model.embedding_params
    dense, experts = model.layer_share(table.tp, table.ep)
    return layers * dense + embeddings / table.tp, layers * experts


def _data_seconds(
    table: PlanTable, model: ModelShape, hardware: Hardware, options: RunOptions, layer: LayerTime
) -> Any:
    """Seconds to bring gradients together, and parameters with a distributed optimizer, as far as nothing hides them.

    Overlapped, gradients hide behind the last micro-batch's backward pass and parameters behind the first one's forward
    pass, all but what belongs to the last layer. Tied embeddings on two stages are reduced between these as well.
    """
    replicas = table.dp * table.cp
    dense, experts = _rank_params(table, model)
    reduce, gather = _replica_seconds(dense, replicas, table.tp, table, model, hardware, options)
    if model.experts:
        apart = table.tp * table.ep
        more = _replica_seconds(experts, _expert_replicas(table), apart, table, model, hardware, options)
        reduce, gather = reduce + more[0], gather + more[1]
    layers, _ = _layers_of_stages(table, model)
    forward = layers * layer.forward
    backward = layers * layer.compute - forward
    if options.overlap_grad_reduce:
        reduce = _not_hidden(reduce, backward, layers, hardware)
    if options.overlap_param_gather:
        gather = _not_hidden(gather, forward, layers, hardware)
    tied = (table.pp > 1) & model.tied
    embedding = model.embedding_params / table.tp * options.gradient_bytes
    between = np.maximum(1.0, (table.pp - 1) * table.world_size // table.pp)  # the first stage and the last
    last_to_first = all_reduce_s(embedding, 2.0, between, hardware)
    return reduce + gather + np.where(tied, last_to_first, 0.0)


def _expert_replicas(table: PlanTable) -> Any:
    """[n] ranks that hold the same experts."""
    return np.maximum(1.0, table.dp * table.cp / table.ep)


def _replica_seconds(
    params: Any, replicas: Any, apart: Any, table: PlanTable, model: ModelShape, hardware: Hardware, options: RunOptions
) -> tuple[Any, Any]:
    """Seconds to reduce the gradients of ``params`` over replicas, and to gather the parameters after the step.

    Replicas are ``apart`` ranks from one another.
    """
    reduce = all_reduce_s(params * options.gradient_bytes, replicas, apart, hardware)
    gather = all_reduce_s(params * model.param_bytes, replicas, apart, hardware)
    sharded = table.distributed_optimizer
    return np.where(sharded, reduce / 2, reduce), np.where(sharded, gather / 2, 0.0)


def _not_hidden(seconds: Any, behind: Any, layers: Any, hardware: Hardware) -> Any:
    """What is left of messages that run beside computing: the last bucket, and what is longer than that computing.

    Even hidden messages slow the computing down that they run beside, by the fitted share of theirs.
    """
    last = np.maximum(seconds / np.maximum(8.0, layers), seconds - behind)
    return np.maximum(last, hardware.reached.data_exposed * seconds)


def _optimizer_seconds(table: PlanTable, model: ModelShape, hardware: Hardware, options: RunOptions) -> Any:
    """Seconds of memory traffic of the Adam step, its norm and its clipping; sharded with a distributed optimizer."""
    dense, experts = _rank_params(table, model)
    sharded = table.distributed_optimizer
    cast = 2 if model.param_bytes < 4 else 0  # main parameters back to the ones that are trained with
    own = dense / np.where(sharded, table.dp * table.cp, 1.0) + experts / np.where(
        sharded, _expert_replicas(table), 1.0
    )
    adam = _ADAM_BYTES if options.fused_adam else _TORCH_ADAM_BYTES
    traffic = own * (adam + cast + _CLIP_BYTES) + (dense + experts) * _ZERO_GRADIENT_BYTES
    return traffic / (hardware.memory_bandwidth * hardware.reached.memory)
