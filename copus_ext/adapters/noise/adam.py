"""Adam's preconditioner: gradients divided by the root of their second moments, as Adam itself divides its steps.

Pollux measures the noise scale of preconditioned gradients for Adam (Qiao et al. 2021, arXiv 2008.12260, section 3.1).
N and S stay unbiased for any factors that do not depend on the step's own gradients: these are of some steps ago.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.parameters import IN_PARTS, Counted, Kind
from copus_ext.adapters.noise.parts import ranks_with_parts
from copus_ext.adapters.optimizer_shards import optimizer_shards

_STEPS_BETWEEN_REFRESHES = 16
_FLOOR = 0.01  # of the root mean square of all: an element that is hardly ever used must not rule the sum


class AdamFactors:
    """rms / (sqrt(second moment) + floor) of every parameter, whole on every rank: as much memory as the gradients.

    ``rms``, the root of the mean second moment, keeps N and S in the gradient's own scale, so that steps before and
    after a refresh can be averaged. It cancels in their ratio. Before the first step all factors are 1.
    """

    def __init__(self, counted: Sequence[Counted], optimizer: Any, groups: ProcessGroupCollection) -> None:
        self.factors = [torch.ones(param.main_grad.shape, device=param.main_grad.device) for param, _ in counted]
        self._counted, self._optimizer, self._groups = counted, optimizer, groups
        self._next_refresh = 0

    def refresh(self, step: int) -> None:
        """Take over the second moments every 16 steps. Collective over all ranks."""
        if step < self._next_refresh:
            return
        self._gather_second_moments()
        rms = self._root_mean_square()
        self._next_refresh = step + (_STEPS_BETWEEN_REFRESHES if rms > 0 else 1)
        for factor in self.factors:
            factor.sqrt_().add_(_FLOOR * rms).reciprocal_().mul_(rms) if rms > 0 else factor.fill_(1.0)

    def _gather_second_moments(self) -> None:
        """Into ``factors``: what this rank's optimizer has, and with a distributed one also what the others have."""
        shards = optimizer_shards(self._optimizer)
        for factor, (param, kind) in zip(self.factors, self._counted, strict=True):
            factor.zero_()
            shard = shards.get(id(param))
            moments = shard.optimizer.state[shard.main].get("exp_avg_sq") if shard else None
            if shard is not None and moments is not None:
                factor.view(-1)[shard.first : shard.first + moments.numel()].copy_(moments.view(-1))
            if self._is_distributed:
                dist.all_reduce(factor, group=self._groups.expt_dp if kind is Kind.EXPERT else self._groups.dp_cp)

    @property
    def _is_distributed(self) -> bool:
        return bool(self._optimizer.config.use_distributed_optimizer)

    def _root_mean_square(self) -> float:
        """Over the model: what several ranks hold counts once, so that it is the same in every layout."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.factors[0].device)
        for factor, (_, kind) in zip(self.factors, self._counted, strict=True):
            both = torch.stack([factor.sum(dtype=torch.float64), sums.new_tensor(factor.numel())])
            sums += both / self._holders(kind)
        dist.all_reduce(sums)
        return float((sums[0] / sums[1]).sqrt())

    def _holders(self, kind: Kind) -> int:
        """How many ranks hold the second moments that this one has of a parameter of this kind."""
        replicas: int = (self._groups.expt_dp if kind is Kind.EXPERT else self._groups.dp_cp).size()
        return replicas * (ranks_with_parts(kind, self._groups).size() if kind in IN_PARTS else 1)
