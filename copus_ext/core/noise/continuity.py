"""Do N and S go on after a switch of the layout as before it? A free check of the reshard and of the collectors.

The trajectory of the weights does not know how they lie over the devices, so the true |G|^2 and tr(Sigma) are the same
on either side of a switch that keeps batch and learning rate. They drift, though, so a line is fitted to the steps on
each side and the two are compared where they meet: a regression discontinuity design (Imbens and Lemieux 2008,
"Regression discontinuity designs: a guide to practice"). How much a step scatters may differ, since the new layout may
have another number of groups; so the sides have a variance each. Autocorrelation is allowed for as AR(1).

What to expect of it, by simulation of 40,000 switches each with a drift of 1 % a step and scatter that grows at the
switch (``tests/unit/test_continuity.py`` repeats some of it). Windows of 20 steps:

=====================================  ===========  ===================  ===================
autocorrelation of the steps           0            0.4                  0.6
=====================================  ===========  ===================  ===================
suspect, though nothing is wrong       0.4 %        1.8 %                2.7 %
factor 2 in S found, scatter 0.2       0.96         0.67                 0.50
... scatter 0.25                       0.80         0.47                 0.34
... scatter 0.3                        0.59         0.33                 0.24
factor 4 in S found, scatter 0.25      1.00         0.95                 0.81
factor 2 in N found, scatter 0.2       0.88         0.55                 0.40
... scatter 0.6, 1 or more             0.05, 0.01   0.05, 0.02           0.05, 0.03
=====================================  ===========  ===================  ===================

Scatter is the standard deviation of a step relative to its mean. N usually has 0.6 to 3, so an error in N alone goes
unseen: N twice as large scatters twice as much, too. It is a check of S. Windows of 32 steps find the factor of 2 in S
in 1.00, 0.98, 0.90 of cases at autocorrelation 0, but a run that tries out plans seldom keeps one for that long.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.noise.student import equivalent_sigma

Vector = NDArray[np.float64]
Pair = tuple[float, float]  # N, S

SUSPECT_SIGMA = 3.0
WINDOW_STEPS = 20
_LEAST_BEFORE = 10  # steps; with fewer the line says too little for a factor of 2 to be seen
_AUTOCORRELATIONS = np.arange(0.0, 0.96, 0.05)  # tried for the one that fits; negative ones would narrow the error
_ROUNDING = 1e-12  # of the values; what scatters less than that is taken to scatter by it


@dataclass(frozen=True)
class ContinuityVerdict:
    """Of one switch: how many standard deviations N and S jumped (up: positive), and the levels on either side of it.

    The z are normal-equivalent. S is compared on the logarithmic scale where all its values are positive.
    """

    z_n: float
    z_s: float
    suspect: bool
    n_before: float
    n_after: float
    s_before: float
    s_after: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class ContinuityCheck:
    """The last steps before a switch of the layout and the first ones after it. A value: methods return the next one.

    Tell it of every step by :meth:`update`, of a switch by :meth:`switched` or :meth:`cancelled`. :meth:`verdict` is
    there after the step that completes the second window, and gone after the next one.
    """

    window: int = WINDOW_STEPS
    before: tuple[Pair, ...] = ()
    after: tuple[Pair, ...] | None = None  # None: no switch is being checked

    def __post_init__(self) -> None:
        if self.window < _LEAST_BEFORE:
            raise ValueError(f"a window of {self.window} steps is too short for a line; at least {_LEAST_BEFORE}")

    def update(self, N: float, S: float) -> ContinuityCheck:
        """After a step gave N and S. One that is not finite is left out, as if it had not been."""
        if not (math.isfinite(N) and math.isfinite(S)):
            return self
        step = (float(N), float(S))
        if self.after is not None and len(self.after) < self.window:
            return ContinuityCheck(self.window, self.before, (*self.after, step))
        earlier = self.before if self.after is None else self.after
        return ContinuityCheck(self.window, (*earlier, step)[-self.window :])

    def switched(self) -> ContinuityCheck:
        """After the layout changed and nothing else.

        A check that was not complete is given up: what followed the earlier switch is what precedes this one. With
        fewer than 10 steps of that, this switch is not checked.
        """
        earlier = self.before if self.after is None else self.after
        if len(earlier) < _LEAST_BEFORE:
            return self.cancelled()
        return ContinuityCheck(self.window, earlier, ())

    def cancelled(self) -> ContinuityCheck:
        """After batch or learning rate jumped: nothing before is comparable with what comes."""
        return ContinuityCheck(self.window)

    def verdict(self) -> ContinuityVerdict | None:
        """Whether N and S went on, if the last step completed a check."""
        if self.after is None or len(self.after) < self.window:
            return None
        before, after = np.array(self.before), np.array(self.after)
        positive = bool((before[:, 1] > 0).all() and (after[:, 1] > 0).all())
        n = _jump(before[:, 0], after[:, 0])
        s = _logarithmic_jump(before[:, 1], after[:, 1]) if positive else _jump(before[:, 1], after[:, 1])
        suspect = max(abs(n.z), abs(s.z)) > SUSPECT_SIGMA
        return ContinuityVerdict(n.z, s.z, suspect, n.before, n.after, s.before, s.after)

    def to_json(self) -> dict[str, Any]:
        """Plain values; through ``json`` and :meth:`from_json` they come back to the last bit."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> ContinuityCheck:
        """Inverse of :meth:`to_json`."""
        after = None if values["after"] is None else _pairs(values["after"])
        return ContinuityCheck(values["window"], _pairs(values["before"]), after)


def _pairs(steps: Any) -> tuple[Pair, ...]:
    return tuple((n, s) for n, s in steps)


class _Jump(NamedTuple):
    """Normal-equivalent standard deviations of a jump, and the levels on either side of it."""

    z: float
    before: float
    after: float


class _Side(NamedTuple):
    """A line through the steps of one side: its level at the switch, and what its residuals say."""

    level: float
    variance: float  # of the level
    freedom: float
    scatter: float  # variance of a step


def _jump(before: Vector, after: Vector) -> _Jump:
    """Whether the lines through ``before`` and ``after`` meet."""
    one, other = _sides(before, after)
    return _Jump(_sigma(other.level - one.level, one, other), one.level, other.level)


def _logarithmic_jump(before: Vector, after: Vector) -> _Jump:
    """The same for positive values, whose scatter goes with their size and is skewed.

    The logarithm of a value with relative variance v is v / 2 too low on average (exactly so for a log-normal, to first
    order for others), and v changes with the number of groups.
    """
    one, other = _sides(np.log(before), np.log(after))
    low, high = one.level + one.scatter / 2, other.level + other.scatter / 2
    return _Jump(_sigma(high - low, one, other), math.exp(low), math.exp(high))


def _sigma(difference: float, one: _Side, other: _Side) -> float:
    """Normal-equivalent deviation of a difference between two sides of unequal variance (Welch 1947)."""
    variance = one.variance + other.variance
    share = one.variance / variance
    freedom = 1.0 / (share**2 / one.freedom + (1.0 - share) ** 2 / other.freedom)
    return equivalent_sigma(difference / math.sqrt(variance), freedom)


def _sides(before: Vector, after: Vector) -> tuple[_Side, _Side]:
    """Both lines, with the one autocorrelation that fits both sides' residuals.

    An observed lag-1 autocorrelation of residuals is far too low for windows this short, the more so as a line has been
    fitted (Kendall 1954). So it is compared with what is expected of such residuals, E[e_t e_t+1] / E[e_t^2].
    """
    series = (before[::-1], after)  # AR(1) looks the same backwards, so both sides begin at the switch
    observed = sum(_lag_sums(values) for values in series)
    expected = sum(values.size * _expected_autocorrelations(values.size) for values in series)
    fitting = float(np.interp(observed, expected, _AUTOCORRELATIONS))
    one, other = (_side(values, fitting) for values in series)
    return one, other


def _lag_sums(values: Vector) -> float:
    """Number of values x lag-1 autocorrelation of their residuals."""
    residuals = _line(values.size)[1] @ values
    square = float(residuals @ residuals)
    return values.size * float(residuals[1:] @ residuals[:-1]) / square if square > 0 else 0.0


def _side(values: Vector, autocorrelation: float) -> _Side:
    """The line through ``values``, the first of which is next to the switch, for AR(1) errors.

    With residuals e = M y and errors of covariance s^2 R: E[e'e] = s^2 tr(M R), with 2 s^4 tr(M R M R) for variance,
    hence tr(M R)^2 / tr(M R M R) degrees of freedom (Satterthwaite 1946). The level c'y has variance s^2 c'R c. No
    large-sample formula for an effective number of steps is needed.
    """
    intercept, residual_maker = _line(values.size)
    correlation = _correlation(values.size, autocorrelation)
    residuals, level = residual_maker @ values, float(intercept @ values)
    product = residual_maker @ correlation
    trace = float(np.trace(product))
    rounding = (_ROUNDING * float(np.abs(values).max())) ** 2 + sys.float_info.min
    scatter = float(residuals @ residuals) / trace + rounding
    variance = scatter * float(intercept @ correlation @ intercept)
    return _Side(level, variance, trace**2 / float(np.trace(product @ product)), scatter)


def _line(count: int) -> tuple[Vector, Vector]:
    """Of a least-squares line: weights [count] of its level half a step before the first point, and the residual maker.

    The latter, [count, count], takes values to their residuals.
    """
    points = np.stack([np.ones(count), np.arange(count) + 0.5], axis=1)
    inverse = np.linalg.pinv(points)
    return inverse[0], np.eye(count) - points @ inverse


def _correlation(count: int, autocorrelation: float) -> Vector:
    """[count, count] correlations of AR(1)."""
    steps = np.arange(count)
    matrix: Vector = np.power(autocorrelation, np.abs(steps[:, None] - steps))
    return matrix


def _expected_autocorrelations(count: int) -> Vector:
    """E[sum e_t e_t+1] / E[sum e_t^2] of a line's residuals, for each true autocorrelation that is tried."""
    _, residual_maker = _line(count)
    expected = []
    for autocorrelation in _AUTOCORRELATIONS:
        covariance = residual_maker @ _correlation(count, float(autocorrelation)) @ residual_maker
        expected.append(np.trace(covariance, offset=1) / np.trace(covariance))
    return np.array(expected)
