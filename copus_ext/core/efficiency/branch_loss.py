"""Branches at equally many samples: how much loss a batch costs, and the largest one within a tolerance.

Merrill et al. 2025 (arXiv 2505.23971) call a batch critical where the loss of a branch, smoothed, at equally many
tokens, leaves a tolerance above the run's own. Here the loss is that of the same validation sequences in every branch,
so what is compared is paired and the level of single sequences cancels. Units as in
:mod:`copus_ext.core.efficiency.critical_batch`, whose interval for Bc becomes one for c = Bc / noise scale here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.efficiency.critical_batch import Interval
from copus_ext.core.efficiency.loss_curves import BranchCurve

Array = NDArray[np.float64]

_RESAMPLES = 2000
_SMOOTHED_SHARE = 0.25  # of the evaluations, the last ones, are averaged; two at least


class Excess(NamedTuple):
    """Loss of a branch at the end less that of the run's own batch, nats per token, with a 95 % interval.

    The interval covers the validation sequences only.
    """

    batch: int
    value: float
    low: float
    high: float


class ToleranceBatch(NamedTuple):
    """The largest batch within the tolerance.

    Attributes:
        value: the largest of the branches such that it and all between it and the run's own batch are within.
        at_least: the same with every excess within by its whole interval.
        below: the smallest batch whose excess is beyond by its whole interval; ``None`` where none is.
    """

    value: int
    at_least: int
    below: int | None


def end_losses(curve: BranchCurve) -> Array:
    """[blocks] losses of the last quarter of the evaluations, averaged; an average is all the smoothing there is."""
    points = curve.samples.size - 1  # the first is the snapshot's own
    return np.asarray(curve.losses[-max(1, min(points, max(2, round(_SMOOTHED_SHARE * points)))) :].mean(axis=0))


def excess_losses(curves: Sequence[BranchCurve], base_batch: int, seed: int = 0) -> tuple[Excess, ...]:
    """What each branch lost against the branch of ``base_batch``, by batch; resampled in blocks, paired."""
    base = end_losses(next(curve for curve in curves if curve.batch == base_batch))
    random = np.random.default_rng(seed)
    draws = random.integers(0, base.size, (_RESAMPLES, base.size))
    found = []
    for curve in sorted(curves, key=lambda curve: curve.batch):
        difference = end_losses(curve) - base
        low, high = np.quantile(difference[draws].mean(axis=1), (0.025, 0.975))
        found.append(Excess(curve.batch, float(difference.mean()), float(low), float(high)))
    return tuple(found)


def tolerance_batch(excesses: Sequence[Excess], base_batch: int, tolerance: float) -> ToleranceBatch:
    """The largest batch within ``tolerance`` (nats per token) of the run's own, from the run's own upwards."""
    larger = sorted(e for e in excesses if e.batch > base_batch)
    return ToleranceBatch(
        value=_last_within(larger, [e.value for e in larger], base_batch, tolerance),
        at_least=_last_within(larger, [e.high for e in larger], base_batch, tolerance),
        below=next((e.batch for e in larger if e.low > tolerance), None),
    )


def _last_within(larger: Sequence[Excess], ends: Sequence[float], base_batch: int, tolerance: float) -> int:
    """One branch that is within by luck behind one that is not does not count."""
    last = base_batch
    for excess, end in zip(larger, ends, strict=True):
        if end > tolerance:
            break
        last = excess.batch
    return last


def ratio_to_noise(critical: Interval, noise: Interval) -> Interval:
    """The ratio c = Bc / noise scale, with both intervals in it; all ``nan`` where one of them is not known.

    Where all ends are closed the two errors are taken as independent and log-normal on each side, and their half-widths
    add in squares. Else each end is that of the worst case, which is wider.
    """
    if any(math.isnan(end) for end in (*critical, *noise)) or noise.value == 0:
        return Interval(*(math.nan,) * 3)
    if all(math.isfinite(end) and end > 0 for end in (*critical, *noise)):
        value = critical.value / noise.value
        down = math.hypot(math.log(critical.value / critical.low), math.log(noise.high / noise.value))
        up = math.hypot(math.log(critical.high / critical.value), math.log(noise.value / noise.low))
        return Interval(value, value * math.exp(-down), value * math.exp(up))
    value = math.nan if math.isinf(critical.value) and math.isinf(noise.value) else critical.value / noise.value
    low = 0.0 if math.isinf(noise.high) else critical.low / noise.high
    high = math.inf if noise.low == 0 else critical.high / noise.low
    return Interval(value, low, high)
