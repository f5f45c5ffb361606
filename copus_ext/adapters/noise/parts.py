"""What lies in parts on several ranks: added up there, and squared then."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.parameters import IN_PARTS, Kind
from copus_ext.adapters.noise.squares import square_norm


def ranks_with_parts(kind: Kind, groups: ProcessGroupCollection) -> dist.ProcessGroup:
    """The ranks that hold parts of a gradient of this kind, which is none that a rank has whole."""
    return groups.embd if kind is Kind.TIED else groups.tp


def add_up(part: torch.Tensor, kind: Kind, groups: ProcessGroupCollection) -> torch.Tensor:
    """Replace this rank's part by the whole. Collective over :func:`ranks_with_parts`."""
    group = ranks_with_parts(kind, groups)
    dist.all_reduce(part, group=group)
    return part.div_(group.size()) if kind is Kind.MEAN_OVER_TP else part


class Parts:
    """Copies of whole gradients that lie in parts, in one step, by parameter and slice."""

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
        for kind in IN_PARTS:
            parts = [self._copies[key] for key in sorted(self._copies) if self._kinds[key[0]] is kind]
            if parts:
                whole = add_up(torch.cat(parts), kind, self._groups)
                if ranks_with_parts(kind, self._groups).rank() == 0:
                    total = total + square_norm(whole)
        return total
