"""How much memory a plan needs on its fullest rank, in closed form: to keep clear of plans that cannot fit.

Where the equations come from:

* State (parameters, gradients, optimizer): 2 + 4 + 12 bytes a parameter in bf16, the 12 shared by data-parallel ranks
  with a distributed optimizer (Rajbhandari et al. 2020, ZeRO stage 1, arXiv 1910.02054, section 3.1; Megatron's
  ``theoretical_memory_usage.py``, whose count of weights this one follows, norms and router included).
* Activations of a layer: Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1 and table 2), taken apart so that
  grouped queries, gates, experts, fp32 and fp8 fit in; without dropout there are no masks. In flight: as many as the
  pipeline schedules of Megatron keep, the interleaved one (Narayanan et al. 2021, arXiv 2104.04473) by chunk.
* Routed tokens, what is at hand while one layer's backward pass runs, the fp32 gradients of a step, and the logits in
  two precisions: our count of what Megatron's code holds. fp8 (a cast and a transposed copy of each weight, one byte
  for the input of a linear layer): what Transformer Engine's maintainers say (issues 1261 and 1764). Not measured here.

Every function takes n plans and gives columns of n values, in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import RunOptions
from copus_ext.core.cost.plan_table import PlanTable

_MAIN_BYTES = 4  # of a main parameter, and of one of Adam's two moments, all of them fp32
_LOSS_BYTES = 4  # of a logit in the cross entropy, which overwrites it with its softmax and that with its gradient
_TOKEN_BYTES = 8  # of a token's number
_USUAL = RunOptions()
# Empirical: what PyTorch's caching allocator holds more of activations and of what passes than is in use. Measured
# memory rises with the micro-batch 1.11 times as fast as our count of it, 0.96 to 1.23 in five pairs (BigScience's
# 176B chronicles-prequel.md, nvidia-smi, 72 and 80 layers, 2 to 4 and 4 to 8 sequences).
_FRAGMENTATION = 0.1


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on the fullest rank at its peak, by what they are for; they add up to ``total``. Each [n]."""

    parameters: Any
    gradients: Any  # the buffer in which micro-batches add up
    optimizer: Any  # main parameters and moments
    activations: Any  # kept from forward to backward passes, all micro-batches in flight together
    logits: Any
    workspace: Any  # what passes (one layer's backward pass, fp32 gradients of a step), as far as it exceeds the logits
    fragmentation: Any
    context: Any  # what a process holds of its device beside tensors

    @property
    def state(self) -> Any:
        """What stays from step to step."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> Any:
        """Bytes of all parts."""
        return sum(self.columns())

    def columns(self) -> Iterator[Any]:
        """The parts in the order of the fields."""
        return (getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class _Stage:
    """One pipeline stage of each plan. Each [n]."""

    first: Any
    last: Any
    layers: Any
    in_flight: Any  # micro-batches that all its layers hold activations of; a part of one is a chunk's


@dataclass(frozen=True)
class _Layer:
    """Bytes of one layer for one micro-batch. Each [n]."""

    kept: Any  # from its forward to its backward pass
    passing: Any  # in its backward pass, what it recomputes included


def peak_bytes(table: PlanTable, model: ModelShape, options: RunOptions = _USUAL) -> NDArray[np.float64]:
    """Bytes that each of n plans needs on its fullest rank. [n]"""
    return np.asarray(memory_parts(table, model, options).total, dtype=np.float64)


def memory_parts(table: PlanTable, model: ModelShape, options: RunOptions = _USUAL) -> MemoryParts:
    """The same by component.

    One of three stages is the fullest: the first has most micro-batches in flight and the embedding, the last the
    logits, and the second, which stands for those in the middle, more layers where they do not divide evenly.
    """
    layer = _layer(table, model, options)
    numbers = (np.zeros_like(table.pp), np.minimum(1.0, table.pp - 1), table.pp - 1)
    found = [_stage_parts(_stage(number, table, model), layer, table, model, options) for number in numbers]
    fullest = np.argmax([parts.total for parts in found], axis=0)
    columns = zip(*(parts.columns() for parts in found), strict=True)
    return MemoryParts(*(np.choose(fullest, choices) for choices in columns))


def _stage_parts(stage: _Stage, layer: _Layer, table: PlanTable, model: ModelShape, options: RunOptions) -> MemoryParts:
    dense, experts = _params(stage, table, model)
    replicas = np.where(table.distributed_optimizer, table.dp * table.cp, 1.0)
    expert_replicas = np.where(table.distributed_optimizer, np.maximum(1.0, table.dp * table.cp / table.ep), 1.0)
    owned = dense / replicas + experts / expert_replicas
    mixed = model.param_bytes < _MAIN_BYTES  # fp32 training has no parameters and gradients apart from the main ones
    activations = stage.in_flight * stage.layers * layer.kept + _ends(stage, table, model, options)
    logits = stage.last * _tokens(table, model) * model.vocab / table.tp * (_LOSS_BYTES + mixed * model.param_bytes)
    main_gradients = _MAIN_BYTES * owned if mixed and options.gradient_bytes < _MAIN_BYTES else 0.0
    # The passes are over when the step is made, and the loss before the first backward pass.
    passing = np.maximum(np.maximum(logits, layer.passing), main_gradients - activations)
    return MemoryParts(
        parameters=(dense + experts) * model.param_bytes + options.fp8 * 2 * sum(_linear_params(stage, table, model)),
        gradients=(dense + experts) * options.gradient_bytes,
        optimizer=owned * _MAIN_BYTES * (3 if mixed else 2),
        activations=activations,
        logits=logits,
        workspace=passing - logits,
        fragmentation=_FRAGMENTATION * (activations + passing),
        context=np.full_like(logits, options.context_bytes),
    )


def _tokens(table: PlanTable, model: ModelShape) -> Any:
    """[n] tokens of one micro-batch on one rank."""
    return table.micro_batch * model.seq / table.cp


def _sequence_split(table: PlanTable) -> Any:
    """[n] ranks that share what tensor parallelism alone would hold on each."""
    return np.where(table.sequence_parallel, table.tp, 1.0)


def _stage(number: Any, table: PlanTable, model: ModelShape) -> _Stage:
    """A stage of each plan. Where layers do not divide evenly, the first and the last are taken to have fewer.

    Interleaved, a stage runs 2 (p - i - 1) + (v - 1) p chunks forward before it runs one backward
    (``get_pp_rank_microbatches``): on the first, 1 + (p - 1) / (p v) times what p micro-batches take.
    """
    first, last = number == 0, number == table.pp - 1
    full = np.ceil(model.layers / (table.pp * table.vpp) - 1e-9) * table.vpp
    missing = full * table.pp - model.layers
    layers = np.where(first & last, model.layers, np.maximum(full - (first | last) * missing / 2, 0.0))
    behind = table.pp - 1 - number
    chunks = np.where(table.vpp > 1, 2 * behind + (table.vpp - 1) * table.pp + 1, behind + 1)
    return _Stage(first, last, layers, np.minimum(table.num_microbatches, chunks / table.vpp))


def _params(stage: _Stage, table: PlanTable, model: ModelShape) -> tuple[Any, Any]:
    """[n] dense and [n] expert parameters on a rank of a stage. Biases of linear layers are left out.

    Each rank has norms and router whole. A gate is taken to come with norms that have no bias, as in Llama.
    """
    norm = model.hidden * (1 if model.gated else 2)
    replicated = stage.layers * (2 * norm + model.hidden * model.experts) + stage.last * norm
    dense, experts = _linear_params(stage, table, model)
    has_output = stage.last & ((table.pp > 1) | (not model.tied))
    embeddings = (stage.first * 1.0 + has_output) * model.embedding_params / table.tp
    return dense + replicated + embeddings, experts


def _linear_params(stage: _Stage, table: PlanTable, model: ModelShape) -> tuple[Any, Any]:
    """[n] weights of linear layers on a rank: dense ones and experts'."""
    dense, experts = model.layer_share(table.tp, table.ep)
    return stage.layers * dense, stage.layers * experts


def _ends(stage: _Stage, table: PlanTable, model: ModelShape, options: RunOptions) -> Any:
    """[n] bytes kept by the embedding (tokens, and the mask of its dropout), and by the last norm and output layer."""
    shared = model.hidden / _sequence_split(table)
    embedding = stage.first * stage.in_flight * (_TOKEN_BYTES + options.dropout * shared)
    return _tokens(table, model) * (embedding + stage.last * 2 * model.param_bytes * shared)


def _layer(table: PlanTable, model: ModelShape, options: RunOptions) -> _Layer:
    """One layer with its recomputing: selective is of the scores, full of all but the layer's input."""
    tokens, split = _tokens(table, model), _sequence_split(table)
    outside, inside = _layer_values(table, model, options)
    scores = _score_bytes(table, model, options)
    selective, full = table.recomputes("selective"), table.recomputes("full")
    kept = outside / split + inside + np.where(selective, 0.0, scores)
    again = np.where(selective, scores, 0.0)
    input_only = model.hidden * model.param_bytes / split
    return _Layer(
        kept=tokens * np.where(full, input_only, kept),
        passing=tokens * (_passing_gradients(table, model) + np.where(full, kept, again)),
    )


def _layer_values(table: PlanTable, model: ModelShape, options: RunOptions) -> tuple[Any, Any]:
    """[n] bytes a token that one layer keeps: what only sequence parallelism splits, and a rank's part of the rest.

    Outside: inputs of two norms and of the linear layers behind them, and two masks. Inside: queries, keys, values,
    what attention gives, and input and output of the activation function. In two bytes, with masks, without a gate,
    grouped queries or experts, and with a four times wider MLP, that is 10 h and 24 h.

    Models with a gate are taken to have rotary embeddings, as Llama, which give new queries and keys. The ones they
    come from stay, since they share their memory with the values (seen in a job: tests/ranks/test_memory_report.py).
    """
    value = model.param_bytes
    key_share = np.maximum(model.kv_heads, table.tp) / model.heads  # more ranks than key-value heads hold copies
    linear_input = 1 if options.fp8 else value
    outside = model.hidden * (2 * value + 2 * linear_input + 2 * options.dropout)
    # Attention keeps what it gives for its own backward pass, so the fp8 input of the projection is one more.
    rotated = 1 + key_share if model.gated else 0
    attention = model.hidden * (value * (2 + 2 * key_share + rotated) + options.fp8)
    inside = (attention + _mlp_width(model) * (_gates(model) * value + linear_input)) / table.tp
    if model.experts:  # their inputs are gathered copies, one for each expert that a token goes to
        inside = inside + model.experts_per_token * model.hidden * linear_input
    return outside, inside


def _mlp_width(model: ModelShape) -> int:
    """Of all that a token meets; that experts are equally busy is taken for granted."""
    return model.moe_ffn * model.experts_per_token if model.experts else model.ffn


def _gates(model: ModelShape) -> int:
    """Inputs of the activation function for each output of it."""
    return 2 if model.gated else 1


def _score_bytes(table: PlanTable, model: ModelShape, options: RunOptions) -> Any:
    """[n] bytes a token of attention scores: softmax, and its dropout with a mask. None with fused attention."""
    if model.flash_attention:
        return np.zeros_like(table.tp)
    per_score = model.param_bytes + (model.param_bytes + 1 if options.dropout else 0)
    return model.heads * model.seq * per_score / table.tp


def _passing_gradients(table: PlanTable, model: ModelShape) -> Any:
    """[n] bytes a token at the widest point of a layer's backward pass.

    The gradients around the activation function, or around the softmax where scores are held; and whole, whatever is
    split, the input of a linear layer and the gradient of its output.
    """
    mlp = _mlp_width(model) * (1 + _gates(model))
    attention = model.hidden * (1 + 2 * model.kv_heads / model.heads)
    scores = 0 if model.flash_attention else 2 * model.heads * model.seq
    return model.param_bytes * (np.maximum(mlp, np.maximum(attention, scores)) / table.tp + 2 * model.hidden)
