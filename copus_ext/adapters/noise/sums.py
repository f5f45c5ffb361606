"""Square sums of linear features of gradients, over all ranks.

A feature is linear in the gradient, so parts that lie on several ranks (tied embeddings, norms under sequence
parallelism, all but experts under context parallelism) are added up as features, which are small, and squared then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.parameters import IN_PARTS, WHOLE, Kind
from copus_ext.adapters.noise.parts import add_up

ORDER = (*WHOLE, *IN_PARTS)  # of spans in a feature vector
CLASSES = 2  # dense parameters, experts


class Reduced(NamedTuple):
    """What some steps came to over all ranks, of accumulated gradients.

    ``squares``: [steps, 2 (dense, experts), 2] float64, the sum of the groups' squares, and the square of their sum.
    ``products``: [steps, draws, groups] float64, the inner product of each group with that sum, measured by so many
    independent sketches; ``None`` where it was not asked for.
    """

    squares: torch.Tensor
    products: torch.Tensor | None = None


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


class FeatureRanks:
    """How the numbers of a feature vector are spread over ranks, and which of them this rank counts."""

    def __init__(self, spans: Mapping[Kind, slice], groups: ProcessGroupCollection) -> None:
        """``spans``: where each kind lies in a feature vector, one behind the other in :data:`ORDER`."""
        self._spans, self._groups = spans, groups
        # So many from the front are no parts. Experts never are: all context-parallel ranks of a group feed the same.
        self.whole = spans[Kind.EXPERT if groups.cp.size() > 1 else Kind.OWN].stop
        self._counted = self._kinds_counted_here()

    def add_up(self, parts: torch.Tensor) -> None:
        """Replace in [..., length - whole] what several ranks hold parts of by its sum or mean. Collective."""
        if self._groups.cp.size() > 1:
            added_up = parts.contiguous()  # gloo takes what is not for what is, and says nothing
            dist.all_reduce(added_up, group=self._groups.cp)
            parts.copy_(added_up)
        for kind in IN_PARTS:
            span = self._spans[kind]
            if span.stop > span.start:
                place = parts[..., span.start - self.whole : span.stop - self.whole]
                place.copy_(add_up(place.clone(memory_format=torch.contiguous_format), kind, self._groups))

    def add_groups(self, totals: torch.Tensor) -> None:
        """Replace in [..., length] sums over this rank's groups by those over all groups. Collective."""
        dp, expt_dp, experts = self._groups.dp, self._groups.expt_dp, self._spans[Kind.EXPERT]
        of_experts = totals[..., experts].contiguous()
        if of_experts.numel():
            dist.all_reduce(of_experts, group=expt_dp)
        if dp.size() > 1:
            dist.all_reduce(totals, group=dp)
        totals[..., experts] = of_experts

    def products(self, features: torch.Tensor, others: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Inner products of what this rank counts: two [..., length] -> [..., 2 (dense, experts)] float64.

        ``first``: the vectors begin at this position of a feature vector.
        """
        shape = torch.broadcast_shapes(features.shape, others.shape)[:-1]
        result = torch.zeros(*shape, CLASSES, dtype=torch.float64, device=features.device)
        for kind in self._counted:
            span = self._spans[kind]
            place = slice(max(0, span.start - first), max(0, span.stop - first))
            if place.stop > place.start:
                part = features[..., place].double()
                other = part if others is features else others[..., place].double()
                result[..., int(kind is Kind.EXPERT)] += (part * other).sum(-1)
        return result

    def squares(self, features: torch.Tensor, first: int = 0) -> torch.Tensor:
        """[..., length] -> [..., 2]: of what this rank counts, from position ``first`` of the vector on."""
        return self.products(features, features, first)

    def _kinds_counted_here(self) -> list[Kind]:
        """What several ranks hold counts on the first of them."""
        groups, kinds = self._groups, [Kind.OWN, Kind.EXPERT]
        if groups.cp.rank() > 0:
            return [Kind.EXPERT]
        if groups.tp.rank() == 0:
            kinds += [Kind.SUM_OVER_TP, Kind.MEAN_OVER_TP]
        tied = self._spans[Kind.TIED]
        if tied.stop > tied.start and groups.embd.rank() == 0:
            kinds.append(Kind.TIED)
        return kinds


class FeatureSums:
    """Keeps what is local of some steps, and adds it up over all ranks at once."""

    def __init__(self, spans: Mapping[Kind, slice], groups: ProcessGroupCollection) -> None:
        """``spans``: as of :class:`FeatureRanks`."""
        self._ranks, self._groups = FeatureRanks(spans, groups), groups
        # What is whole on this rank is squared at once; what comes behind it waits for the other parts.
        self._whole = self._ranks.whole
        self._alone = groups.dp_cp.size() == 1  # no other rank has anything to add to a total
        self._steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, features: torch.Tensor) -> None:
        """One step: [groups of this rank, length]."""
        whole, parts = features[:, : self._whole], features[:, self._whole :]
        total = whole.sum(0)
        kept = self._ranks.squares(total) if self._alone else total
        self._steps.append((self._ranks.squares(whole).sum(0), kept, parts.clone()))

    def reduce(self) -> Reduced:
        """Collective over all ranks."""
        squares, totals, parts = (torch.stack(values) for values in zip(*self._steps, strict=True))
        self._steps.clear()
        self._ranks.add_up(parts)
        squares = squares + self._ranks.squares(parts, self._whole).sum(1)
        if self._alone:
            sums = totals + self._ranks.squares(parts.sum(1), self._whole)
        else:
            sums = self._squares_of_totals(torch.cat([totals, parts.sum(1)], dim=1))
        result = torch.stack([squares, sums], dim=-1)
        dist.all_reduce(result)
        return Reduced(result)

    def _squares_of_totals(self, totals: torch.Tensor) -> torch.Tensor:
        """[steps, length] sums over this rank's groups -> [steps, 2] squares of the sums over all groups.

        Every data-parallel rank ends up with the same ones, so each gives its share.
        """
        self._ranks.add_groups(totals)
        shares = torch.tensor([self._groups.dp.size(), self._groups.expt_dp.size()], device=totals.device)
        return self._ranks.squares(totals) / shares
