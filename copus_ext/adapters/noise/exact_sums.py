"""Square sums of whole gradients, over all ranks: what collectors that read them exactly have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.experts import ReducedExperts
from copus_ext.adapters.noise.parameters import Kind
from copus_ext.adapters.noise.parts import Parts
from copus_ext.adapters.noise.sums import CLASSES, Reduced


class ExactSums:
    """Keeps the square sums of some steps, with those of gradients in parts and of reduced experts put in."""

    def __init__(self, model: Sequence[Any], kinds: Sequence[Kind], groups: ProcessGroupCollection) -> None:
        """``kinds``: of the parameters that may be given to :meth:`add_part`, by index."""
        self._parts = Parts(kinds, groups)
        self._reduced_experts = ReducedExperts(model, groups)
        self._steps: list[torch.Tensor] = []
        self.attach, self.detach = self._reduced_experts.attach, self._reduced_experts.detach

    def begin(self) -> None:
        """A forward-backward pass begins."""
        self._parts.clear()
        self._reduced_experts.square.zero_()

    def add_part(self, index: int, number: int, gradient: torch.Tensor) -> None:
        """What parameter ``index`` got in slice ``number``, and other ranks hold parts of."""
        self._parts.add(index, number, gradient)

    def end(self, dense: torch.Tensor, experts: torch.Tensor, valid: bool) -> None:
        """Keep a step: squares of what is whole on this rank. Collective where gradients lie in parts."""
        result = torch.zeros(CLASSES, 2, dtype=torch.float64, device=dense.device)
        result[0, 0] = dense + self._parts.squares()
        result[1, 0], result[1, 1] = experts, self._reduced_experts.square
        self._steps.append(result if valid else result * float("nan"))

    def reduce(self) -> Reduced:
        """Collective. The square of the dense sum is left 0: with that of the experts it makes up upstream's norm."""
        result = torch.stack(self._steps)
        self._steps.clear()
        dist.all_reduce(result)
        return Reduced(result)
