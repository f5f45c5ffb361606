"""Let gloo bring layers to the ranks that did not update them, where upstream's layer-wise optimizer gives them away.

``--optimizer muon --use-distributed-optimizer`` gives whole matrices to ranks, and each rank's go to the others behind
a step: by an all-gather of unequal sizes, which NCCL has and gloo has not. Upstream keeps an equivalent that sends them
one by one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron.patches.registry import Patch


def _one_by_one_on_gloo(gather: Any) -> Any:
    @functools.wraps(gather)
    def gathered(self: Any) -> None:
        if self.dp_cp_params_list and torch.distributed.get_backend(self.dp_cp) == "gloo":
            self.broadcast_params()
        else:
            gather(self)

    return gathered


def apply() -> None:
    """Wrap the gather of the layer-wise optimizer."""
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    LayerWiseDistributedOptimizer.allgather_params = _one_by_one_on_gloo(LayerWiseDistributedOptimizer.allgather_params)


_OPTIMIZER = "megatron.core.optimizer.layer_wise_optimizer.LayerWiseDistributedOptimizer"
PATCH = Patch(
    name="layer_wise_gather",
    # Who gets which layer is read off the last two (copus_ext/adapters/meta_model.py).
    upstream=tuple(
        f"{_OPTIMIZER}.{name}"
        for name in ("allgather_params", "broadcast_params", "shard_params", "_shard_params_ping_pong")
    ),
    why="Muon with a distributed optimizer fails in its first step over gloo, which gathers equal sizes only",
    issue="none known",
    remove_when="gloo gathers unequal sizes, or upstream's builder of models lays weights out in shards of layers",
    apply=apply,
)
