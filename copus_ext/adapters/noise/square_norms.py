"""Exact square norms of slices of data-parallel ranks' accumulation windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.exact_sums import ExactSums
from copus_ext.adapters.noise.parameters import WHOLE, Counted, Kind
from copus_ext.adapters.noise.squares import square_norm
from copus_ext.adapters.noise.sums import Reduced


class SquareNorms:
    """Reads gradients as square norms. With more than one slice it keeps one more copy of them.

    What lies in parts on several ranks is added up in every step: exact, and costly for tied embeddings.
    """

    needs_grad_norm = True

    def __init__(
        self, model: Sequence[Any], counted: Sequence[Counted], groups: ProcessGroupCollection, slices: int
    ) -> None:
        self.slices, self._counted = slices, counted
        self.params = [param for param, _ in counted]
        device = counted[0].param.main_grad.device
        self._squares = torch.zeros(len(counted), slices, dtype=torch.float64, device=device)
        experts = [index for index, (_, kind) in enumerate(counted) if kind is Kind.EXPERT]
        self._experts = torch.tensor(experts, dtype=torch.long, device=device)
        self._previous = {
            index: torch.empty_like(param.main_grad) for index, (param, _) in enumerate(counted) if slices > 1
        }
        self._sums = ExactSums(model, [kind for _, kind in counted], groups)

    def attach(self) -> None:
        """Hooks of this reader's own."""
        self._sums.attach()

    def detach(self) -> None:
        """Take them away."""
        self._sums.detach()

    def begin(self, step: int) -> None:
        """A step begins, whatever its number."""
        self._squares.zero_()
        self._sums.begin()

    def read(self, index: int, number: int) -> None:
        """Take in what parameter ``index`` has accumulated since the end of the last slice."""
        param, kind = self._counted[index]
        gradient = param.main_grad
        if number:
            gradient = torch.sub(gradient, self._previous[index])
        if number < self.slices - 1:
            self._previous[index].copy_(param.main_grad)
        if kind in WHOLE:
            self._squares[index, number] = square_norm(gradient)
        else:
            self._sums.add_part(index, number, gradient)

    def end(self, valid: bool) -> None:
        """Keep the step; as not a number where it is not ``valid``. Collective where gradients lie in parts."""
        squares = self._squares.sum(1)
        experts = squares[self._experts].sum()
        self._sums.end(squares.sum() - experts, experts, valid)

    def reduce(self) -> Reduced:
        """Collective; as of :meth:`ExactSums.reduce`."""
        return self._sums.reduce()
