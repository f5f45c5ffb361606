"""What a run has learned of c = critical batch / noise scale: a prior, and what sequences were worth at two batches.

With SE(B) = 1 / (1 + B / Bc) and Bc = c N (``goodput.py``) a sequence at batch B2 is worth (1 + B1 / (c N)) /
(1 + B2 / (c N)) of one at B1. Each observation of that ratio is a likelihood of ln c, taken on a grid; the prior is
ln c ~ Normal(LOG_C_MEAN, LOG_C_SD^2). What is observed is c N and not c, so every observation keeps the noise scale of
its time with its interval.

**Outliers.** The error of an observation is Student's t with 4 degrees of freedom around its log_sd. Near its centre
that is nearly normal. Beyond, its pull on ln c falls as 1 / distance instead of growing, so one change of the batch
that a jump of the learning rate or of the data spoiled cannot overrule the others. Four degrees are a usual choice of
robust regression (Lange, Little and Taylor 1989); not tuned.

**Independence.** Errors of different observations are taken as independent. What the learning rate does at a change of
the batch may well go the same way at each of them, so the interval after many changes is narrower than it should be.

**Drift.** c changes while a model learns: 1.1 from scratch and about 4 for a later branch were seen. ln c is taken as
a stationary process (Ornstein-Uhlenbeck) in the logarithm of the samples consumed: its correlation between E0 and E is
(E0 / E)^DRIFT, so between one and ten times as many samples it moves by 0.84 (standard deviation). A later posterior
goes back to the prior, and many observations from long ago say no more than c of that time could say of now. That
exponent rests on few measurements with wide intervals: a guess.

What a ratio can say is little: for twice the batch it lies between 1/2 and 1, and ln c moves ln of it by 0.17 at most
per unit, so an error of 0.3 in the one is 1.7 in the other. The wider two batches are apart, the more. The width of the
95 % interval of ln c after one observation against the prior's, on average over c from the prior, with N = 32 [26, 40]
(``tests/unit/test_critical_ratio.py`` repeats some of it):

==================================  =========  =========  =========  =========
batches                             32, 64     32, 128    16, 128    8, 128
==================================  =========  =========  =========  =========
log_sd 0.3: a change of the batch   0.94       0.83       0.72
log_sd 0.11: a probe                0.74       0.51       0.39       0.34
==================================  =========  =========  =========  =========
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.efficiency.goodput import LOG_C_MEAN, LOG_C_SD, QUANTILES, log_noise_quantiles, normal_quantiles

if TYPE_CHECKING:
    from copus_ext.core.efficiency.critical_batch import CriticalBatchFit
    from copus_ext.core.efficiency.loss_trend import SlopeRatio
    from copus_ext.core.noise.noise_scale import NoiseEstimate

Vector = NDArray[np.float64]

BATCH_CHANGE = "batch change"
PROBE = "probe"

DRIFT = 0.25
MOST_OBSERVATIONS = 32
PROBE_LOG_SD = 0.1  # at least: one data order and one seed do not tell how another would come out; a guess

_FREEDOM = 4.0
_POINTS = 161
_REACH = 4.0  # standard deviations of the prior on either side of its mean
_STEP = 2.0 * _REACH / (_POINTS - 1)
_INTERVAL = (0.5, 0.025, 0.975)
_OPEN = ("noise_scale", "noise_high")  # may be inf, which JSON does not have


class EfficiencyRatio(NamedTuple):
    """What a sequence was worth at one batch against another: one observation.

    Attributes:
        kind: ``batch change`` or ``probe``.
        consumed_samples: by the run then, in sequences.
        batch_from: in sequences.
        batch_to: in sequences.
        log_ratio: ln (worth of a sequence at ``batch_to`` / at ``batch_from``) = -ln (E(batch_to) / E(batch_from)), E
            being the samples to equal loss; negative where the larger batch wastes some.
        log_sd: its standard error.
        noise_scale: then, in sequences; ``inf`` where only its lower end was known.
        noise_low: lower end of its 95 % interval.
        noise_high: upper end, ``inf`` where open.
    """

    kind: str
    consumed_samples: int
    batch_from: int
    batch_to: int
    log_ratio: float
    log_sd: float
    noise_scale: float
    noise_low: float
    noise_high: float


def from_slopes(ratio: SlopeRatio, consumed_samples: int, noise: NoiseEstimate) -> EfficiencyRatio:
    """The observation that the training losses around a change of the batch came to."""
    return EfficiencyRatio(BATCH_CHANGE, consumed_samples, *ratio, noise.value, noise.low, noise.high)


def from_probe(fit: CriticalBatchFit, consumed_samples: int, noise: NoiseEstimate) -> EfficiencyRatio | None:
    """The observation that two branches of one snapshot came to; of more branches, the smallest and largest batch.

    ``fit.spread`` is the standard error of one branch's log cost, so that of a ratio is sqrt(2) times it. With two
    branches it covers the validation sequences only, so PROBE_LOG_SD comes on top (in squares).

    Returns:
        None where the branches have no loss in common or the spread of their costs is not known.
    """
    if len(fit.batches) < 2:
        return None
    log_sd = math.hypot(math.sqrt(2.0) * fit.spread, PROBE_LOG_SD)
    log_ratio = -math.log(fit.cost[-1] / fit.cost[0])
    if not (math.isfinite(log_sd) and math.isfinite(log_ratio)):
        return None
    batches = fit.batches[0], fit.batches[-1]
    return EfficiencyRatio(PROBE, consumed_samples, *batches, log_ratio, log_sd, noise.value, noise.low, noise.high)


@dataclass(frozen=True)
class CriticalRatio:
    """ln c as known from prior and observations. A value: :meth:`observe` returns the next one.

    ``observations`` are in the order in which they came, MOST_OBSERVATIONS of them at most. The same ones give the same
    numbers: there is nothing random in it.
    """

    observations: tuple[EfficiencyRatio, ...] = ()

    def observe(self, observation: EfficiencyRatio) -> CriticalRatio:
        """With one more observation, for which the oldest may have to go.

        One whose ratio, error or noise scale is not known says nothing of c, and changes nothing.
        """
        known = math.isfinite(observation.log_ratio) and 0.0 < observation.log_sd < math.inf
        if not known or _log_noise(observation) is None:
            return self
        return CriticalRatio((*self.observations, observation)[-MOST_OBSERVATIONS:])

    def quantiles(self, count: int, consumed_samples: float) -> Vector:
        """[count] equally likely values of ln c after so many samples: its quantiles at (k + 1/2) / count.

        Without observations they are exactly those of the prior.
        """
        if not self.observations:
            return np.asarray(LOG_C_MEAN + LOG_C_SD * normal_quantiles(count))
        return _quantiles_of(self.probabilities(consumed_samples), (np.arange(count) + 0.5) / count)

    def interval(self, consumed_samples: float) -> tuple[float, float, float]:
        """Median, lower and upper end of the 95 % interval of c after so many samples."""
        if self.observations:
            logs = _quantiles_of(self.probabilities(consumed_samples), np.array(_INTERVAL))
        else:
            prior = NormalDist(LOG_C_MEAN, LOG_C_SD)
            logs = np.array([prior.inv_cdf(share) for share in _INTERVAL])
        median, low, high = (float(c) for c in np.exp(logs))
        return median, low, high

    def probabilities(self, consumed_samples: float) -> Vector:
        """[points of :func:`log_c_grid`] of ln c after so many samples; they add up to 1."""
        belief, samples = _prior(), None
        for observation in self.observations:
            belief = _drifted(belief, samples, observation.consumed_samples) * likelihood(observation)
            belief, samples = belief / belief.sum(), observation.consumed_samples
        return _drifted(belief, samples, consumed_samples)

    def to_json(self) -> dict[str, Any]:
        """Plain values without infinities; through ``json`` and :meth:`from_json` they come back to the last bit."""
        return {"observations": [_observation_json(observation) for observation in self.observations]}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> CriticalRatio:
        """Inverse of :meth:`to_json`."""
        return CriticalRatio(tuple(_observation(fields) for fields in values["observations"]))


def log_c_grid() -> Vector:
    """[points] values of ln c at which its probabilities are kept: 4 standard deviations of the prior either way."""
    return np.asarray(LOG_C_MEAN + LOG_C_SD * np.linspace(-_REACH, _REACH, _POINTS))


def likelihood(observation: EfficiencyRatio) -> Vector:
    """[points of :func:`log_c_grid`] of an observation at its own time, up to a factor: the mean over its noise scale.

    See the head of the module for Student's t.
    """
    log_noise = _log_noise(observation)
    assert log_noise is not None  # see CriticalRatio.observe
    critical = np.exp(log_c_grid()[:, None] + log_noise[None, :])
    expected = np.log1p(observation.batch_from / critical) - np.log1p(observation.batch_to / critical)
    deviations = (observation.log_ratio - expected) / observation.log_sd
    densities = (1.0 + deviations**2 / _FREEDOM) ** (-(_FREEDOM + 1.0) / 2.0)
    return np.asarray(densities.mean(axis=1))


def _log_noise(observation: EfficiencyRatio) -> Vector | None:
    """[QUANTILES] equally likely logarithms of the noise scale of an observation; None where nothing bounds it below.

    A decision takes the lower end where the upper one is open, to be on the safe side. Here that would make c too
    large, so an open interval is read as what it comes from: |G|^2, and with it 1 / noise scale, is normal and can't be
    told from 0 (Fieller, ``noise_scale.py``). Of that normal the positive part counts.
    """
    value, low, high = observation.noise_scale, observation.noise_low, observation.noise_high
    if math.isfinite(high) or not 0.0 < low < min(value, math.inf):
        return log_noise_quantiles(value, low, high)
    mean = 1.0 / value
    inverse = NormalDist(mean, (1.0 / low - mean) / NormalDist().inv_cdf(0.975))
    negative = inverse.cdf(0.0)
    shares = (np.arange(QUANTILES) + 0.5) / QUANTILES
    return np.array([-math.log(inverse.inv_cdf(negative + (1.0 - negative) * share)) for share in shares])


def _quantiles_of(probabilities: Vector, shares: Vector) -> Vector:
    """Values of ln c below which so much of the probability lies; each point's is spread evenly over its cell."""
    half = LOG_C_SD * _STEP / 2.0
    edges = np.append(log_c_grid() - half, log_c_grid()[-1] + half)
    below = np.append(0.0, np.cumsum(probabilities))
    return np.asarray(np.interp(shares, below / below[-1], edges))


@cache
def _prior() -> Vector:
    """[points] probabilities of the prior."""
    density = np.exp(-(np.linspace(-_REACH, _REACH, _POINTS) ** 2) / 2.0)
    return np.asarray(density / density.sum())


def _drifted(belief: Vector, samples: float | None, later: float) -> Vector:
    """[points] probabilities after ``later`` samples, from those after ``samples``; None: the prior, which stays."""
    if samples is None or samples == later:
        return belief
    distance = abs(math.log(max(later, 1.0) / max(samples, 1.0)))
    rates, modes = _drift_modes()
    root = np.sqrt(_prior())
    moved = ((belief / root) @ modes * np.exp(-rates * distance)) @ modes.T * root
    moved = np.maximum(moved, 0.0)  # rounding
    return np.asarray(moved / moved.sum())


@cache
def _drift_modes() -> tuple[Vector, Vector]:
    """[points] rates at which the modes of a deviation from the prior die out, and [points, modes] the modes.

    The process is a walk between neighbouring points whose rates leave the prior as it is (detailed balance): up by
    (DRIFT / step^2) sqrt(p_above / p_here), down likewise. For small steps that is Ornstein-Uhlenbeck. Times sqrt(p) it
    is symmetric, and its eigenvectors give it over any distance at once: two short drifts are one long one.
    """
    prior, speed = _prior(), DRIFT / _STEP**2
    up = speed * np.sqrt(prior[1:] / prior[:-1])
    down = speed * np.sqrt(prior[:-1] / prior[1:])
    leaving = np.append(up, 0.0) + np.append(0.0, down)
    neighbours = np.full(_POINTS - 1, -speed)
    rates, modes = np.linalg.eigh(np.diag(leaving) + np.diag(neighbours, 1) + np.diag(neighbours, -1))
    return np.maximum(rates, 0.0), modes


def _observation_json(observation: EfficiencyRatio) -> dict[str, Any]:
    fields = observation._asdict()
    return {**fields, **{name: fields[name] if math.isfinite(fields[name]) else None for name in _OPEN}}


def _observation(fields: Mapping[str, Any]) -> EfficiencyRatio:
    return EfficiencyRatio(**{**fields, **{name: math.inf if fields[name] is None else fields[name] for name in _OPEN}})
