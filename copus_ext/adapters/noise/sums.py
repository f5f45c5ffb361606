"""Square sums of gradients, or of linear features of them, over all ranks.

A feature is linear in the gradient, so parts that lie on several ranks (tied embeddings, norms under sequence
parallelism, everything under context parallelism) are added up as features, which are small, and squared then.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.parameters import Kind

ORDER = (Kind.OWN, Kind.EXPERT, Kind.SUM_OVER_TP, Kind.MEAN_OVER_TP, Kind.TIED)  # of spans in a feature vector
CLASSES = 2  # dense parameters, experts


class ExactSums:
    """Square sums that are exact on each rank, of some steps: added up over all ranks at once."""

    def __init__(self) -> None:
        self._steps: list[torch.Tensor] = []

    def add(self, dense: torch.Tensor, experts: torch.Tensor, sum_of_experts: torch.Tensor, valid: bool) -> None:
        """One step: squares of this rank's groups, and of what the experts' add up to."""
        result = torch.zeros(CLASSES, 2, dtype=torch.float64, device=dense.device)
        result[0, 0], result[1, 0], result[1, 1] = dense, experts, sum_of_experts
        self._steps.append(result if valid else result * float("nan"))

    def reduce(self) -> torch.Tensor:
        """Collective over all ranks. [steps, 2 (dense, experts), 2] as of :meth:`FeatureSums.reduce`."""
        result = torch.stack(self._steps)
        self._steps.clear()
        dist.all_reduce(result)
        return result


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
        groups = self._groups
        if groups.cp.size() > 1:
            dist.all_reduce(parts, group=groups.cp)
        for kind, group in (
            (Kind.SUM_OVER_TP, groups.tp),
            (Kind.MEAN_OVER_TP, groups.tp),
            (Kind.TIED, groups.embd),
        ):
            span = self._spans[kind]
            if span.stop > span.start:
                place = parts[..., span.start - self._whole : span.stop - self._whole]
                part = place.contiguous()
                dist.all_reduce(part, group=group)
                place.copy_(part / group.size() if kind is Kind.MEAN_OVER_TP else part)

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
