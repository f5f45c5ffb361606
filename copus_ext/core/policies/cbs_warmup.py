"""Batch warm-up by the critical batch: start small, and double when twice the batch is not too much.

Merrill et al. 2025 ("Critical batch size revisited", arXiv 2505.23971): the critical batch, measured by branches, grows
while a model learns; so the batch is doubled, and the learning rate multiplied by sqrt(2), whenever the critical batch
is at least twice the present one. It never shrinks. Their critical batch is the largest whose loss stays within a
tolerance; ``file`` takes such measurements from ``tools/measure_critical_batch.py``. Without it, the run's own c x
noise scale at its lower quartile stands in, which is not theirs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from copus_ext.core.errors import UserError
from copus_ext.core.plan import Plan
from copus_ext.core.planner.batch_change import at_batch, batches_here, change_to, critical_batches, stay
from copus_ext.core.planner.decision import Decision, Situation
from copus_ext.core.planner.policy import FLAG, Options, Policy, PolicySettings

_TOLERANCE, _FIT = "tolerance", "fit"
_ROUNDING = 1e-9  # relative: a measured 64 that logarithms made 63.99... allows 64
_FIELDS = {_TOLERANCE: "within_tolerance", _FIT: "critical_batch"}


@dataclass(frozen=True)
class MeasuredCriticalBatch:
    """Critical batches [sequences] that branches found after so many samples, rising; both at least 1."""

    samples: tuple[float, ...]
    batches: tuple[float, ...]

    def after(self, consumed_samples: int) -> float:
        """Interpolated in the logarithms of both; before the first and after the last point, theirs."""
        at = math.log(max(1, consumed_samples))
        return math.exp(float(np.interp(at, np.log(self.samples), np.log(self.batches))))


@dataclass(frozen=True)
class WarmupPolicy(Policy):
    """Doubles the batch once a decision, at most, where the critical batch allows; the layout is fixed."""

    searches = True

    measured: MeasuredCriticalBatch | None = None

    def decide(self, situation: Situation) -> Decision:
        """Compare the critical batch with twice the present one."""
        if self.measured is not None:
            critical, source = self.measured.after(situation.consumed_samples), "measured by branches"
        else:
            known = critical_batches(situation)
            if known is None:
                return stay(situation, "the noise scale is not known yet, so the batch stays")
            critical, source = float(np.quantile(known, 0.25, method="hazen")), "lower quartile"
        doubled = 2 * situation.current.global_batch
        said = f"the critical batch is {critical:.4g} sequences ({source}), and doubling takes {doubled}"
        if critical < doubled * (1 - _ROUNDING):
            return stay(situation, said)
        if doubled > batches_here(situation)[-1]:
            return stay(situation, f"{said}, which is beyond the largest global batch there is")
        plan = at_batch(situation, doubled)
        return stay(situation, f"{said}, but no plan can run it") if plan is None else change_to(situation, plan, said)


def read_measurements(path: str, use: str = _TOLERANCE) -> MeasuredCriticalBatch:
    """What ``tools/measure_critical_batch.py`` wrote (:func:`copus_ext.core.efficiency.critical_batch_result.to_json`).

    Args:
        path: its ``critical_batch.json``.
        use: ``tolerance`` for the largest batch within the tolerance, ``fit`` for Bc of the fit. Points where it is
            not known are left out.

    Raises:
        UserError: it is no such file, or has no point.
    """
    try:
        points = json.loads(Path(path).read_text(encoding="utf-8"))["points"]
        found = sorted((float(max(1, point["samples"])), _value(point, use)) for point in points)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{FLAG} cbs-warmup:file={path} is not what tools/measure_critical_batch.py writes: {error}"
        ) from None
    known = [(samples, batch) for samples, batch in found if batch >= 1]
    if not known:
        raise UserError(f"{FLAG} cbs-warmup:file={path} has no point with a critical batch; measure one, or leave it")
    return MeasuredCriticalBatch(*zip(*known, strict=True))


def _value(point: dict[str, Any], use: str) -> float:
    """0 where it is not known."""
    value = point[_FIELDS[use]]["value"]
    return 0.0 if value is None else float(value)


def make(settings: PolicySettings, base: Plan, options: Options) -> Policy:
    """Options ``file`` and, with it, ``use``: tolerance or fit."""
    path = options.text("file")
    return WarmupPolicy(None if path is None else read_measurements(path, options.choice("use", tuple(_FIELDS))))
