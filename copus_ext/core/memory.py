"""How much memory a plan needs on its fullest rank, in closed form: enough to keep clear of plans that cannot fit.

First version: training state exactly, activations after Korthikanti et al. 2022 (arXiv 2205.05198, eq. 2 and 4), and
logits.
"""

from __future__ import annotations

from copus_ext.core.model_shape import ModelShape
from copus_ext.core.plan import Plan

_MAIN_STATE_BYTES = (
    12  # per parameter: fp32 main parameter and Adam's two moments; sharded by the distributed optimizer
)
_GRADIENT_BYTES = 4  # the fp32 gradient buffer
_LOGIT_BYTES = 8  # logits and their gradient in fp32


def peak_bytes(plan: Plan, model: ModelShape) -> float:
    """Bytes on the rank that needs most: the first pipeline stage, or the last where the logits outweigh."""
    activations = _layer_activation_bytes(plan, model) * model.layers / plan.layout.pp
    in_flight = min(plan.layout.pp, plan.num_microbatches)
    tokens = plan.micro_batch * model.seq / plan.layout.cp
    logits = tokens * model.vocab / plan.layout.tp * _LOGIT_BYTES
    return _state_bytes(plan, model) + max(in_flight * activations, activations + logits)


def _state_bytes(plan: Plan, model: ModelShape) -> float:
    layout = plan.layout
    dense = model.layers / layout.pp * (model.layer_params - _expert_params(model)) + model.embedding_params
    params = (dense + model.layers / layout.pp * _expert_params(model) / layout.ep) / layout.tp
    shards = layout.dp * layout.cp if layout.distributed_optimizer else 1
    # fp32 training has no separate main parameters
    main = _MAIN_STATE_BYTES if model.param_bytes < 4 else _MAIN_STATE_BYTES - 4
    return params * (model.param_bytes + _GRADIENT_BYTES + main / shards)


def _expert_params(model: ModelShape) -> int:
    return model.layer_params - model.attention_params if model.experts else 0


def _layer_activation_bytes(plan: Plan, model: ModelShape) -> float:
    """One layer's for one micro-batch. The paper counts two bytes a value; its 34 sbh fall to 2 sbh when recomputed."""
    layout = plan.layout
    tokens = plan.micro_batch * model.seq / layout.cp
    unit = tokens * model.hidden * model.param_bytes / 2
    if layout.recompute == "full":
        return 2 * unit / (layout.tp if layout.sequence_parallel else 1)
    holds_scores = layout.recompute == "none" and not model.flash_attention
    scores = 5 * model.heads * model.seq / model.hidden if holds_scores else 0.0
    outside = 10 / (
        layout.tp if layout.sequence_parallel else 1
    )  # norms and dropout, which only sequence parallel splits
    return unit * (outside + (24 + scores) / layout.tp)
