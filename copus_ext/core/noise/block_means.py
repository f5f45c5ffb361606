"""How uncertain the running means of an autocorrelated pair are: variances over blocks of steps (batch means).

Flyvbjerg and Petersen 1989, "Error estimates on averages of correlated data". The pair is the noise scale's (N, S).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Triple = tuple[float, float, float]  # weight, weighted N, weighted S

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # steps; by spread_of_means 128 is enough for windows of 20,000 steps
_MIN_BLOCK_FREEDOM = 4.0  # with less, a variance over blocks is worth less than one over single steps


class Spread(NamedTuple):
    """How uncertain the two averages are: covariance matrix, its degrees of freedom, their worth in steps."""

    var_n: float
    var_s: float
    cov: float
    freedom: float
    n_eff: float

    def plus(self, other: Spread) -> Spread:
        """Of the sum of two independent pairs of averages; freedom after Welch 1947, the lower one of N's and S's."""
        return Spread(
            self.var_n + other.var_n,
            self.var_s + other.var_s,
            self.cov + other.cov,
            min(_welch(self, other, self.var_n, other.var_n), _welch(self, other, self.var_s, other.var_s)),
            min(self.n_eff, other.n_eff),
        )


def _welch(one: Spread, other: Spread, variance: float, other_variance: float) -> float:
    """Degrees of freedom of a sum of two estimated variances."""
    if variance + other_variance <= 0:
        return min(one.freedom, other.freedom)
    share = variance / (variance + other_variance)
    return 1.0 / (share**2 / one.freedom + (1.0 - share) ** 2 / other.freedom)


@dataclass(frozen=True)
class BlockLevel:
    """Second moments of blocks of ``size`` consecutive steps; a block is (weight W, weighted N, weighted S)."""

    size: int
    block: Triple = (0.0, 0.0, 0.0)  # the one being filled
    filled: int = 0
    moments: tuple[float, ...] = (0.0,) * 6  # sums over finished blocks: WW, WN, WS, NN, NS, SS
    fourth: float = 0.0  # sum of W^4 over finished blocks

    def add(self, step: Triple, decay: float) -> BlockLevel:
        """Older steps lose weight by the factor ``decay``, and ``step`` joins the block being filled."""
        square = decay**2
        ww, wn, ws, nn, ns, ss = self.moments
        aged = BlockLevel(  # said in full: dataclasses.replace would be most of the time of an update
            self.size,
            aged_sum(self.block, step, decay),
            self.filled + 1,
            (square * ww, square * wn, square * ws, square * nn, square * ns, square * ss),
            decay**4 * self.fourth,
        )
        return aged.closed() if aged.filled == self.size else aged

    def closed(self) -> BlockLevel:
        """The same level with the block being filled, whole or not, among the finished ones."""
        w, n, s = self.block
        ww, wn, ws, nn, ns, ss = self.moments
        moments = (ww + w * w, wn + w * n, ws + w * s, nn + n * n, ns + n * s, ss + s * s)
        return BlockLevel(self.size, moments=moments, fourth=self.fourth + w**4)

    def freedom(self) -> float:
        """Degrees of freedom of a variance over the finished blocks (Satterthwaite 1946)."""
        return self.moments[0] ** 2 / self.fourth - 1.0

    def spread(self, total: Triple) -> Spread:
        """Covariance of the weighted means, from how far the finished blocks lie from them.

        Blocks count by their squared weights, so steps of different precision (other batches, other numbers of groups)
        need no common variance. ``n_eff`` is Kish's.
        """
        weight, mean_n, mean_s = total[0], total[1] / total[0], total[2] / total[0]
        ww, wn, ws, nn, ns, ss = self.moments
        scale = weight**2 - ww  # not weight^2: the means were fitted to the same blocks
        return Spread(
            var_n=max(0.0, nn - 2 * mean_n * wn + mean_n**2 * ww) / scale,
            var_s=max(0.0, ss - 2 * mean_s * ws + mean_s**2 * ww) / scale,
            cov=(ns - mean_n * ws - mean_s * wn + mean_n * mean_s * ww) / scale,
            freedom=self.freedom(),
            n_eff=weight**2 / ww,
        )


def aged_sum(old: Triple, step: Triple, decay: float) -> Triple:
    """The running sums with ``step`` added, older steps having lost weight by the factor ``decay``."""
    return decay * old[0] + step[0], decay * old[1] + step[1], decay * old[2] + step[2]


def spread_of_means(levels: Sequence[BlockLevel], total: Triple) -> Spread:
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


def _inflation(blocks: Spread, steps: Spread) -> float:
    """How much larger the variance is over blocks than over steps: the autocorrelation time of N."""
    return blocks.var_n / steps.var_n if steps.var_n > 0 else 1.0
