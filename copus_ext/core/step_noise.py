"""What the gradients of one step say: an unbiased N for |G|^2 and S for tr(Sigma), and how much they scatter."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class StepEstimate(NamedTuple):
    """Of one step: ``N`` estimates |G|^2, ``S`` estimates tr(Sigma) of a single sequence. N may well be negative."""

    N: float
    S: float


def step_estimate(group_square_norms: ArrayLike, group_batches: ArrayLike, mean_square_norm: float) -> StepEstimate:
    """N and S of one step from n independent groups (McCandlish et al. 2018, appendix A.1, for unequal groups).

    With w_j the groups' shares of the batch B, v = sum w_j^2 and Q the squared norm of the mean, they satisfy
    ``(1 - v) N + (sum_j w_j^2 |x_j|^2) = Q`` and ``(n - 1) S / B + Q = sum_j w_j |x_j|^2`` exactly. ``N + S / B = Q``
    holds exactly for equal groups; for unequal ones what is left of it has expectation 0.

    Args:
        group_square_norms: [n] squared norm of each group's mean gradient.
        group_batches: [n] sequences in each group.
        mean_square_norm: squared norm of the mean gradient over all sequences of the step.

    Returns:
        Unbiased estimates; not finite where an input is not.

    Raises:
        ValueError: fewer than two groups, a group without sequences, or lengths that differ.
    """
    square_norms = np.asarray(group_square_norms, dtype=np.float64)
    batch, weights = _group_weights(group_batches)
    if square_norms.shape != weights.shape:
        raise ValueError(f"{square_norms.size} square norms for {weights.size} groups")
    signal = mean_square_norm - float(weights**2 @ square_norms)
    spread = float(weights @ square_norms) - mean_square_norm
    return StepEstimate(N=signal / (1.0 - float(weights @ weights)), S=batch * spread / (weights.size - 1))


def step_variance(signal: float, trace_square: float, group_batches: ArrayLike) -> tuple[float, float]:
    """Var N and Var S of :func:`step_estimate` for Gaussian gradients.

    With x_j = G + e_j, Cov e_j = Sigma / B_j and w_j = B_j / B, N is a quadratic form in the e_j without its diagonal,
    and (n - 1) S has the moments of a Wishart trace with n - 1 degrees of freedom, whatever the sizes of the groups.
    Equal groups give Var N = 4 G'Sigma G / B + 2 tr(Sigma^2) / B^2 * n / (n - 1), Var S = 2 tr(Sigma^2) / (n - 1).

    Args:
        signal: G' Sigma G.
        trace_square: tr(Sigma^2).
        group_batches: [n] sequences in each group.

    Raises:
        ValueError: fewer than two groups, or a group without sequences.
    """
    batch, weights = _group_weights(group_batches)
    distinct = 1.0 - float(weights @ weights)
    linear = 4.0 * signal / batch * float(weights @ (1.0 - weights) ** 2) / distinct**2
    quadratic = 2.0 * trace_square / (batch**2 * distinct)
    return linear + quadratic, 2.0 * trace_square / (weights.size - 1)


def _group_weights(group_batches: ArrayLike) -> tuple[float, np.ndarray]:
    """The whole batch, and each group's share of it."""
    batches = np.asarray(group_batches, dtype=np.float64)
    if batches.ndim != 1 or batches.size < 2 or not bool((batches > 0).all()):
        raise ValueError(f"the noise scale needs at least two groups, each with sequences, not {batches}")
    batch = float(batches.sum())
    return batch, batches / batch
