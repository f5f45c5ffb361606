"""What one micro-batch costs one transformer layer, and the output layer: products, attention, traffic, messages.

Every function takes n plans and gives n seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from copus_ext.core.cost.hardware import Hardware
from copus_ext.core.cost.links import all_reduce_s, bandwidth
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import RunOptions
from copus_ext.core.cost.plan_table import PlanTable

# Bytes of memory traffic of element-wise work in a forward pass, a value of two bytes at a time.
_NORM_BYTES = 20  # per token and hidden unit: norms and residuals, which only sequence parallel splits
_DROPOUT_BYTES = 4
_LOSS_BYTES = 20  # per logit, both passes: softmax and cross entropy in fp32
_SCORE_BYTES = 24  # per attention score, both passes, where the scores are held in memory
_BACKWARD_TRAFFIC = 1.6  # of the forward pass's, for element-wise work
_FLASH_BACKWARD = 2.5  # of the forward pass: FlashAttention computes the scores once more (Dao 2023, arXiv 2307.08691)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one micro-batch by what they are spent on, each [n]."""

    matmul: Any
    attention: Any
    traffic: Any
    tensor: Any
    context: Any
    expert: Any
    overhead: Any
    forward: Any  # of all that is computed: the part of it that the forward pass takes

    @property
    def compute(self) -> Any:
        """Without messages."""
        return self.matmul + self.attention + self.traffic + self.overhead

    @property
    def total(self) -> Any:
        """With messages."""
        return self.compute + self.tensor + self.context + self.expert


def tokens(table: PlanTable, model: ModelShape) -> Any:
    """[n] tokens of one micro-batch on one rank."""
    return table.micro_batch * model.seq / table.cp


def layer_time(table: PlanTable, model: ModelShape, hardware: Hardware, options: RunOptions) -> LayerTime:
    """One layer's forward and backward pass.

    Full recompute runs the whole forward pass again, selective recompute the attention.
    """
    product_forward, product_backward = _products(table, model, hardware, options)
    score_forward, score_backward = _attention(table, model, hardware)
    traffic_forward = _traffic(table, model, hardware, options)
    fully = table.recomputes("full")
    forward = product_forward + score_forward + traffic_forward
    return LayerTime(
        matmul=product_forward * (1 + fully) + product_backward,
        attention=score_forward * (1 + (fully | table.recomputes("selective"))) + score_backward,
        traffic=traffic_forward * (1 + fully + _BACKWARD_TRAFFIC)
        + _accumulation(sum(model.layer_share(table.tp, table.ep)), model, hardware, options),
        tensor=_tensor(table, model, hardware, options),
        context=_context(table, model, hardware, score_forward + score_backward),
        expert=_dispatch(table, model, hardware),
        overhead=hardware.layer_overhead_s * np.where(fully, 4 / 3, 1.0),
        forward=forward,
    )


def output_layer_time(table: PlanTable, model: ModelShape, hardware: Hardware, options: RunOptions) -> LayerTime:
    """The output layer and the loss, on the last stage: logits = hidden states x embedding."""
    rows, width, inner = tokens(table, model), model.vocab / table.tp, model.hidden
    forward = _product_s(rows, width, inner, model.param_bytes, hardware, options)
    backward = _product_s(rows, inner, width, model.param_bytes, hardware, options)
    backward = backward + _product_s(inner, width, rows, model.param_bytes, hardware, options)
    loss = rows * width * _LOSS_BYTES / (hardware.memory_bandwidth * hardware.reached.memory)
    none = np.zeros_like(rows)
    exposed = _exposed(hardware, options)
    return LayerTime(
        matmul=forward + backward,
        attention=none,
        traffic=loss + _accumulation(model.embedding_params / table.tp, model, hardware, options),
        tensor=2 * exposed * _one_all_reduce(table, model, hardware),
        context=none,
        expert=none,
        overhead=none,
        forward=forward,
    )


def _product_s(rows: Any, width: Any, inner: Any, element: int, hardware: Hardware, options: RunOptions) -> Any:
    """Seconds of a [rows, inner] x [inner, width] product: the longer of computing and of reading and writing.

    The share of the peak that a product reaches falls where a side is small.
    """
    reached = hardware.reached
    peak = hardware.peak(element) * reached.matmul * (2 * reached.fp8 if options.fp8 else 1.0)
    smaller = np.maximum(1.0, np.minimum(width, inner))  # a width of 0 is a layer that is not there
    share = rows / (rows + reached.half_tokens) * smaller / (smaller + reached.half_width)
    traffic = element * (rows * inner + inner * width + rows * width)
    memory_s = traffic / (hardware.memory_bandwidth * reached.memory)
    return np.maximum(2 * rows * width * inner / (peak * share), memory_s)


def _products(table: PlanTable, model: ModelShape, hardware: Hardware, options: RunOptions) -> tuple[Any, Any]:
    """Forward and backward seconds of a layer's matrix products on one rank."""
    rows, tp, hidden = tokens(table, model), table.tp, model.hidden
    gate = 2 if model.gated else 1
    weights: list[tuple[Any, Any, Any, Any]] = [
        (rows, hidden * (1 / tp + 2 * _key_share(table, model)), hidden, 1.0),
        (rows, hidden, hidden / tp, 1.0),
    ]
    ffn = (model.moe_ffn if model.experts else model.ffn) / tp
    experts = model.experts / table.ep if model.experts else 1.0
    routed = rows * model.experts_per_token / experts if model.experts else rows
    weights += [(routed, gate * ffn, hidden, experts), (routed, hidden, ffn, experts)]
    forward = backward = np.zeros_like(rows)
    for m, n, k, count in weights:
        forward = forward + count * _product_s(m, n, k, model.param_bytes, hardware, options)
        backward = backward + count * _product_s(m, k, n, model.param_bytes, hardware, options)
        backward = backward + count * _product_s(k, n, m, model.param_bytes, hardware, options)
    return forward, backward


def _key_share(table: PlanTable, model: ModelShape) -> Any:
    """[n] keys on a rank over hidden units: ranks that are more than the key-value heads hold copies of them."""
    return np.maximum(model.kv_heads, table.tp) / model.heads / table.tp


def _attention(table: PlanTable, model: ModelShape, hardware: Hardware) -> tuple[Any, Any]:
    """Forward and backward seconds of attention: half of it is masked, which only fused kernels make use of."""
    flops = 4 * tokens(table, model) * model.seq * model.hidden / table.tp
    if model.flash_attention:
        forward = flops / 2 / (hardware.peak(model.param_bytes) * hardware.reached.attention)
        return forward, _FLASH_BACKWARD * forward
    forward = flops / (hardware.peak(model.param_bytes) * hardware.reached.scores)
    scores = tokens(table, model) * model.seq * model.heads / table.tp
    held = scores * _SCORE_BYTES * model.param_bytes / 2 / (hardware.memory_bandwidth * hardware.reached.memory)
    return forward + held * 11 / 24, 2 * forward + held * 13 / 24


def _traffic(table: PlanTable, model: ModelShape, hardware: Hardware, options: RunOptions) -> Any:
    """Forward seconds of norms, residuals, dropout and activation functions, which memory is the limit of."""
    per_unit = _NORM_BYTES + (_DROPOUT_BYTES if options.dropout else 0)
    outside = model.hidden * per_unit / np.where(table.sequence_parallel, table.tp, 1.0)
    width = model.moe_ffn * model.experts_per_token if model.experts else model.ffn
    inside = 2 * (4 * model.hidden + (3 if model.gated else 2) * width) / table.tp
    size = tokens(table, model) * (outside + inside) * model.param_bytes / 2
    return size / (hardware.memory_bandwidth * hardware.reached.memory)


def _accumulation(weights: Any, model: ModelShape, hardware: Hardware, options: RunOptions) -> Any:
    """Seconds to add a micro-batch's gradients of so many weights to those before, where the products do not do it."""
    if options.fused_accumulation:
        return np.zeros_like(weights)
    size = weights * (2 * options.gradient_bytes + model.param_bytes)  # the sum read and written, the new ones read
    return size / (hardware.memory_bandwidth * hardware.reached.memory)


def _exposed(hardware: Hardware, options: RunOptions) -> float:
    return hardware.reached.tensor_exposed if options.tp_comm_overlap else 1.0


def _one_all_reduce(table: PlanTable, model: ModelShape, hardware: Hardware) -> Any:
    size = tokens(table, model) * model.hidden * model.param_bytes
    return all_reduce_s(size, table.tp, 1.0, hardware)


def _tensor(table: PlanTable, model: ModelShape, hardware: Hardware, options: RunOptions) -> Any:
    """Two all-reduces in each pass (Shoeybi et al. 2019, arXiv 1909.08053, section 3), two more with full recompute.

    Sequence parallelism splits each into a reduce-scatter and an all-gather of the same volume.
    """
    passes = np.where(table.recomputes("full"), 3.0, 2.0)
    return 2 * passes * _exposed(hardware, options) * _one_all_reduce(table, model, hardware)


def _context(table: PlanTable, model: ModelShape, hardware: Hardware, attention_s: Any) -> Any:
    """What a ring of keys and values (and their gradients) takes longer than the attention that it runs beside.

    At least the share of it that overlapped messages of tensor parallelism cost: those beside computing slow it down.
    """
    size = 2 * tokens(table, model) * model.hidden * _key_share(table, model) * model.param_bytes
    ring_s = 3 * (table.cp - 1) * size / bandwidth(table.cp * table.tp, table.tp, hardware)
    exposed = np.maximum(ring_s - attention_s, hardware.reached.tensor_exposed * ring_s)
    return exposed + 3 * (table.cp - 1) * hardware.latency_s


def _dispatch(table: PlanTable, model: ModelShape, hardware: Hardware) -> Any:
    """Sending tokens to their experts and back again, in both passes."""
    if not model.experts:
        return np.zeros_like(table.tp)
    split = np.where(table.sequence_parallel, table.tp, 1.0)
    size = tokens(table, model) / split * model.experts_per_token * model.hidden * model.param_bytes
    rate = bandwidth(table.ep * table.tp, table.tp, hardware)
    return np.where(table.ep > 1, 4 * (size * (table.ep - 1) / table.ep / rate + hardware.latency_s), 0.0)
