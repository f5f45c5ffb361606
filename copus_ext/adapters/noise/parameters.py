"""How each parameter's gradient is spread over ranks, and so how it has to be counted once."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.utils import unwrap_model


class Kind(Enum):
    """What has to be done with a gradient before it is squared."""

    OWN = "own"  # whole, or a shard of its own: squared here
    EXPERT = "expert"  # the same, for an expert: it has groups of its own
    SUM_OVER_TP = "sum over tp"  # each tensor-parallel rank holds a summand (norms under sequence parallelism)
    MEAN_OVER_TP = "mean over tp"
    TIED = "tied"  # the first and the last pipeline stage each hold a summand
    DUPLICATE = "duplicate"  # counted on another tensor-parallel rank


WHOLE = (Kind.EXPERT, Kind.OWN)
IN_PARTS = (Kind.SUM_OVER_TP, Kind.MEAN_OVER_TP, Kind.TIED)


class Counted(NamedTuple):
    """A trainable parameter (DDP gives it ``main_grad``, which gradients accumulate in) and how its gradient counts."""

    param: Any
    kind: Kind


def counted_parameters(model: Sequence[Any], groups: ProcessGroupCollection) -> list[Counted]:
    """The trainable parameters of DDP-wrapped chunks, in the order in which they were registered."""
    return [
        Counted(param, _kind_of(name, param, chunk.config, groups))
        for chunk in model
        for name, param in chunk.module.named_parameters()
        if param.requires_grad
    ]


def holds_tied_embeddings(model: Sequence[Any], groups: ProcessGroupCollection) -> bool:
    """Whether gradients of this job's embeddings lie in parts on two stages; the same on every rank."""
    tied = getattr(unwrap_model(model[0]), "share_embeddings_and_output_weights", False)
    return bool(tied) and groups.pp.size() > 1


def _kind_of(name: str, param: torch.nn.Parameter, config: Any, groups: ProcessGroupCollection) -> Kind:
    """What ``finalize_model_grads`` does with this gradient decides."""
    expert = not getattr(param, "allreduce", True)
    if getattr(param, "shared_embedding", False) and groups.embd is not None and groups.embd.size() > 1:
        return Kind.TIED
    if groups.tp.size() > 1:
        if getattr(param, "average_gradients_across_tp_domain", False):
            return Kind.MEAN_OVER_TP
        norm_of_qk = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        if norm_of_qk or (config.sequence_parallel and getattr(param, "sequence_parallel", False)):
            return Kind.SUM_OVER_TP
    if not param_is_not_tensor_parallel_duplicate(param, groups.tp, groups.expt_tp if expert else None):
        return Kind.DUPLICATE
    return Kind.EXPERT if expert else Kind.OWN
