"""How wrong the closed form of the step time may be, and which plans it is wrong about alike.

The logarithm of measured / predicted step time is taken as a Gaussian process over plans with three parts: what all
plans have in common (the machine is faster than thought); what goes with the share of the step that each component
takes (its links are slower than thought: to first order ln t moves by share x ln multiplier); and what changes slowly
with the plan itself. Plans that resemble each other err alike, so the ratio of two is known better than either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.cost.plan_table import PlanTable
from copus_ext.core.cost.step_time import StepTimeParts

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Features:
    """What plans are compared by: [n, parts] shares of the predicted step time, [n, 10] coordinates of the plan."""

    shares: Array
    coordinates: Array

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
        return cls(np.stack([part / total for part in parts.columns()], axis=1), coordinates)

    def take(self, rows: slice | NDArray[np.int64]) -> Features:
        """Some of the plans."""
        return Features(self.shares[rows], self.coordinates[rows])


@dataclass(frozen=True)
class ErrorKernel:
    """Standard deviations of ln(measured / predicted), and how far apart plans have to be to err independently.

    ``lengths`` count doublings of tp, pp, micro-batch, micro-batches, dp x cp, vpp and ep, then steps of recompute,
    distributed optimizer and sequence parallel. ``part_sd``, ``plan_sd`` and the first six were chosen, among some
    thirty combinations, by the errors that remain when three published sweeps are replayed; they hardly change near the
    best (``tools/replay_sweeps.py``). The others do not vary there, and are by hand, as is ``common_sd``.
    """

    common_sd: float = 1.0  # wide: the figures of a machine may be off by a factor of three
    part_sd: float = 0.3  # of the logarithm of a component's multiplier
    plan_sd: float = 0.2
    lengths: tuple[float, ...] = (1.5, 2.5, 2.0, 6.0, 6.0, 2.0, 1.0, 1.0, 1.0, 1.0)

    def between(self, left: Features, right: Features) -> Array:
        """[n, m] covariance of the log errors of n plans with those of m others, before any measurement."""
        parts = self.part_sd**2 * left.shares @ right.shares.T
        alike = likeness(left.coordinates, right.coordinates, self.lengths)
        return self.common_sd**2 + parts + self.plan_sd**2 * alike

    def variance(self, features: Features) -> Array:
        """[n] diagonal of :meth:`between`."""
        return self.common_sd**2 + self.part_sd**2 * np.sum(features.shares**2, axis=1) + self.plan_sd**2


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
