"""A pipeline stage of the model as upstream builds it, with the shapes of its parameters and no memory for them.

And the optimizer that upstream builds for it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import optimizer as upstream
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.models import dist_utils
from megatron.training.training import get_megatron_optimizer_config
from torch.overrides import TorchFunctionMode

from copus_ext.adapters.replaced import replaced

META = torch.device("meta")
_FACTORIES = frozenset("tensor as_tensor zeros ones empty full arange linspace rand randn randint eye".split())


class Chunk:
    """In DDP's place: what it would wrap, and where the distributed optimizer's buffers would have the parameters.

    ``layouts`` are upstream's, by buffer; none where the optimizer is not distributed.
    """

    def __init__(self, *, module: Any, ddp_config: Any, full_param_layout: Any = None, **_: Any) -> None:
        self.module = module
        self.config, self.ddp_config = module.config, ddp_config
        self.layouts: dict[Any, Any] = full_param_layout.layouts if full_param_layout else {}

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """By the names that they have in DDP."""
        yield from self.module.named_parameters(prefix="module")


class WholeLayers(LayerWiseDistributedOptimizer):
    """In the layer-wise optimizer's place: what it makes of all parameters, and the lists of what it gives to whom.

    ``dp_cp_params_list``, ``expt_dp_params_list``: by place in the group; ``None`` where the group has one rank.
    """

    def __init__(  # not upstream's, which goes on with the parameters of one rank
        self, optimizers: Sequence[Any], config: Any, pg_collection: Any, init_state_fn_list: Sequence[Any], **_: Any
    ) -> None:
        self.dp_cp, self.expt_dp = pg_collection.dp_cp, pg_collection.expt_dp
        everything = [(group, group["params"]) for one in optimizers for group in one.param_groups]
        self.shard_params(optimizers)
        for group, parameters in everything:
            group["params"] = parameters
        self.chained_optimizers = [
            FP32Optimizer(one, config, initialise)
            for one, initialise in zip(optimizers, init_state_fn_list, strict=True)
        ]


def build_on_meta(args: argparse.Namespace, groups: ProcessGroupCollection) -> list[Chunk]:
    """The chunks of a pipeline stage by upstream's builder, in their dtypes, on the meta device.

    Args:
        args: upstream's validated arguments.
        groups: whose place is taken; see ``in_place_of``.
    """
    config = gpt_config_from_args(args)
    container = pretrain_cfg_container_from_args(args, config)
    transformer = config.transformer
    transformer.perform_initialization = False
    builder = config.get_builder_cls()(config)
    _say_where(transformer, on_meta=True)
    with _OnMeta(), replaced(torch.cuda, current_device=lambda: META):
        modules = dist_utils.build_virtual_pipeline_stages(
            builder.build_model, groups, transformer.virtual_pipeline_model_parallel_size
        )
    _say_where(transformer, on_meta=False)  # or upstream would now give it memory
    with replaced(dist_utils, DistributedDataParallel=Chunk), contextlib.redirect_stdout(io.StringIO()):
        chunks: list[Chunk] = dist_utils.prepare_existing_model_chunks_for_distributed_training(
            modules,
            transformer,
            groups,
            ddp_config=container.ddp,
            overlap_param_gather_with_optimizer_step=container.optimizer.overlap_param_gather_with_optimizer_step,
        )
    return chunks


def optimizer_on_meta(chunks: list[Chunk], args: argparse.Namespace, groups: ProcessGroupCollection) -> Any:
    """The optimizer by upstream's builder, for the parameters as they are: no fp32 copies, and nothing sharded.

    A layer-wise one is a :class:`WholeLayers`.

    Args:
        chunks: from ``build_on_meta``.
        args: upstream's validated arguments.
        groups: whose place is taken.
    """
    in_fp32 = dict.fromkeys(("bf16", "fp16", "use_distributed_optimizer"), False)
    config, overrides = get_megatron_optimizer_config(argparse.Namespace(**{**vars(args), **in_fp32}))
    # What other ranks would say only adds groups without parameters.
    with (
        replaced(torch.distributed, all_gather_object=_hear_oneself),
        replaced(upstream, LayerWiseDistributedOptimizer=WholeLayers),
    ):
        return upstream.get_megatron_optimizer(
            config, chunks, config_overrides=overrides, use_gloo_process_groups=False, pg_collection=groups
        )


def _hear_oneself(heard: list[Any], said: Any, group: Any = None) -> None:
    heard[:] = [said] * len(heard)


def _say_where(transformer: Any, *, on_meta: bool) -> None:
    transformer.init_model_with_meta_device = on_meta
    transformer.use_cpu_initialization = not on_meta


class _OnMeta(TorchFunctionMode):
    """What ``with torch.device("meta")`` does, by the names of functions.

    That one compares functions with those that torch has when first asked, which a patch may have wrapped by then.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """As torch calls it for every function."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FACTORIES and kwargs.get("device") is None:
            kwargs["device"] = META
        return func(*args, **kwargs)
