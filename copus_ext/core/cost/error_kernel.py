"""How wrong the closed form of the step time may be, and which plans it is wrong about alike.

The logarithm of measured / predicted step time is taken as a Gaussian process over plans with four parts: what all
plans have in common (the machine is faster than thought); what goes with the share of the step that each component
takes (its links are slower than thought: to first order ln t moves by share x ln multiplier); what changes slowly
with the plan; and a deviation of its own that a layout has with a micro-batch, at any global batch, and no other plan
shares. Plans that resemble each other err alike, so the ratio of two is known better than either.

On top comes what the machine drifts by as time goes on, which all plans share: an Ornstein-Uhlenbeck process. How large
drift and own deviations are differs from machine to machine, and is told by the measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.cost.plan_table import PlanTable
from copus_ext.core.cost.step_time import StepTimeParts

Array = NDArray[np.float64]

# Times what may be expected; each doubling is a standard deviation.
_DRIFT_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_OWN_FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True)
class Features:
    """What n plans are compared by.

    [n, parts] shares of the predicted step time, [n, 10] coordinates of the plan, and [n, 10] the numbers of its layout
    and micro-batch, which tell whose own deviation it has.
    """

    shares: Array
    coordinates: Array
    owner: Array

    @classmethod
    def of(cls, table: PlanTable, parts: StepTimeParts) -> Features:
        """Of n plans and their predicted step times."""
        sizes = (
            table.tp,
            table.pp,
            table.micro_batch,
            table.num_microbatches,
            table.dp * table.cp,
            table.vpp,
            table.ep,
        )
        choices = (table.recompute, table.distributed_optimizer, table.sequence_parallel)
        coordinates = np.stack([*(np.log2(size) for size in sizes), *(1.0 * choice for choice in choices)], axis=1)
        total = parts.total
        shares = np.stack([part / total for part in parts.columns()], axis=1)
        *owner, _ = table.columns()  # all but the global batch
        return cls(shares, coordinates, np.stack([1.0 * column for column in owner], axis=1))

    def take(self, rows: slice | NDArray[np.int64]) -> Features:
        """Some of the plans."""
        return Features(self.shares[rows], self.coordinates[rows], self.owner[rows])

    def own_deviation(self, others: Features) -> NDArray[np.bool_]:
        """[n, m] whether a plan shares its own deviation with one of m others: their layout and micro-batch are one."""
        by_number = zip(self.owner.T, others.owner.T, strict=True)
        return functools.reduce(np.logical_and, (np.equal.outer(mine, theirs) for mine, theirs in by_number))


@dataclass(frozen=True)
class ErrorKernel:
    """Standard deviations of ln(measured / predicted), and how far apart plans have to be to err independently.

    ``lengths`` count doublings of tp, pp, micro-batch, micro-batches, dp x cp, vpp and ep, then steps of recompute,
    distributed optimizer and sequence parallel. ``part_sd``, ``plan_sd`` and the first six were chosen, among some
    thirty combinations, by the errors that remain when three published sweeps are replayed; they hardly change near the
    best (``tools/replay_sweeps.py``). The others do not vary there, and are by hand, as is ``common_sd``.

    ``own_sd`` is the least own deviation, and the likeliest beforehand; up to 16 times that is tried. ``drift_sd`` is
    the median of what may be expected, ``drift_s`` the seconds in which a drift falls to 1/e. ``visit_sd`` is what
    visits to one plan differ by however long they are.
    """

    common_sd: float = 1.0  # wide: the figures of a machine may be off by a factor of three
    part_sd: float = 0.3  # of the logarithm of a component's multiplier
    plan_sd: float = 0.2
    lengths: tuple[float, ...] = (1.5, 2.5, 2.0, 6.0, 6.0, 2.0, 1.0, 1.0, 1.0, 1.0)
    own_sd: float = 0.01
    drift_sd: float = 0.02
    drift_s: float = 1000.0
    visit_sd: float = 0.01

    def between(self, left: Features, right: Features) -> Array:
        """[n, m] covariance of the log errors of n plans with those of m others, before any measurement.

        Without drift and own deviations.
        """
        parts = self.part_sd**2 * left.shares @ right.shares.T
        alike = likeness(left.coordinates, right.coordinates, self.lengths)
        return self.common_sd**2 + parts + self.plan_sd**2 * alike

    def variance(self, features: Features) -> Array:
        """[n] diagonal of :meth:`between`."""
        return self.common_sd**2 + self.part_sd**2 * np.sum(features.shares**2, axis=1) + self.plan_sd**2

    def persistence(self, left: Array, right: Array) -> Array:
        """[n, m] correlation of the drift at n times [s] with that at m others."""
        return np.asarray(np.exp(-np.abs(np.subtract.outer(left, right)) / self.drift_s))

    def likeliest_sizes(
        self, shared: Array, own: NDArray[np.bool_], times: Array, residual: Array
    ) -> tuple[float, float]:
        """Standard deviations of own deviations and of drift, each among a few, of highest posterior probability.

        Rasmussen and Williams 2006, eq. 5.8, with log-normal priors. The own deviations come first: otherwise odd
        layouts would pass for a drift of the machine.

        Args:
            shared: [n, n] covariance of n measurements without either.
            own: [n, n] which measurements have the same own deviation.
            times: [n] when they were made [s].
            residual: [n] logarithms of measured / closed form.

        Returns:
            ``own_sd`` and ``drift_sd``.
        """
        persistence = self.persistence(times, times)

        def cost(own_factor: float, drift_factor: float) -> float:
            apart = (own_factor * self.own_sd) ** 2 * own + (drift_factor * self.drift_sd) ** 2 * persistence
            lower = np.linalg.cholesky(shared + apart)
            white = np.linalg.solve(lower, residual)
            unexpected = 0.5 * (np.log2(own_factor) ** 2 + np.log2(drift_factor) ** 2)
            return float(0.5 * white @ white + np.sum(np.log(np.diag(lower))) + unexpected)

        own_factor = min(_OWN_FACTORS, key=lambda factor: cost(factor, 1.0))
        drift_factor = min(_DRIFT_FACTORS, key=lambda factor: cost(own_factor, factor))
        return own_factor * self.own_sd, drift_factor * self.drift_sd


def likeness(left: Array, right: Array, lengths: Sequence[float]) -> Array:
    """[n, m] squared exponential of the distance of [n, k] coordinates from [m, k] others, in ``lengths``."""
    a, b = left / np.array(lengths), right / np.array(lengths)
    square = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None, :] - 2.0 * a @ b.T
    return np.asarray(np.exp(-0.5 * np.maximum(square, 0.0)))


def explain(within: Array, across: Array, residual: Array) -> tuple[Array, Array]:
    """What n values of a Gaussian process say of m others (Rasmussen and Williams 2006, eq. 2.23 and 2.24).

    Args:
        within: [n, n] covariance of the n, noise included.
        across: [n, m] with the others.
        residual: [n] what the values are off by.

    Returns:
        [m] expected offset of the others, and [n, m] columns whose products are what is taken from their covariance.
    """
    factor = np.linalg.cholesky(within)
    explained = np.linalg.solve(factor, across)
    return explained.T @ np.linalg.solve(factor, residual), explained
