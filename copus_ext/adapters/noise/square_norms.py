"""Exact square norms of data-parallel ranks' gradients, or of slices of their accumulation windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.overrides import override
from copus_ext.adapters.noise.parameters import Counted, Kind
from copus_ext.adapters.noise.sums import CLASSES


class SquareNorms:
    """Reads gradients as square norms. With slices it keeps one more copy of them.

    What lies in parts on several ranks is added up in every step: exact, and costly for tied embeddings.
    """

    needs_grad_norm = True

    def __init__(
        self, model: Sequence[Any], counted: Sequence[Counted], groups: ProcessGroupCollection, slices: int
    ) -> None:
        self.slices, self._counted, self._groups = slices, counted, groups
        device = counted[0].param.main_grad.device
        self._squares = torch.zeros(len(counted), slices, device=device)
        experts = [index for index, (_, kind) in enumerate(counted) if kind is Kind.EXPERT]
        self._experts = torch.tensor(experts, dtype=torch.long, device=device)
        self._previous = {
            index: torch.empty_like(param.main_grad) for index, (param, _) in enumerate(counted) if slices > 1
        }
        self._parts: dict[tuple[int, int], torch.Tensor] = {}
        self._steps: list[torch.Tensor] = []
        self._reduced_experts = _ReducedExperts(model, groups) if experts else None

    def attach(self) -> None:
        """Hooks of this reader's own."""
        if self._reduced_experts:
            self._reduced_experts.attach()

    def detach(self) -> None:
        """Take them away."""
        if self._reduced_experts:
            self._reduced_experts.detach()

    def begin(self, step: int) -> None:
        """A step begins, whatever its number."""
        self._squares.zero_()
        self._parts.clear()
        if self._reduced_experts:
            self._reduced_experts.square.zero_()

    def read(self, index: int, number: int) -> None:
        """Take in what parameter ``index`` has accumulated since the end of the last slice."""
        param, kind = self._counted[index]
        gradient = param.main_grad
        if number:
            gradient = torch.sub(gradient, self._previous[index])
        if number < self.slices - 1:
            self._previous[index].copy_(param.main_grad)
        if kind in (Kind.OWN, Kind.EXPERT):
            flat = gradient.reshape(-1).float()
            torch.dot(flat, flat, out=self._squares[index, number])
        else:
            self._parts[index, number] = gradient.float().reshape(-1).clone()

    def end(self, valid: bool) -> None:
        """Keep the step; as not a number where it is not ``valid``. Collective where gradients lie in parts."""
        squares = self._squares.sum(1, dtype=torch.float64)
        experts = squares[self._experts].sum()
        result = torch.zeros(CLASSES, 2, dtype=torch.float64, device=squares.device)
        result[0, 0] = squares.sum() - experts + self._squares_of_parts()
        result[1, 0] = experts
        if self._reduced_experts:
            result[1, 1] = self._reduced_experts.square
        self._steps.append(result if valid else result * float("nan"))

    def clear(self) -> None:
        """Forget the steps kept."""
        self._steps.clear()

    def reduce(self) -> torch.Tensor:
        """Collective. [steps, 2 (dense, experts), 2]: square sum of the groups, and square of their sum.

        The latter is left 0 for dense parameters: with the experts' it makes up upstream's own gradient norm.
        """
        result = torch.stack(self._steps)
        self.clear()
        dist.all_reduce(result)
        return result

    def _squares_of_parts(self) -> torch.Tensor:
        """Parts on several ranks are summed there first, then counted on one of them."""
        total = torch.zeros((), dtype=torch.float64, device=self._squares.device)
        groups = self._groups
        for kind, group in ((Kind.SUM_OVER_TP, groups.tp), (Kind.MEAN_OVER_TP, groups.tp), (Kind.TIED, groups.embd)):
            parts = [self._parts[key] for key in sorted(self._parts) if self._counted[key[0]].kind is kind]
            if not parts:
                continue
            flat = torch.cat(parts)
            dist.all_reduce(flat, group=group)
            if kind is Kind.MEAN_OVER_TP:
                flat /= group.size()
            if group.rank() == 0:
                total += torch.dot(flat, flat)
        return total


class _ReducedExperts:
    """Square norm of the experts' summed gradients, read when their reduction has ended.

    Upstream's gradient norm has dense parameters and experts in one number, and they have different groups.
    """

    def __init__(self, model: Sequence[Any], groups: ProcessGroupCollection) -> None:
        self._bucket_groups = [group for chunk in model for group in chunk.expert_parallel_bucket_groups]
        self._edp = groups.expt_dp
        self._sharded = model[0].ddp_config.use_distributed_optimizer
        # What reduction multiplies by: the sum of the accumulated gradients is wanted.
        self._factor = 1.0 if model[0].config.calculate_per_token_loss else 1.0 / groups.dp_cp.size()
        device = self._bucket_groups[0].buckets[0].grad_data.device
        self.square = torch.zeros((), dtype=torch.float64, device=device)
        self._undo: list[Callable[[], Any]] = []

    def attach(self) -> None:
        for group in self._bucket_groups:
            self._wrap(group)

    def detach(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _wrap(self, group: Any) -> None:
        finish_grad_sync = group.finish_grad_sync

        def finish_then_read(*args: Any, **kwargs: Any) -> Any:
            result = finish_grad_sync(*args, **kwargs)
            for part in self._reduced(group):
                self.square += part.double().square().sum() / self._factor**2
            return result

        self._undo.append(override(group, "finish_grad_sync", finish_then_read))

    def _reduced(self, group: Any) -> Iterator[torch.Tensor]:
        """What this rank counts: its shard, or all of it on one of the ranks that hold the same."""
        for bucket in group.buckets:
            if self._sharded:
                yield shard_buffer(bucket.grad_data, self._edp.size())[self._edp.rank()]
            elif self._edp.rank() == 0:
                yield bucket.grad_data
