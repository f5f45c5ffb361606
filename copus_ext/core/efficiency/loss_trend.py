"""What a sequence is worth after a change of the global batch against before it, from the run's own training losses.

A free observation of the statistical efficiency, and a weak one. While the batch stays, the loss is taken to fall as
L + a E^-BETA with the samples E consumed, where ``a`` goes as SE(B): the faster, the more a sequence is worth. So a
line through the losses over E^-BETA on either side of the change gives SE(B2) / SE(B1) = a2 / a1. This is the ratio of
the slopes -d loss / d E with the correction (1 + BETA) ln (E2 / E1) for what slopes lose as training goes on; made at
each step instead of at the middles, it also holds for long stretches.

**Stretches.** The slope of a stretch of T samples has an error that falls as T^-3/2, whatever the batch. Before the
change counts what ran at the previous batch, back to half of the samples at the change (what is further back depends on
BETA more than on the batch). After it, at most as long a stretch in the logarithm of the samples: about the same
relative error, as slopes fall. Less where the error before the change says that less is enough to bring it below half
of SYSTEMATIC, beyond which waiting wins little; but at least a quarter of the stretch before, for what recovers slowly.
And no more than there is when the next change comes. At least 16 steps each. These lengths are set before the first
loss after the change: to stop once its slope is well known would stop sooner where chance made it steep. The first 10
steps after a change are left out: Adam's momentum (0.9) remembers as many, and the learning rate has jumped.

**Error.** From the residuals, each side with a variance of its own, by the delta method. Residuals that resemble their
neighbours widen it as AR(1) does, with the lag-1 autocorrelation taken one standard error higher than it was found.
BETA's uncertainty is in it. On top comes SYSTEMATIC, for what no loss of the same run can tell: the learning rate
changes with the batch, warm-up and decay bend the curve, and the data change. It is a guess.

**Selection.** Where a slope is not positive by two standard errors its logarithm means nothing, and there is no
observation. So a slope that is hardly seen is used only where chance made it steep. But such a slope brings close to
0.5 into log_sd, more than ln c moves the ratio by per unit even at four times the batch (1/3), so what this bias can do
to c is little; ``tests/unit/test_loss_trend.py`` counts how often the interval of c holds the truth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

BETA = 0.3  # Hoffmann et al. 2022 (arXiv 2203.15556, appendix D.3) fit 0.28 for the data of language models
BETA_SD = 0.2  # between models, and for a loss that is not at the end of its schedule; a guess
SYSTEMATIC = 0.3
UNSETTLED_STEPS = 10
LEAST_STEPS = 16

_MOST_POINTS = 256  # even: when they are full, neighbours are merged in pairs
_REACH = 0.5  # of the samples at the change: how far back the stretch before it goes
_LEAST_SHARE = 0.25  # of the stretch before: the one after it is at least so long
_LEAST_SIGMA = 2.0
_MOST_AUTOCORRELATION = 0.9


class SlopeRatio(NamedTuple):
    """ln (SE(``batch_to``) / SE(``batch_from``)), its standard error, and the batches in sequences."""

    batch_from: int
    batch_to: int
    log_ratio: float
    log_sd: float


class Point(NamedTuple):
    """Mean of ``steps`` neighbouring steps: samples consumed before the step (sequences), and its loss (nats)."""

    steps: int
    position: float
    loss: float


@dataclass(frozen=True)
class Stretch:
    """Losses at one batch, in at most 256 points of ``group`` steps each; the last one may have fewer."""

    batch: int = 0
    steps: int = 0
    group: int = 1
    points: tuple[Point, ...] = ()

    @property
    def samples(self) -> int:
        """Sequences in its steps."""
        return self.steps * self.batch

    def add(self, loss: float, batch: int, position: float) -> Stretch:
        """With one more step."""
        points, group, steps = self.points, self.group, self.steps + 1
        if points and points[-1].steps < group:
            return Stretch(batch, steps, group, (*points[:-1], _merged(points[-1], Point(1, position, loss))))
        if len(points) == _MOST_POINTS:
            points, group = tuple(map(_merged, points[::2], points[1::2])), 2 * group
        return Stretch(batch, steps, group, (*points, Point(1, position, loss)))

    def since(self, position: float) -> Stretch:
        """What of it lies after so many samples."""
        points = tuple(point for point in self.points if point.position > position)
        return replace(self, steps=sum(point.steps for point in points), points=points)


@dataclass(frozen=True)
class LossTrend:
    """The losses since the last change of the batch, and those before it. A value: methods return the next one.

    Tell it of every step by :meth:`step`, and of a change of the global batch by :meth:`batch_changed`. After either,
    :meth:`observation` may have something to say, once.

    Attributes:
        unsettled: steps that are still to be left out.
        current: the stretch that is running.
        before: the one at the previous batch, until the two have been compared.
        length: how long the running one has to be for that, in sequences.
        compared: the two stretches whose ratio is told now.
    """

    unsettled: int = 0
    current: Stretch = field(default_factory=Stretch)
    before: Stretch | None = None
    length: float = 0.0
    compared: tuple[Stretch, Stretch] | None = None

    def step(self, loss: float | None, batch: int, consumed_samples: int) -> LossTrend:
        """After a step of ``batch`` sequences, with which ``consumed_samples`` were consumed.

        A loss that is None or not finite says nothing. It is that of the weights before the step.
        """
        if loss is None or not math.isfinite(loss):
            return self if self.compared is None else replace(self, compared=None)
        if self.unsettled > 0:
            return LossTrend(self.unsettled - 1, self.current, self.before, self.length)
        current = self.current.add(float(loss), batch, float(consumed_samples - batch))
        before = self.before
        if before is not None and current.samples >= self.length and current.steps >= LEAST_STEPS:
            return LossTrend(0, current, None, 0.0, (before, current))
        return LossTrend(0, current, before, self.length)

    def batch_changed(self) -> LossTrend:
        """After the global batch changed, before its first step.

        What ran until now is what comes before. It is compared with what came before it, if that has not been done. A
        stretch that is too short for it is passed over.
        """
        current, before = self.current, self.before
        if current.steps < LEAST_STEPS:
            return LossTrend(UNSETTLED_STEPS, Stretch(), before, self.length)
        compared = None if before is None else (before, current)
        frozen = current.since(_REACH * current.points[-1].position)
        if frozen.steps < LEAST_STEPS:
            return LossTrend(UNSETTLED_STEPS, compared=compared)
        return LossTrend(UNSETTLED_STEPS, Stretch(), frozen, _length_after(frozen), compared)

    def observation(self) -> SlopeRatio | None:
        """What a sequence is worth after the change against before it, if the last call completed that."""
        if self.compared is None:
            return None
        one, other = (_slope(stretch) for stretch in self.compared)
        if min(one.value - _LEAST_SIGMA * one.error, other.value - _LEAST_SIGMA * other.error) <= 0.0:
            return None
        log_ratio = math.log(other.value / one.value)
        exponent = BETA_SD * math.log(other.position / one.position)
        log_sd = math.hypot(one.error / one.value, other.error / other.value, exponent, SYSTEMATIC)
        return SlopeRatio(self.compared[0].batch, self.compared[1].batch, log_ratio, log_sd)

    def to_json(self) -> dict[str, Any]:
        """Plain values; through ``json`` and :meth:`from_json` they come back to the last bit."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> LossTrend:
        """Inverse of :meth:`to_json`."""
        before, compared = values["before"], values["compared"]
        return LossTrend(
            values["unsettled"],
            _stretch(values["current"]),
            None if before is None else _stretch(before),
            values["length"],
            None if compared is None else (_stretch(compared[0]), _stretch(compared[1])),
        )


class _Slope(NamedTuple):
    """a of L + a E^-BETA, its standard error, and where the stretch has its middle, in sequences."""

    value: float
    error: float
    position: float


def _slope(stretch: Stretch) -> _Slope:
    """Least squares, each point weighted by its sequences: the variance of a loss falls as 1 / batch."""
    steps, positions, losses = np.array(stretch.points, dtype=np.float64).T
    weights = steps * stretch.batch
    middle = float(weights @ positions / weights.sum())
    x = (positions / middle) ** -BETA
    x = x - weights @ x / weights.sum()
    square = float(weights @ x**2)
    value = float(weights @ (x * losses)) / square
    residuals = losses - weights @ losses / weights.sum() - value * x
    variance = float(weights @ residuals**2) / (positions.size - 2) * _widening(np.sqrt(weights) * residuals)
    scale = middle**BETA  # x is in units of the middle's
    return _Slope(value * scale, math.sqrt(variance / square) * scale, middle)


def _length_after(before: Stretch) -> float:
    """Sequences in the stretch after a change that are enough: see the head of the module.

    Relative errors go as length^-3/2. Twice the length that would do at the slope before, as the next one is flatter.
    """
    slope, end = _slope(before), before.points[-1].position
    longest = end * (end / before.points[0].position - 1.0)
    if slope.value <= 0.0:
        return longest
    share = 2.0 * math.cbrt(slope.error / slope.value / (SYSTEMATIC / 2.0)) ** 2
    return min(longest, before.samples * max(share, _LEAST_SHARE))


def _widening(residuals: Vector) -> float:
    """How much larger the variance of a slope is for AR(1) residuals than for independent ones, in long stretches."""
    square = float(residuals @ residuals)
    found = float(residuals[1:] @ residuals[:-1]) / square if square > 0 else 0.0
    taken = min(max(found + 1.0 / math.sqrt(residuals.size), 0.0), _MOST_AUTOCORRELATION)
    return (1.0 + taken) / (1.0 - taken)


def _merged(one: Point, other: Point) -> Point:
    steps = one.steps + other.steps
    share = other.steps / steps
    return Point(
        steps,
        one.position + share * (other.position - one.position),
        one.loss + share * (other.loss - one.loss),
    )


def _stretch(values: Mapping[str, Any]) -> Stretch:
    return Stretch(**{**values, "points": tuple(Point(*point) for point in values["points"])})
