"""Square sums of linear features of gradients, over all ranks.

A feature is linear in the gradient, so parts that lie on several ranks (tied embeddings, norms under sequence
parallelism, everything under context parallelism) are added up as features, which are small, and squared then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.parameters import IN_PARTS, WHOLE, Kind
from copus_ext.adapters.noise.parts import add_up

ORDER = (*WHOLE, *IN_PARTS)  # of spans in a feature vector
CLASSES = 2  # dense parameters, experts


def lay_out(kinds: Sequence[Kind], lengths: Sequence[int]) -> tuple[list[slice], dict[Kind, slice]]:
    """Where each parameter's features lie in a feature vector, and each kind's, which are together."""
    places, spans, start = [slice(0, 0)] * len(kinds), {}, 0
    for kind in ORDER:
        first = start
        for index, length in enumerate(lengths):
            if kinds[index] is kind:
                places[index] = slice(start, start + length)
                start += length
        spans[kind] = slice(first, start)
    return places, spans


class FeatureSums:
    """Keeps what is local of some steps, and adds it up over all ranks at once."""

    def __init__(self, spans: Mapping[Kind, slice], groups: ProcessGroupCollection) -> None:
        """``spans``: where each kind lies in a feature vector, one behind the other in :data:`ORDER`."""
        self._spans, self._groups = spans, groups
        # What is whole on this rank is squared at once; what comes behind it waits for the other parts.
        self._whole = 0 if groups.cp.size() > 1 else spans[Kind.EXPERT].stop
        self._alone = groups.dp_cp.size() == 1  # no other rank has anything to add to a total
        self._counted = self._kinds_counted_here()
        self._steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, features: torch.Tensor) -> None:
        """One step: [groups of this rank, length]."""
        whole, parts = features[:, : self._whole], features[:, self._whole :]
        total = whole.sum(0)
        kept = self._squares(total, 0) if self._alone else total
        self._steps.append((self._squares(whole, 0).sum(0), kept, parts.clone()))

    def reduce(self) -> torch.Tensor:
        """Collective over all ranks.

        Returns:
            [steps, 2 (dense, experts), 2] float64: the sum of the groups' squares, and the square of their sum.
        """
        squares, totals, parts = (torch.stack(values) for values in zip(*self._steps, strict=True))
        self._steps.clear()
        self._add_up(parts)
        squares = squares + self._squares(parts, self._whole).sum(1)
        if self._alone:
            sums = totals + self._squares(parts.sum(1), self._whole)
        else:
            sums = self._squares_of_totals(torch.cat([totals, parts.sum(1)], dim=1))
        result = torch.stack([squares, sums], dim=-1)
        dist.all_reduce(result)
        return result

    def _add_up(self, parts: torch.Tensor) -> None:
        """Replace in [steps, groups, length] what several ranks hold parts of by its sum or mean."""
        if self._groups.cp.size() > 1:
            dist.all_reduce(parts, group=self._groups.cp)
        for kind in IN_PARTS:
            span = self._spans[kind]
            if span.stop > span.start:
                place = parts[..., span.start - self._whole : span.stop - self._whole]
                place.copy_(add_up(place.clone(memory_format=torch.contiguous_format), kind, self._groups))

    def _squares_of_totals(self, totals: torch.Tensor) -> torch.Tensor:
        """[steps, length] sums over this rank's groups -> [steps, 2] squares of the sums over all groups.

        Every data-parallel rank ends up with the same ones, so each gives its share.
        """
        dp, expt_dp, experts = self._groups.dp, self._groups.expt_dp, self._spans[Kind.EXPERT]
        of_experts = totals[:, experts].contiguous()
        if of_experts.numel():
            dist.all_reduce(of_experts, group=expt_dp)
        if dp.size() > 1:
            dist.all_reduce(totals, group=dp)
        totals[:, experts] = of_experts
        return self._squares(totals, 0) / torch.tensor([dp.size(), expt_dp.size()], device=totals.device)

    def _squares(self, features: torch.Tensor, first: int) -> torch.Tensor:
        """[..., length] -> [..., 2]: squares of what this rank counts, from position ``first`` of the vector on."""
        result = torch.zeros(*features.shape[:-1], CLASSES, dtype=torch.float64, device=features.device)
        for kind in self._counted:
            span = self._spans[kind]
            part = features[..., max(0, span.start - first) : max(0, span.stop - first)]
            if part.numel():
                result[..., int(kind is Kind.EXPERT)] += part.double().square().sum(-1)
        return result

    def _kinds_counted_here(self) -> list[Kind]:
        """What several ranks hold counts on the first of them."""
        groups, kinds = self._groups, [Kind.OWN, Kind.EXPERT]
        if groups.cp.rank() > 0:
            return []
        if groups.tp.rank() == 0:
            kinds += [Kind.SUM_OVER_TP, Kind.MEAN_OVER_TP]
        tied = self._spans[Kind.TIED]
        if tied.stop > tied.start and groups.embd.rank() == 0:
            kinds.append(Kind.TIED)
        return kinds
