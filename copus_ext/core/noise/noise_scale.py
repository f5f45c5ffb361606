"""Gradient noise scale: two unbiased numbers a step, smoothed apart, and an honest interval for their ratio.

The simple noise scale of McCandlish et al. 2018 ("An Empirical Model of Large-Batch Training", arXiv 1812.06162, eq.
2.9) is tr(Sigma) / |G|^2, in sequences: Sigma is the covariance of one sequence's gradient, G the true gradient. A
step gives ``S`` for tr(Sigma) and ``N`` for |G|^2. Both are unbiased and noisy, and N may well come out negative; a
mean of their ratios is off by a factor (it has no expectation), so the two are averaged first and divided last.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeGuard

from copus_ext.core.noise.block_means import BLOCK_SIZES, BlockLevel, Spread, Triple, aged_sum, spread_of_means
from copus_ext.core.noise.step_noise import StepEstimate, step_estimate, step_variance
from copus_ext.core.noise.student import t_quantile_975

__all__ = [
    "NoiseEstimate",
    "NoiseScaleEstimator",
    "StepEstimate",
    "fieller",
    "step_estimate",
    "step_variance",
    "training_temperature",
]

_MIN_FREEDOM = 1.9  # three steps of like weight; fewer say next to nothing about their own spread


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


def training_temperature(optimizer: str, learning_rate: float, batch: float) -> float:
    """How far the noise of the updates throws the weights about, up to a factor that stays the same during a run.

    SGD: learning rate / batch (McCandlish et al. 2018, appendix C; Smith and Le 2018, arXiv 1710.06451). Adam and what
    else divides an update by its own size, as upstream's other optimizers do: learning rate / sqrt(batch), which keeps
    the stochastic differential equation of training where it is (Malladi et al. 2022, arXiv 2205.10287, section 4).

    Args:
        optimizer: upstream's ``--optimizer``.
        learning_rate: of the step, as upstream logs it.
        batch: sequences in the step.
    """
    return learning_rate / (batch if optimizer == "sgd" else math.sqrt(batch))


@dataclass(frozen=True)
class NoiseScaleEstimator:
    """Running averages of N and S with what their interval needs. A value: :meth:`update` returns the next one.

    A step counts by its batch (in sequences), and loses half of its weight every ``half_life_tokens`` tokens: every
    token counts alike, however the steps are cut. Var N falls as 1/B where B exceeds the noise scale (there this weight
    is the best one) and as 1/B^2 below it; going further would need the very ratio that is being estimated. Weights
    that do not look at N and S keep both averages unbiased.

    The noise scale goes roughly as 1 / temperature (McCandlish et al. 2018, appendix C), so what was measured at
    another one counts for less: the past also loses half of its weight whenever the temperature doubles or halves. A
    warm-up from 0 then forgets its first steps as fast as they go out of date, and a batch that grows under its
    learning rate rule forgets nothing.

    Autocorrelation is met by batch means: the variance is taken over blocks of steps, at the block length that
    :func:`spread_of_means` finds long enough. Non-finite steps are counted in ``skipped`` only.
    """

    half_life_tokens: float
    steps: int = 0
    skipped: int = 0
    total: Triple = (0.0, 0.0, 0.0)  # weight, weighted N, weighted S
    levels: tuple[BlockLevel, ...] = tuple(BlockLevel(size) for size in BLOCK_SIZES)
    temperature: float | None = None  # the last one known

    def __post_init__(self) -> None:
        if not self.half_life_tokens > 0:
            raise ValueError(f"the half-life must be a positive number of tokens, not {self.half_life_tokens}")

    def update(
        self, N: float, S: float, tokens: float, batch: float, *, temperature: float | None = None
    ) -> NoiseScaleEstimator:
        """The estimator after a step of ``batch`` (> 0) sequences, ``tokens`` tokens, gave N and S.

        ``temperature`` is that of the step (:func:`training_temperature`). One that is 0, not finite or not given says
        nothing, and the last one that did stays.
        """
        if not (math.isfinite(N) and math.isfinite(S)):
            return replace(self, skipped=self.skipped + 1)
        decay = self.kept_weight(tokens, temperature)
        step = (batch, batch * N, batch * S)
        return NoiseScaleEstimator(
            self.half_life_tokens,
            self.steps + 1,
            self.skipped,
            aged_sum(self.total, step, decay),
            tuple([level.add(step, decay) for level in self.levels]),
            temperature if _is_known(temperature) else self.temperature,
        )

    def kept_weight(self, tokens: float, temperature: float | None = None) -> float:
        """The share of its weight that the past keeps over so many tokens and up to that temperature."""
        kept: float = 2.0 ** (-tokens / self.half_life_tokens)
        if _is_known(temperature) and self.temperature is not None:
            kept *= min(temperature / self.temperature, self.temperature / temperature)
        return kept

    def with_half_life(self, tokens: float) -> NoiseScaleEstimator:
        """The same past, forgotten at another rate from here on."""
        return replace(self, half_life_tokens=tokens)

    def means(self) -> tuple[float, float]:
        """The averages of N and S; both ``nan`` before the first step."""
        if self.steps == 0:
            return math.nan, math.nan
        return self.total[1] / self.total[0], self.total[2] / self.total[0]

    def spread(self) -> Spread | None:
        """How uncertain :meth:`means` are; ``None`` before three steps of like weight."""
        if self.steps == 0 or self.levels[0].freedom() < _MIN_FREEDOM:
            return None
        return spread_of_means(self.levels, self.total)

    def estimate(self) -> NoiseEstimate:
        """The noise scale as known now; all ``nan`` before the first step."""
        if self.steps == 0:
            return NoiseEstimate(*(math.nan,) * 5, n_eff=0.0)
        mean_n, mean_s = self.means()
        value = mean_s / mean_n if mean_n > 0 else math.inf
        spread = self.spread()
        if spread is None:
            return NoiseEstimate(value, math.nan, math.nan, mean_n, mean_s, n_eff=1.0)
        low, high = fieller(mean_n, mean_s, spread)
        return NoiseEstimate(value, low, high, mean_n, mean_s, spread.n_eff)

    def to_json(self) -> dict[str, Any]:
        """Plain values; through ``json`` and :meth:`from_json` they come back to the last bit (floats by ``repr``)."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> NoiseScaleEstimator:
        """Inverse of :meth:`to_json`, also where JSON has null for an infinite half-life."""
        levels = tuple(
            BlockLevel(**{**level, "block": tuple(level["block"]), "moments": tuple(level["moments"])})
            for level in values["levels"]
        )
        half_life = values["half_life_tokens"]
        known = {**values, "half_life_tokens": math.inf if half_life is None else half_life}
        return NoiseScaleEstimator(**{**known, "total": tuple(values["total"]), "levels": levels})


def _is_known(temperature: float | None) -> TypeGuard[float]:
    """Whether the temperature says anything: a number above 0."""
    return temperature is not None and 0.0 < temperature < math.inf


def fieller(mean_n: float, mean_s: float, spread: Spread) -> tuple[float, float]:
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
