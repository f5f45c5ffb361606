"""What the gradients of one step say: an unbiased N for |G|^2 and S for tr(Sigma), and how much they scatter."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class StepEstimate(NamedTuple):
    """Of one step: ``N`` estimates |G|^2, ``S`` estimates tr(Sigma) of a single sequence. N may well be negative.

    ``P`` estimates the variance of a sequence's inner product with the step's mean gradient; ``nan`` where it was not
    measured. A sketched one may be negative, too.
    """

    N: float
    S: float
    P: float = math.nan


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


def inner_product_variance(inner_products: ArrayLike, group_batch: float) -> float:
    """P, the variance over single sequences i of <g_i, g_B>, from a step's n groups of equally many sequences.

    Bollapragada, Byrd and Nocedal 2018 ("Adaptive sampling strategies for stochastic optimization", arXiv 1710.11258,
    section 2) hold P / B against theta^2 |g_B|^4, and so does AdAdaGrad (Lau, Liu and Kolar 2024, arXiv 2402.11215).
    With a_j = <x_j, g_B> of the groups' mean gradients x_j, whose mean is |g_B|^2,

        P = b / (n - 1) sum_j (a_j - |g_B|^2)^2        for groups of b sequences

    Over the ways to deal B sequences to the groups it has the sample variance of the B inner products as its mean.

    Inner products that were measured in D independent draws, each unbiased for a_j, have errors whose squares would
    add up in P. So the square is replaced by the mean product of two different draws, in which errors cancel on
    average. Where Gaussian errors rule, it scatters 1 / sqrt(D (D - 1)) as much as one draw's square.

    Args:
        inner_products: [n] where they are exact, or [D, n]: those of each draw.
        group_batch: b, sequences in a group.

    Returns:
        P; from several draws it may be negative. ``nan`` where an inner product is not finite.

    Raises:
        ValueError: fewer than two groups, or groups without sequences.
    """
    products = np.atleast_2d(np.asarray(inner_products, dtype=np.float64))
    draws, groups = products.shape
    if groups < 2 or not group_batch > 0:
        raise ValueError(f"P needs at least two groups, each with sequences, not {groups} of {group_batch}")
    if not bool(np.isfinite(products).all()):
        return math.nan
    spread = products - products.mean(axis=1, keepdims=True)
    square = float((spread.sum(axis=0) ** 2).sum())
    if draws > 1:
        square = (square - float((spread**2).sum())) / (draws * (draws - 1))
    return float(group_batch * square / (groups - 1))


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
