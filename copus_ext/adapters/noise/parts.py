"""Whole gradients that lie in parts on several ranks: added up there, and squared then."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.parameters import Kind
from copus_ext.adapters.noise.squares import square_norm


class Parts:
    """Copies of such gradients in one step, by parameter and slice."""

    def __init__(self, kinds: Sequence[Kind], groups: ProcessGroupCollection) -> None:
        """``kinds``: of each parameter, by its index."""
        self._kinds, self._groups = kinds, groups
        self._copies: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, index: int, number: int, gradient: torch.Tensor) -> None:
        """Keep what parameter ``index`` got in slice ``number``."""
        self._copies[index, number] = gradient.float().reshape(-1).clone()

    def clear(self) -> None:
        """Forget them."""
        self._copies.clear()

    def squares(self) -> torch.Tensor | float:
        """Sum of the squares of what was added up, on one of the ranks that hold parts. Collective over these."""
        total: torch.Tensor | float = 0.0
        groups = self._groups
        for kind, group in ((Kind.SUM_OVER_TP, groups.tp), (Kind.MEAN_OVER_TP, groups.tp), (Kind.TIED, groups.embd)):
            parts = [self._copies[key] for key in sorted(self._copies) if self._kinds[key[0]] is kind]
            if not parts:
                continue
            flat = torch.cat(parts)
            dist.all_reduce(flat, group=group)
            if kind is Kind.MEAN_OVER_TP:
                flat /= group.size()
            if group.rank() == 0:
                total = total + square_norm(flat)
        return total
