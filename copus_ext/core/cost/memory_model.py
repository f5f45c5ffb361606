"""Predicted memory of any plan, corrected by what the allocator of this very job peaked at.

The closed form counts tensors. What is not counted, of which every process has its share (kernels' workspaces, buffers
of communication libraries, memory that the allocator cannot hand out again), differs little from plan to plan: so what
was measured under some plans moves the prediction of all by one offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.cost.memory import peak_bytes
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import RunOptions
from copus_ext.core.cost.plan_table import PlanTable
from copus_ext.core.plan import Plan, plan_from_json

MOST_OF_MEMORY = 0.9  # of a device's memory that a plan may be predicted to take


@dataclass(frozen=True)
class MemoryModel:
    """What plans need of a device's ``capacity`` bytes. A value: :meth:`observe` returns the next one.

    ``peaks`` are the largest that was measured of each plan, on its fullest rank; ``exhausted`` are plans that ran out.
    """

    model: ModelShape
    capacity: float
    options: RunOptions = field(default_factory=RunOptions)
    peaks: tuple[tuple[Plan, float], ...] = ()
    exhausted: tuple[Plan, ...] = ()

    def observe(self, plan: Plan, peak: float) -> MemoryModel:
        """After ``plan`` was seen to peak at so many bytes on its fullest rank.

        Raises:
            ValueError: a peak that is not a positive finite number.
        """
        if not (math.isfinite(peak) and peak > 0):
            raise ValueError(f"a peak is a positive number of bytes, not {peak}")
        known = dict(self.peaks)
        known[plan] = max(peak, known.get(plan, 0.0))
        return replace(self, peaks=tuple(known.items()))

    def ran_out(self, plan: Plan) -> MemoryModel:
        """After ``plan`` ran out of memory: neither it nor any that is predicted to need more is tried again."""
        return replace(self, exhausted=tuple(dict.fromkeys((*self.exhausted, plan))))

    def predict(self, table: PlanTable) -> NDArray[np.float64]:
        """[n] bytes on the fullest rank: the closed form and the median of what it left out so far."""
        counted = peak_bytes(table, self.model, self.options)
        if not self.peaks:
            return counted
        plans, measured = zip(*self.peaks, strict=True)
        left_out = np.array(measured) - peak_bytes(PlanTable.of(plans), self.model, self.options)
        return np.maximum(counted + np.median(left_out), 0.0)

    def expected(self, plan: Plan) -> float:
        """Bytes on the fullest rank of one plan."""
        return float(self.predict(PlanTable.of([plan]))[0])

    def objections(self, plans: Candidates) -> dict[Plan, str]:
        """Which of ``plans`` may not be tried, and why."""
        if not plans:
            return {}
        needed = self.predict(plans.table)
        measured = dict(self.peaks)
        found = {
            plans[row]: f"needs {needed[row] / 2**30:.1f} GiB of {self.capacity / 2**30:.1f} on a rank, "
            "and at most 90 % is taken"
            for row in np.flatnonzero(needed > MOST_OF_MEMORY * self.capacity).tolist()
        }
        if self.exhausted:
            least = float(np.min(self.predict(PlanTable.of(self.exhausted))))
            for row in np.flatnonzero(needed >= least).tolist():
                plan, need = plans[row], needed[row] / 2**30
                if plan not in measured:
                    found.setdefault(plan, f"needs {need:.1f} GiB on a rank, and less ran out of memory before")
        return {**found, **{plan: "ran out of memory before" for plan in self.exhausted if plan in plans.row_of}}

    def to_json(self) -> dict[str, Any]:
        """What was learned, as plain values."""
        return {
            "capacity": self.capacity,
            "peaks": [[plan.to_json(), peak] for plan, peak in self.peaks],
            "exhausted": [plan.to_json() for plan in self.exhausted],
        }

    def restored(self, values: dict[str, Any]) -> MemoryModel:
        """With what an earlier attempt had learned, as :meth:`to_json` gave it; the capacity stays this one's."""
        peaks = tuple((plan_from_json(plan), float(peak)) for plan, peak in values["peaks"])
        return replace(self, peaks=peaks, exhausted=tuple(plan_from_json(plan) for plan in values["exhausted"]))
