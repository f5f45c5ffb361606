"""Let torch's own norms run under sequence parallelism, so that it works without Transformer Engine and apex.

A norm works on each token by itself. All that sequence parallelism asks of it is a mark on its parameters: their
gradients are sums over the tokens of one rank, and have to be added up over the tensor parallel ranks.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from megatron.patches.registry import Patch


def _allowing_sequence_parallel(make_norm: Any) -> Any:
    @functools.wraps(make_norm)
    def wrapper(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return make_norm(cls, config, *args, **kwargs)
        without = copy.copy(config)
        without.sequence_parallel = False
        norm = make_norm(cls, without, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return wrapper


def apply() -> None:
    """Wrap the class's constructor, which every importer of the class shares."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    WrappedTorchNorm.__new__ = _allowing_sequence_parallel(WrappedTorchNorm.__new__)


PATCH = Patch(
    name="sequence_parallel_norm",
    upstream=("megatron.core.transformer.torch_norm.WrappedTorchNorm",),
    why="torch's norms are refused under --sequence-parallel, which MoE with tensor parallelism needs",
    issue="none known",
    remove_when="WrappedTorchNorm marks its parameters as FusedLayerNorm does",
    apply=apply,
)
