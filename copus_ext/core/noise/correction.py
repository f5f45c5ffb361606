"""The full noise scale at the price of a cheap one: measured in full on some steps, corrected to it on all of them.

Gray et al. 2024 ("Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise Scale in
Transformers", arXiv 2411.00999) find the noise scale of the normalisation layers to go with that of the whole model, up
to a factor. The factor depends on the model, so it is measured here, on every k-th step.

That is double sampling: a cheap x on all steps, the y that is wanted on a part of them (Cochran 1977, "Sampling
Techniques", 3rd edition, chapter 12). The regression estimator of the mean of y, ``mean of y over the part + b (mean of
x over all - mean of x over the part)`` with b the slope of y on x, is in large samples never worse than the mean over
the part. The ratio estimator has b = mean y / mean x. It is worse than no correction where the correlation of x and y
is below half of x's relative scatter over y's (chapter 6), and has no finite variance where the mean of x may be 0, as
that of N may. N and S of a single step are mostly noise, of which different parameters share little; so regression.

What it gains is bounded by the correlation r of x and y over steps: the variance of the part falls by 1 - r^2 at most.
In a simulation with r = 0.6 for N and 0.9 for S, every 8th step full, the error of the noise scale fell by 15 %; with
r below 0.4 there was next to nothing to gain.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from copus_ext.core.noise.block_means import Spread
from copus_ext.core.noise.noise_scale import NoiseEstimate, NoiseScaleEstimator, StepEstimate, fieller

_MIN_JOINT_STEPS = 7.9  # eight of like weight; a slope from n steps costs 1 / (n - 3) of the variance


@dataclass(frozen=True)
class _Regression:
    """Weighted moments of (x, y) on the steps that have both."""

    weight: float = 0.0
    square_weight: float = 0.0  # sum of squared weights
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def update(self, x: float, y: float, weight: float, decay: float) -> _Regression:
        """With one more step, older ones having lost weight by the factor ``decay``."""
        return _Regression(
            decay * self.weight + weight,
            decay**2 * self.square_weight + weight**2,
            decay * self.x + weight * x,
            decay * self.y + weight * y,
            decay * self.xx + weight * x * x,
            decay * self.xy + weight * x * y,
            decay * self.yy + weight * y * y,
        )

    @property
    def slope(self) -> float:
        """Least-squares slope of y on x; 0 while there are too few steps for one."""
        variance = self.xx - self.x**2 / self.weight if self.weight else 0.0
        if variance <= 0 or self.weight**2 < _MIN_JOINT_STEPS * self.square_weight:
            return 0.0
        return (self.xy - self.x * self.y / self.weight) / variance

    @property
    def scatter(self) -> float:
        """Variance of y of a single step."""
        square = self.yy - self.y**2 / self.weight
        return max(0.0, square) / (self.weight - self.square_weight / self.weight)


@dataclass(frozen=True)
class RunningCorrection:
    """Running averages of the full N and S from cheap ones. A value: :meth:`update` returns the next one.

    What is averaged over the steps with both is ``y - b (x - m)``, and over all steps ``b (x - m)``, each with slope b
    and mean m as they were *before* the step. Fixed without looking at it, they leave the sum of the two averages
    unbiased however poor they are, and the two :class:`NoiseScaleEstimator` measure what that costs: the scatter of
    their own errors of prediction. So the interval holds the uncertainty of the correction, with no formula for it.
    ``residual`` and ``carried`` are taken as independent, since a least-squares residual is uncorrelated with x.
    """

    cheap: NoiseScaleEstimator  # x
    carried: NoiseScaleEstimator  # b (x - m), all steps
    residual: NoiseScaleEstimator  # y - b (x - m), steps with both
    of_n: _Regression = _Regression()
    of_s: _Regression = _Regression()
    tokens_since_full: float = 0.0

    @classmethod
    def start(cls, half_life_tokens: float) -> Self:
        """Before the first step; the half-life as of :class:`NoiseScaleEstimator`."""
        empty = NoiseScaleEstimator(half_life_tokens)
        return cls(cheap=empty, carried=empty, residual=empty)

    @property
    def half_life_tokens(self) -> float:
        """Of all its averages."""
        return self.cheap.half_life_tokens

    def with_half_life(self, tokens: float) -> RunningCorrection:
        """The same past, forgotten at another rate from here on."""
        return replace(
            self,
            cheap=self.cheap.with_half_life(tokens),
            carried=self.carried.with_half_life(tokens),
            residual=self.residual.with_half_life(tokens),
        )

    @property
    def bias_known(self) -> bool:
        """Whether there has been a full measurement."""
        return self.residual.steps > 0

    def update(
        self,
        full: StepEstimate | None,
        cheap: StepEstimate,
        tokens: float,
        batch: float,
        *,
        temperature: float | None = None,
    ) -> RunningCorrection:
        """After a step of ``batch`` sequences, ``tokens`` tokens; ``full`` where it was measured in full, too.

        A step whose cheap numbers are not finite is left out, full ones that are not finite likewise.
        """
        if not _finite(cheap):
            return self
        predicted = self._predicted(cheap)
        moved = replace(
            self,
            cheap=self.cheap.update(cheap.N, cheap.S, tokens, batch, temperature=temperature),
            carried=self.carried.update(predicted.N, predicted.S, tokens, batch, temperature=temperature),
            tokens_since_full=self.tokens_since_full + tokens,
        )
        if full is None or not _finite(full):
            return moved
        return moved._with_full(full, cheap, predicted, batch, temperature)

    def _with_full(
        self, full: StepEstimate, cheap: StepEstimate, predicted: StepEstimate, batch: float, temperature: float | None
    ) -> RunningCorrection:
        """The part of the step that only steps with both have."""
        tokens = self.tokens_since_full
        kept = self.residual.kept_weight(tokens, temperature)
        error = StepEstimate(full.N - predicted.N, full.S - predicted.S)
        return replace(
            self,
            residual=self.residual.update(error.N, error.S, tokens, batch, temperature=temperature),
            of_n=self.of_n.update(cheap.N, full.N, batch, kept),
            of_s=self.of_s.update(cheap.S, full.S, batch, kept),
            tokens_since_full=0.0,
        )

    def _predicted(self, cheap: StepEstimate) -> StepEstimate:
        """How far the full N and S of a step should lie from their means, by its cheap ones."""
        if self.cheap.steps == 0:
            return StepEstimate(0.0, 0.0)
        mean_n, mean_s = self.cheap.means()
        return StepEstimate(self.of_n.slope * (cheap.N - mean_n), self.of_s.slope * (cheap.S - mean_s))

    def estimate(self) -> NoiseEstimate:
        """The full noise scale as known now, in sequences.

        Before the first full step all there is is the cheap ``value``, off by an unknown factor: the interval, N and S
        are ``nan`` and ``n_eff`` is 0. Else as :meth:`NoiseScaleEstimator.estimate`; ``n_eff`` counts full steps.
        """
        if not self.bias_known:
            return NoiseEstimate(self.cheap.estimate().value, *(math.nan,) * 4, n_eff=0.0)
        (rest_n, rest_s), (moved_n, moved_s) = self.residual.means(), self.carried.means()
        mean_n, mean_s = rest_n + moved_n, rest_s + moved_s
        value = mean_s / mean_n if mean_n > 0 else math.inf
        spread = self._spread()
        if spread is None:
            return NoiseEstimate(value, math.nan, math.nan, mean_n, mean_s, n_eff=1.0)
        low, high = fieller(mean_n, mean_s, spread)
        return NoiseEstimate(value, low, high, mean_n, mean_s, spread.n_eff)

    def _spread(self) -> Spread | None:
        """How uncertain the corrected averages are; ``None`` before three full steps of like weight."""
        residual, carried = self.residual.spread(), self.carried.spread()
        if residual is None or carried is None:
            return None
        both = residual.plus(carried)
        return both._replace(n_eff=self.of_n.scatter / both.var_n if both.var_n > 0 else residual.n_eff)

    def to_json(self) -> dict[str, Any]:
        """Plain values; through ``json`` and :meth:`from_json` they come back to the last bit."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> RunningCorrection:
        """Inverse of :meth:`to_json`."""
        return RunningCorrection(
            cheap=NoiseScaleEstimator.from_json(values["cheap"]),
            carried=NoiseScaleEstimator.from_json(values["carried"]),
            residual=NoiseScaleEstimator.from_json(values["residual"]),
            of_n=_Regression(**values["of_n"]),
            of_s=_Regression(**values["of_s"]),
            tokens_since_full=values["tokens_since_full"],
        )


def _finite(step: StepEstimate) -> bool:
    return math.isfinite(step.N) and math.isfinite(step.S)
