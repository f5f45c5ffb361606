"""What Megatron-Core's optimizers keep on this rank for each parameter of a model, and where it lies in that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

_ADAM, _MOMENTUM = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
# By the exact type: one that is made of these may keep more.
_MOMENTS = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "FusedAdam": _ADAM,
    "SGD": _MOMENTUM,
    "FusedSGD": _MOMENTUM,
    "TensorParallelMuon": _MOMENTUM,
    "Lion": ("exp_avg",),
}
MOST_MOMENTS = max(map(len, _MOMENTS.values()))


class UnknownOptimizer(ValueError):
    """An optimizer that this code does not know the inside of."""


class Shard(NamedTuple):
    """What the optimizer on this rank keeps for flat range ``[first, ...)`` of a parameter.

    Its main parameter, and ``moments``: the names of the tensors that it has for that once it has made a step.
    """

    optimizer: torch.optim.Optimizer
    main: torch.Tensor
    first: int
    moments: tuple[str, ...]


def inner_optimizers(optimizer: Any) -> list[Any]:
    """Upstream's optimizers of this rank that have parameters: one, or one each for dense and expert parameters."""
    every = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in every if not getattr(one, "is_stub_optimizer", False)]


def optimizer_shards(optimizer: Any) -> dict[int, Shard]:
    """What this rank's part of ``optimizer`` keeps, by ``id`` of the model's parameter."""
    return {id(parameter): shard for one in inner_optimizers(optimizer) for parameter, shard in _shards_of(one)}


def _shards_of(wrapper: Any) -> Iterator[tuple[torch.Tensor, Shard]]:
    inner, names = wrapper.optimizer, _moment_names(wrapper.optimizer)
    if isinstance(wrapper, DistributedOptimizer):
        for parameter in wrapper.model_param_gbuf_map:
            group, place = wrapper.model_param_group_index_map[parameter]
            main = inner.param_groups[group]["params"][place]
            yield parameter, Shard(inner, main, wrapper._get_model_param_range_map(parameter)["param"].start, names)
    elif isinstance(wrapper, Float16OptimizerWithFloat16Params):
        for half, full in zip(wrapper.float16_groups, wrapper.fp32_from_float16_groups, strict=True):
            yield from ((p, Shard(inner, main, 0, names)) for p, main in zip(half, full, strict=True))
        yield from ((p, Shard(inner, p, 0, names)) for group in wrapper.fp32_from_fp32_groups for p in group)
    elif isinstance(wrapper, FP32Optimizer):
        yield from ((p, Shard(inner, p, 0, names)) for group in inner.param_groups for p in group["params"])
    else:
        raise UnknownOptimizer(f"the state of a {type(wrapper).__name__} cannot be found")


def _moment_names(inner: torch.optim.Optimizer) -> tuple[str, ...]:
    name = type(inner).__name__
    if name not in _MOMENTS:
        raise UnknownOptimizer(f"the state of a {name} is not known")
    if "SGD" in name and not inner.defaults["momentum"]:
        return ()
    return _MOMENTS[name]
