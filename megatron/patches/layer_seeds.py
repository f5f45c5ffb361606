"""The same initial weights in every layout.

With ``--use-cpu-initialization`` upstream draws a full weight from the CPU generator and keeps its slice, so that tensor
parallelism does not change the model. Pipeline stages, however, start from different seeds. Here every layer starts from a
seed of its own, made from ``--seed`` and the layer's global number, so that pipelining does not change the model either.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron.patches.registry import Patch

_STRIDE = 1_000_003  # a prime, so that the layers of different run seeds do not meet


def apply() -> None:
    """Seed the CPU generator before each transformer layer is built, where weights are initialised on the CPU."""
    from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
    from megatron.training import get_args

    build = TransformerLayer.__init__

    @functools.wraps(build)
    def build_from_own_seed(
        self: Any, config: Any, submodules: Any, layer_number: int = 1, *args: Any, **kwargs: Any
    ) -> None:
        if config.use_cpu_initialization:
            groups, vp_stage = kwargs.get("pg_collection"), kwargs.get("vp_stage")
            offset = get_transformer_layer_offset(config, vp_stage, groups.pp.rank() if groups else None)
            own_place = kwargs.get("is_mtp_layer") or not kwargs.get("add_layer_offset", True)
            number = layer_number + (0 if own_place else offset)
            torch.manual_seed(get_args().seed + _STRIDE * number)
        build(self, config, submodules, layer_number, *args, **kwargs)

    TransformerLayer.__init__ = build_from_own_seed


PATCH = Patch(
    name="layer_seeds",
    upstream=(
        "megatron.core.transformer.transformer_layer.TransformerLayer.__init__",
        "megatron.core.transformer.transformer_layer.get_transformer_layer_offset",
    ),
    why="--use-cpu-initialization makes weights independent of tensor parallelism but not of pipeline parallelism",
    issue="none known",
    remove_when="upstream seeds each layer by its global number",
    apply=apply,
)
