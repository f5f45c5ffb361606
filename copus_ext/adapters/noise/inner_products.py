"""Inner products of groups' gradients with the mean gradient of their step, from several sketches of each.

What the inner product test needs (Bollapragada, Byrd and Nocedal 2018, "Adaptive sampling strategies for stochastic
optimization", arXiv 1710.11258, section 2).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.parameters import Kind
from copus_ext.adapters.noise.sums import FeatureRanks, Reduced

DRAWS = 4  # sketches of a gradient; on a CPU a product with four rows of signs takes as long as one with two


class InnerProducts:
    """Keeps the features of some steps, since a product with the mean takes all groups, and multiplies them at once.

    An expert's gradient holds the sequences of all ranks that share it, so with expert parallelism its groups are
    fewer than those of the dense layers. Then a group is one of the experts', and the dense gradients of its ranks add
    up: they are those of the same sequences.
    """

    def __init__(self, spans: Mapping[Kind, slice], groups: ProcessGroupCollection) -> None:
        """``spans``: as of :class:`FeatureRanks`."""
        self._ranks = FeatureRanks(spans, groups)
        self._group = groups.dp if groups.ep.size() == 1 else groups.expt_dp  # each of its ranks has other sequences
        self._steps: list[torch.Tensor] = []

    def add(self, features: torch.Tensor) -> None:
        """One step: [slices x draws, length], the draws of a slice one behind the other."""
        self._steps.append(features.unflatten(0, (-1, DRAWS)).clone())

    def reduce(self) -> Reduced:
        """Collective over all ranks. The squares are means over the draws."""
        features = torch.stack(self._steps)  # [steps, slices, draws, length]
        self._steps.clear()
        self._ranks.add_up(features[..., self._ranks.whole :])
        totals = features.sum(1)
        self._ranks.add_groups(totals)
        squares = self._ranks.squares(features).sum(1).mean(1)
        products = self._ranks.products(features, totals[:, None])  # [steps, slices, draws, 2]
        # A sum's square is the sum of its products with its summands: each rank has its own.
        squares = torch.stack([squares, products.sum(1).mean(1)], dim=-1)
        everyone = products.new_zeros(*products.shape[:-1], self._group.size())
        everyone[..., self._group.rank()] = products.sum(-1)
        return Reduced(*_all_reduced(squares, everyone.transpose(1, 2).flatten(2)))


def _all_reduced(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Sums over all ranks, in one go."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
