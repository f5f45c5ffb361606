"""How long a step takes, in closed form: the prior that measurements correct.

First version: constant GEMM speed, no overlap of communication with computation, dense collectives only (the ring
exchange of context parallelism and the dispatch of a mixture of experts are left to the correction).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from copus_ext.core.hardware import Hardware
from copus_ext.core.model_shape import ModelShape
from copus_ext.core.plan import Layout, Plan

# Bytes of memory traffic or of messages per parameter, all in fp32 (which bf16 training uses there as well).
_GRADIENT_BYTES = 4
_ADAM_BYTES = 28  # parameter, gradient and two moments read, all but the gradient written
_CLIP_BYTES = 12  # gradient read for its norm, read and written to scale it
_ZERO_GRADIENT_BYTES = 4


@dataclass(frozen=True)
class StepTimeParts:
    """Seconds of a step by what they are spent on, as the slowest rank sees them; they add up to ``total``."""

    compute: float  # forward and backward passes
    tensor: float  # all-reduces of tensor parallelism
    bubble: float  # waiting for other pipeline stages
    pipeline: float  # sending activations and their gradients between stages
    data: float  # reducing gradients, gathering parameters
    optimizer: float
    fixed: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return math.fsum(getattr(self, field.name) for field in fields(self))


def step_time_parts(plan: Plan, model: ModelShape, hardware: Hardware) -> StepTimeParts:
    """Predicted seconds of one step of ``plan``, by component.

    A pipeline of p stages of v chunks runs m micro-batches in the time of m on the slowest stage plus (p - 1) / v of
    the others (Narayanan et al. 2021, arXiv 2104.04473, section 2.2). That holds for ranks with a device each. Where
    ranks share cores, one that waits leaves its core to another, so the step takes the longer of that critical path
    and all work divided by the speed of all cores.
    """
    layout, micro_steps = plan.layout, plan.num_microbatches
    stage, head = _stage_seconds(plan, model, hardware)
    tensor, head_tensor = _tensor_seconds(plan, model, hardware)
    hop = _hop_seconds(plan, model, hardware)
    data = _data_seconds(layout, model, hardware)
    optimizer = _optimizer_seconds(layout, model, hardware)
    fill = (layout.pp - 1) / layout.vpp
    path = StepTimeParts(
        compute=micro_steps * (stage + head),
        tensor=micro_steps * (tensor + head_tensor),
        bubble=fill * (stage + tensor),
        pipeline=(micro_steps + fill) * hop,
        data=data,
        optimizer=optimizer,
        fixed=hardware.step_overhead_s,
    )
    mean_micro_step = stage + tensor + (head + head_tensor) / layout.pp + hop
    work = micro_steps * mean_micro_step + data + optimizer + hardware.step_overhead_s  # of an average rank
    return _share_devices(path, work, stage + tensor, layout, hardware)


def _share_devices(path: StepTimeParts, work: float, stage: float, layout: Layout, hardware: Hardware) -> StepTimeParts:
    """Stretch the critical path to the time that all work takes on fewer devices; waiting shrinks as it stretches.

    While a pipeline fills, its first stages alone cannot keep all devices busy: k stages of g ranks have work after k
    forward passes, so with room for d = devices / g stages the idle part is (d - 1) / 2 of a stage's seconds.
    """
    devices = hardware.busy_devices(layout.world_size)
    room = max(1.0, devices * layout.pp / layout.world_size)
    all_work = work * layout.world_size / devices
    busy = path.total - path.bubble
    total = max(path.total, all_work + (room - 1.0) / 2.0 * stage / layout.vpp)
    bubble = min(path.bubble, total - all_work)
    stretched = {field.name: getattr(path, field.name) * (total - bubble) / busy for field in fields(path)}
    return StepTimeParts(**{**stretched, "bubble": bubble})


def _tokens(plan: Plan, model: ModelShape) -> float:
    """Tokens of one micro-batch on one rank."""
    return plan.micro_batch * model.seq / plan.layout.cp


def _stage_seconds(plan: Plan, model: ModelShape, hardware: Hardware) -> tuple[float, float]:
    """Seconds a stage computes on one micro-batch, forward and backward, and what the output layer adds to the last.

    Full recompute runs every layer's forward pass again, selective recompute the attention scores only.
    """
    layout = plan.layout
    tokens = _tokens(plan, model) / layout.tp
    matmul, scores = 6.0 * tokens * model.active_layer_params, 12.0 * tokens * model.seq * model.hidden
    again = {"none": 0.0, "selective": scores / 3, "full": (matmul + scores) / 3}[layout.recompute]
    layer = (matmul + scores + again) / hardware.flops + hardware.layer_overhead_s
    return model.layers / layout.pp * layer, 6.0 * tokens * model.embedding_params / hardware.flops


def _tensor_seconds(plan: Plan, model: ModelShape, hardware: Hardware) -> tuple[float, float]:
    """Seconds of tensor-parallel communication of one micro-batch: in a stage, and more in the last one.

    Two all-reduces per layer in each pass (Shoeybi et al. 2019, arXiv 1909.08053, section 3), two more forward ones
    with full recompute. Sequence parallelism splits each into a reduce-scatter and an all-gather of the same volume.
    """
    layout = plan.layout
    size = _tokens(plan, model) * model.hidden * model.param_bytes
    one = _all_reduce_seconds(size, layout.tp, 1, hardware)
    per_layer = 6 if layout.recompute == "full" else 4
    return model.layers / layout.pp * per_layer * one, 2 * one


def _hop_seconds(plan: Plan, model: ModelShape, hardware: Hardware) -> float:
    """Seconds one stage sends in one micro-batch: activations on, gradients back, once per model chunk."""
    layout = plan.layout
    if layout.pp == 1:
        return 0.0
    size = _tokens(plan, model) * model.hidden * model.param_bytes / (layout.tp if layout.sequence_parallel else 1)
    bandwidth = _bandwidth(layout.world_size, layout.world_size // layout.pp, hardware)
    return 2 * layout.vpp * (size / bandwidth + hardware.latency_s)


def _rank_params(layout: Layout, model: ModelShape) -> float:
    """Parameters on a rank that also holds an embedding: the fullest one."""
    experts = model.experts // layout.ep if model.experts else 1
    layers = model.layers / layout.pp * (model.attention_params + model.mlp_params * experts)
    embeddings = 1 if layout.pp > 1 or model.tied else 2
    return (layers + embeddings * model.embedding_params) / layout.tp


def _data_seconds(layout: Layout, model: ModelShape, hardware: Hardware) -> float:
    """Seconds to bring gradients together, and parameters with a distributed optimizer.

    Tied embeddings on two pipeline stages are reduced between these as well.
    """
    replicas, stride = layout.dp * layout.cp, layout.tp
    params = _rank_params(layout, model)
    reduce = _all_reduce_seconds(params * _GRADIENT_BYTES, replicas, stride, hardware)
    if layout.distributed_optimizer:
        gather = _all_reduce_seconds(params * model.param_bytes, replicas, stride, hardware)
        reduce = (reduce + gather) / 2
    if layout.pp == 1 or not model.tied:
        return reduce
    embedding = model.embedding_params / layout.tp * _GRADIENT_BYTES
    return reduce + _all_reduce_seconds(embedding, 2, layout.world_size // layout.pp, hardware)


def _optimizer_seconds(layout: Layout, model: ModelShape, hardware: Hardware) -> float:
    """Seconds of memory traffic of the Adam step, its norm and its clipping; sharded with a distributed optimizer."""
    shards = layout.dp * layout.cp if layout.distributed_optimizer else 1
    per_param = (_ADAM_BYTES + _CLIP_BYTES) / shards + _ZERO_GRADIENT_BYTES
    return _rank_params(layout, model) * per_param / hardware.memory_bandwidth


def _all_reduce_seconds(size: float, ranks: int, stride: int, hardware: Hardware) -> float:
    """Seconds to all-reduce ``size`` bytes over ranks that are ``stride`` apart: 2 (n - 1) / n of them cross a link."""
    if ranks == 1:
        return 0.0
    traffic = 2 * (ranks - 1) / ranks * size
    return traffic / _bandwidth(ranks * stride, stride, hardware) + 2 * math.log2(ranks) * hardware.latency_s


def _bandwidth(span: int, stride: int, hardware: Hardware) -> float:
    """Bytes/s of a ring over ranks ``stride`` apart, ``span`` in all: those of a node share its way out."""
    if span <= hardware.devices_per_node:
        return hardware.intra_node_bandwidth
    members = max(1, hardware.devices_per_node // stride)
    return min(hardware.intra_node_bandwidth, members * hardware.inter_node_bandwidth)
