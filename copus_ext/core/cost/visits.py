"""Measured step times, as visits to plans: a few consecutive steps each, and when they were made.

Machines drift: they grow hot, neighbours come and go. So it matters when a plan was measured, and what was measured
just before and behind it. A plan that stays in force is visited again and again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.plan import Plan, plan_from_json

Array = NDArray[np.float64]

STEP_SD = 0.1  # of the logarithm of single steps, until there are enough to tell

BLOCK = 16  # steps of a visit; the last one of a stay has up to twice as many, so that it is never a step or two
KEPT = 256  # visits that are remembered
_BREAK_S = 1e5  # a day or so: what a machine does now does not follow from what it did before
_STEP_SD_WORTH = 4  # observations that STEP_SD counts for
MAD_TO_SD = 1.4826  # of a normal distribution
_MEDIAN_VARIANCE = pi / 2  # of a median over that of a mean


@dataclass(frozen=True)
class Visit:
    """Consecutive steps of one plan [s]; the first began at ``start_s``, on a clock that only measured steps move."""

    plan: Plan
    start_s: float
    window: tuple[float, ...]

    @property
    def end_s(self) -> float:
        """When the last step was over."""
        return self.start_s + sum(self.window)

    @property
    def middle_s(self) -> float:
        """When the median step was made, or so."""
        return self.start_s + sum(self.window) / 2

    def split(self) -> tuple[Visit, ...]:
        """In two, when it is long enough for that."""
        if len(self.window) < 2 * BLOCK:
            return (self,)
        first = replace(self, window=self.window[:BLOCK])
        return first, Visit(self.plan, first.end_s, self.window[BLOCK:])


@dataclass(frozen=True)
class Visits:
    """All that are remembered, in the order of time. ``next_s``: when the next one starts, if not as the last ends."""

    visits: tuple[Visit, ...] = ()
    next_s: float | None = None

    @property
    def now_s(self) -> float:
        """The clock."""
        if self.next_s is not None:
            return self.next_s
        return self.visits[-1].end_s if self.visits else 0.0

    @property
    def steps(self) -> Counter[Plan]:
        """Steps that are remembered of each plan."""
        steps: Counter[Plan] = Counter()
        for visit in self.visits:
            steps[visit.plan] += len(visit.window)
        return steps

    def add(self, plan: Plan, step_time_s: float) -> Visits:
        """With one more step."""
        last = self.visits[-1] if self.visits else None
        if last is None or self.next_s is not None or last.plan != plan:
            return Visits(_remembered((*self.visits, Visit(plan, self.now_s, (step_time_s,)))))
        stay = replace(last, window=(*last.window, step_time_s))
        return Visits(_remembered((*self.visits[:-1], *stay.split())))

    def later(self, seconds: float = 0.0) -> Visits:
        """The same after some time in which nothing was measured: the next step begins another visit."""
        return replace(self, next_s=self.now_s + seconds) if self.visits else self

    def after_a_break(self) -> Visits:
        """The same, long ago: the machine was stopped, or it is another one of its kind."""
        return self.later(_BREAK_S)

    def log_medians(self) -> tuple[Array, Array]:
        """[n] medians of the log step times and the variances of these; both bear a minority of odd steps.

        What steps scatter by is told by all visits, and by each for itself where it is long enough.
        """
        logs = [np.log(visit.window) for visit in self.visits]
        medians = np.array([np.median(log) for log in logs])
        spreads = MAD_TO_SD * np.array([np.median(np.abs(log - m)) for log, m in zip(logs, medians, strict=True)])
        counts = np.array([log.size for log in logs], dtype=np.float64)
        usual = _shrunk(np.sum((counts - 1) * spreads**2), np.sum(counts - 1), STEP_SD**2)
        own = _shrunk((counts - 1) * spreads**2, counts - 1, usual)
        return medians, _MEDIAN_VARIANCE * own / counts

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        visits = [[visit.plan.to_json(), visit.start_s, list(visit.window)] for visit in self.visits]
        return {"visits": visits, "next_s": self.next_s}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Visits:
        """Inverse of :meth:`to_json`."""
        visits = (Visit(plan_from_json(plan), start, tuple(window)) for plan, start, window in values["visits"])
        return Visits(tuple(visits), values["next_s"])


def _shrunk(squares: Any, freedom: Any, variance: Any) -> Any:
    """A variance from its sum of squares, drawn to the one that is to be expected."""
    return (_STEP_SD_WORTH * variance + squares) / (_STEP_SD_WORTH + freedom)


def _remembered(visits: tuple[Visit, ...]) -> tuple[Visit, ...]:
    """Without the visit that is missed least, where there are too many.

    The first and the last before plans change say most: between them lies nothing but drift. So the oldest goes that
    has visits to the same plan before and behind it; or else the oldest to a plan that was visited later.
    """
    if len(visits) <= KEPT:
        return visits
    plans = [visit.plan for visit in visits]
    inner = (i for i in range(1, len(plans) - 1) if plans[i - 1] == plans[i] == plans[i + 1])
    again = (i for i, plan in enumerate(plans) if plan in plans[i + 1 :])
    gone = next(inner, None)
    gone = next(again, 0) if gone is None else gone
    return visits[:gone] + visits[gone + 1 :]
