"""Many plans as columns: what a search over a hundred thousand of them can compute on at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.plan import RECOMPUTE_CHOICES, Layout, Plan

Columns = NDArray[Any]


@dataclass(frozen=True)
class PlanTable:
    """n plans; every field is a column of n values, named and meant as in :class:`Layout` and :class:`Plan`.

    Sizes are floats (whole numbers, exact far beyond any machine), so that what is computed from them never divides as
    integers do. ``recompute`` numbers ``RECOMPUTE_CHOICES``.
    """

    dp: Columns
    tp: Columns
    pp: Columns
    vpp: Columns
    cp: Columns
    ep: Columns
    sequence_parallel: Columns
    distributed_optimizer: Columns
    recompute: Columns
    micro_batch: Columns
    global_batch: Columns

    @classmethod
    def of(cls, plans: Sequence[Plan]) -> PlanTable:
        """Plans as columns, in their order."""
        rows = [
            (
                *(getattr(plan.layout, size) for size in _SIZES),
                plan.layout.sequence_parallel,
                plan.layout.distributed_optimizer,
                RECOMPUTE_CHOICES.index(plan.layout.recompute),
                plan.micro_batch,
                plan.global_batch,
            )
            for plan in plans
        ]
        columns = np.array(rows, dtype=np.float64).reshape(-1, len(fields(cls))).T
        return cls(*(column.astype(kind) for column, kind in zip(columns, _KINDS, strict=True)))

    def __len__(self) -> int:
        return int(self.dp.size)

    def plan(self, row: int) -> Plan:
        """One row as a plan."""
        sizes = {size: int(getattr(self, size)[row]) for size in _SIZES}
        layout = Layout(
            **sizes,
            sequence_parallel=bool(self.sequence_parallel[row]),
            distributed_optimizer=bool(self.distributed_optimizer[row]),
            recompute=RECOMPUTE_CHOICES[int(self.recompute[row])],
        )
        return Plan(layout, int(self.micro_batch[row]), int(self.global_batch[row]))

    def plans(self) -> Iterable[Plan]:
        """All rows as plans."""
        return (self.plan(row) for row in range(len(self)))

    def columns(self) -> Iterator[Columns]:
        """All columns, in the order of the fields."""
        return (getattr(self, field.name) for field in fields(self))

    def take(self, rows: Columns) -> PlanTable:
        """Some rows: by number, or by a mask of n booleans."""
        return PlanTable(*(column[rows] for column in self.columns()))

    @property
    def world_size(self) -> Columns:
        """[n] ranks."""
        return np.asarray(self.dp * self.tp * self.pp * self.cp)

    @property
    def num_microbatches(self) -> Columns:
        """[n] micro-batches each data-parallel rank runs in a step."""
        return np.asarray(self.global_batch / (self.micro_batch * self.dp))

    def recomputes(self, choice: str) -> Columns:
        """[n] whether the plan recomputes as ``choice`` says."""
        return np.asarray(self.recompute == RECOMPUTE_CHOICES.index(choice))


_SIZES = ("dp", "tp", "pp", "vpp", "cp", "ep")
_KINDS = [np.float64] * 6 + [np.bool_, np.bool_, np.int64, np.float64, np.float64]
