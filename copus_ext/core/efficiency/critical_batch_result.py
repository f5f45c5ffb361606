"""What branches from one point of a run came to, and what several points say of c = critical batch / noise scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from copus_ext.core.efficiency.branch_loss import Excess, ToleranceBatch, excess_losses, ratio_to_noise, tolerance_batch
from copus_ext.core.efficiency.critical_batch import CriticalBatchFit, Interval, fit_critical_batch
from copus_ext.core.efficiency.loss_curves import BranchCurve, cost_after_settling, cost_from_branch
from copus_ext.core.events import plain


@dataclass(frozen=True)
class BranchedPoint:
    """The branches that left a run at one point.

    Attributes:
        samples: consumed by the run there.
        base_batch: the run's own global batch.
        curves: one for each branch.
        noise: noise scale over each branch, in sequences, by batch; ``nan`` where it was not measured.
    """

    samples: int
    base_batch: int
    curves: tuple[BranchCurve, ...]
    noise: Mapping[int, Interval]


@dataclass(frozen=True)
class Measurement:
    """What a point came to.

    Attributes:
        point: what it is made of.
        fit: Bc from all samples since the snapshot, those that recovery costs included.
        settled_fit: Bc from the samples between equal losses, after settling: free of recovery, and less certain.
        excess: loss at the end against the run's own batch, by batch.
        tolerance: what the loss may cost, nats per token.
        within: the largest batch within the tolerance.
        ratio: c = Bc of ``fit`` / noise scale over the branch of the run's own batch.
    """

    point: BranchedPoint
    fit: CriticalBatchFit
    settled_fit: CriticalBatchFit
    excess: tuple[Excess, ...]
    tolerance: float
    within: ToleranceBatch
    ratio: Interval

    @property
    def noise(self) -> Interval:
        """Noise scale over the branch of the run's own batch."""
        return self.point.noise[self.point.base_batch]


class RatioSpread(NamedTuple):
    """c over the points of a run that gave a closed interval: geometric mean, and what single points scatter by.

    ``log_sd`` is the standard deviation of ln c between points, ``nan`` for one; errors of the points are in it.
    """

    points: int
    mean: float
    log_sd: float


def measure(point: BranchedPoint, settle: float, tolerance: float) -> Measurement:
    """Everything that the branches of a point say; the same numbers for the same branches."""
    fit = fit_critical_batch(point.curves, settle, cost_from_branch)
    excess = excess_losses(point.curves, point.base_batch)
    return Measurement(
        point=point,
        fit=fit,
        settled_fit=fit_critical_batch(point.curves, settle, cost_after_settling),
        excess=excess,
        tolerance=tolerance,
        within=tolerance_batch(excess, point.base_batch, tolerance),
        ratio=ratio_to_noise(fit.critical, point.noise[point.base_batch]),
    )


def ratio_spread(measurements: Sequence[Measurement]) -> RatioSpread:
    """What several points say of c; points whose interval is open say nothing of a mean and are left out of it."""
    closed = [m.ratio.value for m in measurements if m.ratio.low > 0 and math.isfinite(m.ratio.high)]
    logs = np.log(closed)
    mean = float(np.exp(logs.mean())) if closed else math.nan
    return RatioSpread(len(closed), mean, float(logs.std(ddof=1)) if len(closed) > 1 else math.nan)


def to_json(measurements: Sequence[Measurement], conditions: Mapping[str, Any]) -> dict[str, Any]:
    """All of it as JSON can hold it: ends that are open, and what is not known, are null."""
    points = [_point_json(m) for m in measurements]
    result = {"conditions": dict(conditions), "c": ratio_spread(measurements)._asdict(), "points": points}
    found = plain(result)
    assert isinstance(found, dict)
    return found


def _point_json(m: Measurement) -> dict[str, Any]:
    excess = {e.batch: e for e in m.excess}
    branches = [
        {
            "batch": curve.batch,
            "samples": curve.samples.tolist(),
            "loss": curve.losses.mean(axis=1).tolist(),
            "block_losses": curve.losses.tolist(),
            "excess": excess[curve.batch]._asdict(),
            "noise_scale": m.point.noise[curve.batch]._asdict(),
        }
        for curve in sorted(m.point.curves, key=lambda curve: curve.batch)
    ]
    return {
        "samples": m.point.samples,
        "base_batch": m.point.base_batch,
        "critical_batch": _fit_json(m.fit),
        "critical_batch_after_settling": _fit_json(m.settled_fit),
        "within_tolerance": m.within._asdict(),
        "c": m.ratio._asdict(),
        "branches": branches,
    }


def _fit_json(fit: CriticalBatchFit) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(fit).items() if name != "critical"}
    return {**fit.critical._asdict(), **fields}
