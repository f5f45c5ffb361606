"""The same initial weights in every layout.

With ``--use-cpu-initialization`` upstream draws a full weight from the CPU generator and keeps its slice, so that
tensor parallelism does not change the model. But pipeline stages start from different seeds, and an expert-parallel
rank draws its experts as if they were the first ones. Here every layer starts from a seed of its own, made from
``--seed`` and the layer's global number, and every expert from one made of its layer's and its own global number.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch

from megatron.patches.registry import Patch

_LAYER_STRIDE = 1_000_003  # primes, so that the layers and experts of different run seeds do not meet
_EXPERT_STRIDE = 7_919


def _seed_layers() -> None:
    from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
    from megatron.training import global_vars

    build = TransformerLayer.__init__

    @functools.wraps(build)
    def build_from_own_seed(
        self: Any, config: Any, submodules: Any, layer_number: int = 1, *args: Any, **kwargs: Any
    ) -> None:
        args_of_run = global_vars._GLOBAL_ARGS  # none in a training loop of one's own, which seeds as it likes
        if config.use_cpu_initialization and args_of_run is not None:
            groups, vp_stage = kwargs.get("pg_collection"), kwargs.get("vp_stage")
            offset = get_transformer_layer_offset(config, vp_stage, groups.pp.rank() if groups else None)
            numbered_already = kwargs.get("is_mtp_layer") or not kwargs.get("add_layer_offset", True)
            number = layer_number + (0 if numbered_already else offset)
            torch.manual_seed(args_of_run.seed + _LAYER_STRIDE * number)
        build(self, config, submodules, layer_number, *args, **kwargs)

    TransformerLayer.__init__ = build_from_own_seed


def _seed_experts() -> None:
    from megatron.core.transformer.moe import experts

    build, build_expert = experts.SequentialMLP.__init__, experts.MLP

    @functools.wraps(build)
    def build_from_own_seeds(
        self: Any, num_local_experts: int, config: Any, submodules: Any, pg_collection: Any = None, **kwargs: Any
    ) -> None:
        if not config.use_cpu_initialization:
            build(self, num_local_experts, config, submodules, pg_collection, **kwargs)
            return
        layer_seed = torch.initial_seed()
        numbers = itertools.count(pg_collection.ep.rank() * num_local_experts + 1)

        def build_next_expert(*args: Any, **expert_kwargs: Any) -> Any:
            torch.manual_seed(layer_seed + _EXPERT_STRIDE * next(numbers))
            return build_expert(*args, **expert_kwargs)

        experts.MLP = build_next_expert
        try:
            build(self, num_local_experts, config, submodules, pg_collection, **kwargs)
        finally:
            experts.MLP = build_expert
        torch.manual_seed(layer_seed)  # what is built next must not depend on which experts were

    experts.SequentialMLP.__init__ = build_from_own_seeds


def apply() -> None:
    """Seed the CPU generator before each layer and each expert, where weights are initialised on the CPU."""
    _seed_layers()
    _seed_experts()


PATCH = Patch(
    name="layer_seeds",
    upstream=(
        "megatron.core.transformer.transformer_layer.TransformerLayer.__init__",
        "megatron.core.transformer.transformer_layer.get_transformer_layer_offset",
        "megatron.core.transformer.moe.experts.SequentialMLP.__init__",
    ),
    why="--use-cpu-initialization makes weights independent of tensor, but not of pipeline and expert parallelism",
    issue="none known",
    remove_when="upstream seeds layers and experts by their global numbers",
    apply=apply,
)
