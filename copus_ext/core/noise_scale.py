"""Gradient noise scale: two unbiased numbers a step, smoothed apart, and an honest interval for their ratio.

The simple noise scale of McCandlish et al. 2018 ("An Empirical Model of Large-Batch Training", arXiv 1812.06162, eq.
2.9) is tr(Sigma) / |G|^2, in sequences: Sigma is the covariance of one sequence's gradient, G the true gradient. A
step gives ``S`` for tr(Sigma) and ``N`` for |G|^2. Both are unbiased and noisy, and N may well come out negative; a
mean of their ratios is off by a factor (it has no expectation), so the two are averaged first and divided last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Triple = tuple[float, float, float]

_BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # steps; by _spread_of_means 128 is enough for windows of 20,000 steps
_MIN_FREEDOM = 1.9  # three steps of like weight; fewer say next to nothing about their own spread
_MIN_BLOCK_FREEDOM = 4.0  # with less, a variance over blocks is worth less than one over single steps


class StepEstimate(NamedTuple):
    """Of one step: ``N`` estimates |G|^2, ``S`` estimates tr(Sigma) of a single sequence. Either may be negative."""

    N: float
    S: float


class NoiseEstimate(NamedTuple):
    """The smoothed noise scale, in sequences, with its 95 % interval.

    ``value`` is ``inf`` when N is not positive, ``high`` is ``inf`` when N cannot be told from 0; ``low`` and ``high``
    are ``nan`` before three steps of like weight. ``n_eff`` is how many independent steps the averages are worth.
    """

    value: float
    low: float
    high: float
    N: float
    S: float
    n_eff: float


def step_estimate(group_square_norms: ArrayLike, group_batches: ArrayLike, mean_square_norm: float) -> StepEstimate:
    """N and S of one step from n independent groups (McCandlish et al. 2018, appendix A.1, for unequal groups).

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


class _Spread(NamedTuple):
    """How uncertain the two averages are: covariance matrix, its degrees of freedom, their worth in steps."""

    var_n: float
    var_s: float
    cov: float
    freedom: float
    n_eff: float


@dataclass(frozen=True)
class _BlockLevel:
    """Second moments of blocks of ``size`` consecutive steps; a block is (weight W, weighted N, weighted S)."""

    size: int
    block: Triple = (0.0, 0.0, 0.0)  # the one being filled
    filled: int = 0
    moments: tuple[float, ...] = (0.0,) * 6  # sums over finished blocks: WW, WN, WS, NN, NS, SS
    fourth: float = 0.0  # sum of W^4 over finished blocks

    def add(self, step: Triple, decay: float) -> _BlockLevel:
        """Older steps lose weight by the factor ``decay``, and ``step`` joins the block being filled."""
        aged = replace(
            self,
            block=_aged_sum(self.block, step, decay),
            filled=self.filled + 1,
            moments=tuple(decay**2 * moment for moment in self.moments),
            fourth=decay**4 * self.fourth,
        )
        return aged.closed() if aged.filled == self.size else aged

    def closed(self) -> _BlockLevel:
        """The same level with the block being filled, whole or not, among the finished ones."""
        moments = tuple(old + new for old, new in zip(self.moments, _products(self.block), strict=True))
        return _BlockLevel(self.size, moments=moments, fourth=self.fourth + self.block[0] ** 4)

    def freedom(self) -> float:
        """Degrees of freedom of a variance over the finished blocks (Satterthwaite 1946)."""
        return self.moments[0] ** 2 / self.fourth - 1.0

    def spread(self, total: Triple) -> _Spread:
        """Covariance of the weighted means, from how far the finished blocks lie from them.

        Blocks count by their squared weights, so steps of different precision (other batches, other numbers of groups)
        need no common variance. ``n_eff`` is Kish's.
        """
        weight, mean_n, mean_s = total[0], total[1] / total[0], total[2] / total[0]
        ww, wn, ws, nn, ns, ss = self.moments
        scale = weight**2 - ww  # not weight^2: the means were fitted to the same blocks
        return _Spread(
            var_n=max(0.0, nn - 2 * mean_n * wn + mean_n**2 * ww) / scale,
            var_s=max(0.0, ss - 2 * mean_s * ws + mean_s**2 * ww) / scale,
            cov=(ns - mean_n * ws - mean_s * wn + mean_n * mean_s * ww) / scale,
            freedom=self.freedom(),
            n_eff=weight**2 / ww,
        )


@dataclass(frozen=True)
class NoiseScaleEstimator:
    """Running averages of N and S with what their interval needs. A value: :meth:`update` returns the next one.

    A step counts by its batch (in sequences), and loses half of its weight every ``half_life_tokens`` tokens: every
    token counts alike, however the steps are cut. Var N falls as 1/B where B exceeds the noise scale (there this weight
    is the best one) and as 1/B^2 below it; going further would need the very ratio that is being estimated. Weights
    that do not look at N and S keep both averages unbiased.

    Autocorrelation is met by batch means (Flyvbjerg and Petersen 1989): the variance is taken over blocks of steps, at
    the block length that :func:`_spread_of_means` finds long enough. Non-finite steps are counted in ``skipped`` only.
    """

    half_life_tokens: float
    steps: int = 0
    skipped: int = 0
    total: Triple = (0.0, 0.0, 0.0)  # weight, weighted N, weighted S
    levels: tuple[_BlockLevel, ...] = tuple(_BlockLevel(size) for size in _BLOCK_SIZES)

    def __post_init__(self) -> None:
        if not self.half_life_tokens > 0:
            raise ValueError(f"the half-life must be a positive number of tokens, not {self.half_life_tokens}")

    def update(self, N: float, S: float, tokens: float, batch: float) -> NoiseScaleEstimator:
        """The estimator after a step of ``batch`` (> 0) sequences, ``tokens`` tokens, gave N and S."""
        if not (math.isfinite(N) and math.isfinite(S)):
            return replace(self, skipped=self.skipped + 1)
        decay = 2.0 ** (-tokens / self.half_life_tokens)
        step = (batch, batch * N, batch * S)
        return replace(
            self,
            steps=self.steps + 1,
            total=_aged_sum(self.total, step, decay),
            levels=tuple(level.add(step, decay) for level in self.levels),
        )

    def estimate(self) -> NoiseEstimate:
        """The noise scale as known now; all ``nan`` before the first step."""
        if self.steps == 0:
            return NoiseEstimate(*(math.nan,) * 5, n_eff=0.0)
        mean_n, mean_s = self.total[1] / self.total[0], self.total[2] / self.total[0]
        value = mean_s / mean_n if mean_n > 0 else math.inf
        if self.levels[0].freedom() < _MIN_FREEDOM:
            return NoiseEstimate(value, math.nan, math.nan, mean_n, mean_s, n_eff=1.0)
        spread = _spread_of_means(self.levels, self.total)
        low, high = _fieller(mean_n, mean_s, spread)
        return NoiseEstimate(value, low, high, mean_n, mean_s, spread.n_eff)

    def to_json(self) -> dict[str, Any]:
        """Plain values; through ``json`` and :meth:`from_json` they come back to the last bit (floats by ``repr``)."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> NoiseScaleEstimator:
        """Inverse of :meth:`to_json`."""
        levels = tuple(
            _BlockLevel(**{**level, "block": tuple(level["block"]), "moments": tuple(level["moments"])})
            for level in values["levels"]
        )
        return NoiseScaleEstimator(**{**values, "total": tuple(values["total"]), "levels": levels})


def _aged_sum(old: Triple, step: Triple, decay: float) -> Triple:
    return decay * old[0] + step[0], decay * old[1] + step[1], decay * old[2] + step[2]


def _products(block: Triple) -> tuple[float, ...]:
    weight, n, s = block
    return weight * weight, weight * n, weight * s, n * n, n * s, s * s


def _spread_of_means(levels: Sequence[_BlockLevel], total: Triple) -> _Spread:
    """The spread at the shortest block length b with b^3 > 2 n tau^2: the balance of bias and noise in it.

    n steps, tau = variance over blocks / variance over steps (Lee et al. 2011, "Strategies for improving the efficiency
    of quantum Monte Carlo calculations"). A run too short for that gets its longest blocks that are not too few.
    """
    steps = chosen = levels[0].spread(total)
    for level in levels[1:]:
        if (level.size // 2) ** 3 > 2 * steps.n_eff * _inflation(chosen, steps) ** 2:
            break
        finished = level.closed()
        if finished.freedom() < _MIN_BLOCK_FREEDOM:
            break
        chosen = finished.spread(total)
    return chosen._replace(n_eff=steps.n_eff / max(1.0, _inflation(chosen, steps)))


def _inflation(blocks: _Spread, steps: _Spread) -> float:
    """How much larger the variance is over blocks than over steps: the autocorrelation time of N."""
    return blocks.var_n / steps.var_n if steps.var_n > 0 else 1.0


def _fieller(mean_n: float, mean_s: float, spread: _Spread) -> tuple[float, float]:
    """95 % interval of S / N: every ratio r >= 0 at which S - r N is within t standard errors of 0 (Fieller 1954).

    The ends solve a r^2 - 2 b r + c = 0. With a <= 0, N cannot be told from 0 and the upper end is open. A negative N
    (|G|^2 is not) bounds the ratio as N = 0 does.
    """
    t = t_quantile_975(spread.freedom)
    positive_n = max(mean_n, 0.0)
    a = positive_n**2 - t**2 * spread.var_n
    b = positive_n * mean_s - t**2 * spread.cov
    c = mean_s**2 - t**2 * spread.var_s
    discriminant = b * b - a * c
    if a > 0:
        root = math.sqrt(max(0.0, discriminant))
        return max(0.0, (b - root) / a), max(0.0, (b + root) / a)
    if c <= 0:  # a ratio of 0 is within the error
        return 0.0, math.inf
    denominator = b + math.sqrt(discriminant)  # of the positive root, in the form that also holds for a = 0
    return (c / denominator if denominator > 0 else math.inf), math.inf


def t_quantile_975(freedom: float) -> float:
    """97.5 % point of Student's t (Abramowitz and Stegun 26.7.5); within 0.8 % from 2 degrees of freedom up."""
    z = 1.959963984540054
    inverse = 1.0 / max(2.0, freedom)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + inverse * (g1 + inverse * (g2 + inverse * (g3 + inverse * g4)))
