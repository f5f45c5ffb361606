"""What experts' gradients come to when they have been reduced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.overrides import override
from copus_ext.adapters.noise.squares import square_norm


class ReducedExperts:
    """Square norm of the experts' summed gradients, read when their reduction has ended.

    Upstream's gradient norm has dense parameters and experts in one number, and they have different groups.
    """

    def __init__(self, model: Sequence[Any], groups: ProcessGroupCollection) -> None:
        self._bucket_groups = [group for chunk in model for group in chunk.expert_parallel_bucket_groups]
        self._edp = groups.expt_dp
        self._sharded = model[0].ddp_config.use_distributed_optimizer
        # What reduction multiplies by: the sum of the accumulated gradients is wanted.
        self._factor = 1.0 if model[0].config.calculate_per_token_loss else 1.0 / groups.dp_cp.size()
        device = next(model[0].module.parameters()).device
        self.square = torch.zeros((), dtype=torch.float64, device=device)
        self._undo = contextlib.ExitStack()

    def attach(self) -> None:
        """Read from now on."""
        for group in self._bucket_groups:
            self._wrap(group)

    def detach(self) -> None:
        """Read no longer."""
        self._undo.close()

    def _wrap(self, group: Any) -> None:
        finish_grad_sync = group.finish_grad_sync

        def finish_then_read(*args: Any, **kwargs: Any) -> Any:
            finished_before = group.grad_reduce_finished  # upstream may come by a second time, for nothing
            result = finish_grad_sync(*args, **kwargs)
            if not finished_before:
                for part in self._reduced(group):
                    self.square += square_norm(part) / self._factor**2
            return result

        self._undo.callback(override(group, "finish_grad_sync", finish_then_read))

    def _reduced(self, group: Any) -> Iterator[torch.Tensor]:
        """What this rank counts: its shard, or all of it on one of the ranks that hold the same."""
        for bucket in group.buckets:
            if self._sharded:
                yield shard_buffer(bucket.grad_data, self._edp.size())[self._edp.rank()]
            elif self._edp.rank() == 0:
                yield bucket.grad_data
