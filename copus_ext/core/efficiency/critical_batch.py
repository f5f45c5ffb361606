"""The critical batch, measured: branches of one run at several batch sizes, and what they say of it together.

Branches leave one snapshot, each with its own global batch, and read the same samples in the same order. E(B) is how
many samples a branch needs to reach a loss. McCandlish et al. 2018 (arXiv 1812.06162, section 2.2) give E(B)
proportional to 1 + B / Bc, so two batches give Bc = (B2 - q B1) / (q - 1) with q = E(B2) / E(B1), and more of them
overdetermine it. Merrill et al. 2025 (arXiv 2505.23971) branch the same way, and take the largest batch whose loss
after equally many tokens is within a tolerance of the run's own.

All that is estimated is x = 1 / Bc. It may come out at 0 or below (q <= 1: larger batches cost nothing), and then no
finite Bc is made of it. Units: batches and samples in sequences, losses in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.efficiency.loss_curves import BranchCurve, compare, cost_from_branch

Array = NDArray[np.float64]
Costs = Callable[[Array], Array]

_RESAMPLES = 200
_GRID = 2001
_NORMAL_975 = 1.959964
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # of Student, 1 to 10 degrees


class Interval(NamedTuple):
    """A value with the ends of its 95 % interval; an end that is open is 0 or ``inf``."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CriticalBatchFit:
    """Bc over all branches that can be compared.

    Attributes:
        critical: Bc in sequences. ``value`` is ``inf`` where larger batches cost nothing; ``high`` is ``inf`` where
            that is within the error, ``low`` is 0 where a cost in proportion to the batch is. All ``nan``: no fit.
        outcome: ``measured``, ``at least``, ``at most``, ``undetermined``, ``contradicted`` or ``no overlap``.
        batches: [n] of the branches that took part.
        cost: [n] samples to equal loss, relative to the first of ``batches``.
        excluded: batches that never reached a loss that the others had after settling, so q exceeds what was run.
        spread: standard error of the logarithm of a branch's cost that the interval is made with.
        validation_spread: the part of it that another draw of validation sequences would explain.
        residual: root mean square of the residuals of the fit (n - 2 degrees of freedom), in ln cost.
        exponent: a of the rival law, cost proportional to B^a. Near 1/2 from the smallest batch on, under a square root
            rule, it is the length of steps that limits progress and not the noise: then Bc is not what is seen.
        exponent_residual: root mean square of the residuals of that law.
    """

    critical: Interval
    outcome: str
    batches: tuple[int, ...] = ()
    cost: tuple[float, ...] = ()
    excluded: tuple[int, ...] = ()
    spread: float = math.nan
    validation_spread: float = math.nan
    residual: float = math.nan
    exponent: float = math.nan
    exponent_residual: float = math.nan


def critical_batch_of_two(batches: tuple[float, float], q: float) -> float:
    """Bc from q = E(B2) / E(B1), B1 < B2; ``inf`` for q <= 1, 0 where the cost grows as the batch or faster."""
    first, second = batches
    if q <= 1.0:
        return math.inf
    return max(0.0, (second - q * first) / (q - 1.0))


def fit_critical_batch(
    curves: Sequence[BranchCurve], settle: float, costs: Costs = cost_from_branch, seed: int = 0
) -> CriticalBatchFit:
    """Fit ln E(B) = a + ln(1 + x B) over all branches by least squares, with an interval for x = 1 / Bc.

    The interval is the set of x whose sum of squares exceeds the least by no more than t^2 times the variance of a
    branch. That variance is the residuals' (t with n - 2 degrees of freedom), which holds all that makes a branch
    deviate from the line by itself: validation, the luck of its path, the form of the law; or the one that resampled
    validation blocks, the same for all branches, give (normal), where that is wider. Two branches have no residuals, so
    there the interval covers the validation sequences only. One data order and one seed do not tell what the branches
    have in common.

    Args:
        curves: the branches of one snapshot.
        settle: samples after the snapshot whose losses are no targets.
        costs: what a branch costs.
        seed: of the resampling, so that the same curves give the same interval.
    """
    ordered = sorted(curves, key=lambda curve: curve.batch)
    used, reached = compare(ordered, settle)
    excluded = tuple(c.batch for c in ordered if c not in used)
    if len(used) < 2:
        return CriticalBatchFit(Interval(*(math.nan,) * 3), "no overlap", excluded=excluded)
    batches = np.array([curve.batch for curve in used], dtype=np.float64)
    log_cost = costs(reached)
    noise = _validation_variance(used, settle, costs, log_cost, seed)
    critical, least = _solve(batches, log_cost, noise)
    exponent, rival = _power_law(batches, log_cost)
    freedom = max(1, batches.size - 2)
    return CriticalBatchFit(
        critical=critical,
        outcome=_outcome(critical),
        batches=tuple(curve.batch for curve in used),
        cost=tuple(float(cost) for cost in np.exp(log_cost - log_cost[0])),
        excluded=excluded,
        spread=math.sqrt(max(least / freedom, noise)),
        validation_spread=math.sqrt(noise),
        residual=math.sqrt(least / freedom),
        exponent=exponent,
        exponent_residual=math.sqrt(rival / freedom),
    )


def _validation_variance(
    curves: Sequence[BranchCurve], settle: float, costs: Costs, log_cost: Array, seed: int
) -> float:
    """Variance of a branch's log cost about the others', over resamples of the validation blocks."""
    random = np.random.default_rng(seed)
    blocks = curves[0].losses.shape[1]
    centred = log_cost - log_cost.mean()
    deviations = []
    for _ in range(_RESAMPLES):
        drawn = np.asarray(random.integers(0, blocks, blocks), dtype=np.int64)
        used, reached = compare(curves, settle, drawn)
        if len(used) == len(curves):
            resampled = costs(reached)
            deviations.append(resampled - resampled.mean() - centred)
    finite = [row for row in deviations if bool(np.isfinite(row).all())]
    if len(finite) < _RESAMPLES // 2:  # mostly nothing left to compare: validation says nothing
        return math.inf
    return float(np.mean([row @ row for row in finite])) / (len(curves) - 1)


def _solve(batches: Array, log_cost: Array, noise: float) -> tuple[Interval, float]:
    """Bc and the least sum of squares, from [n] batches, [n] log costs, and the variance that validation explains.

    The grid is over r = ln (cost of the largest batch / cost of the smallest), which rises with x. It is 0 at x = 0,
    and ln (largest / smallest batch) at x = inf.
    """
    limit = math.log(batches[-1] / batches[0])
    grid = np.linspace(-limit, limit, _GRID)
    squares = _squares(grid, batches, log_cost)
    nearest = int(np.argmin(squares))
    around = np.linspace(grid[max(0, nearest - 1)], grid[min(_GRID - 1, nearest + 1)], _GRID)
    near = _squares(around, batches, log_cost)
    best, least = float(around[np.argmin(near)]), float(near.min())
    freedom = batches.size - 2
    residual = least / freedom if freedom else 0.0
    t = _T_975[min(freedom, len(_T_975)) - 1] if freedom else 0.0
    allowed = np.append(grid[squares - least <= max(t**2 * residual, _NORMAL_975**2 * noise)], best)
    ends = [_critical_at(r, batches) for r in (best, float(allowed.max()), float(allowed.min()))]
    return Interval(*(ends if allowed.max() > 0 else (math.inf, math.nan, math.inf))), least


def _power_law(batches: Array, log_cost: Array) -> tuple[float, float]:
    """The exponent of B that fits the costs best, and the sum of squares that it leaves."""
    sizes, costs = np.log(batches / batches.mean()), log_cost - log_cost.mean()
    sizes = sizes - sizes.mean()
    exponent = float(sizes @ costs / (sizes @ sizes))
    return exponent, float(((costs - exponent * sizes) ** 2).sum())


def _squares(grid: Array, batches: Array, log_cost: Array) -> Array:
    """[grid] sum of squared residuals at each r, the level of the costs being free."""
    ratio = np.exp(grid)
    # With x = (q - 1) / (Bn - q B1), 1 + x B is (Bn - B - q (B1 - B)) / (Bn - q B1); what all B share is free.
    lines = np.log((batches[-1] - batches) + ratio[:, None] * (batches - batches[0]))
    residuals = log_cost - lines
    return np.asarray(((residuals - residuals.mean(axis=1, keepdims=True)) ** 2).sum(axis=1))


def _critical_at(r: float, batches: Array) -> float:
    if r >= math.log(batches[-1] / batches[0]) * (1.0 - 1e-9):  # the end of the grid, where rounding leaves no 0
        return 0.0
    return critical_batch_of_two((float(batches[0]), float(batches[-1])), math.exp(r))


def _outcome(critical: Interval) -> str:
    if math.isnan(critical.low):
        return "contradicted"
    bounded_below, bounded_above = critical.low > 0, math.isfinite(critical.high)
    if bounded_below:
        return "measured" if bounded_above else "at least"
    return "at most" if bounded_above else "undetermined"
