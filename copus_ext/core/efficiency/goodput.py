"""Statistical efficiency and Goodput: how much a sequence teaches at a batch size, and how much a second teaches.

Units: batch sizes, noise scale and critical batch in sequences, throughput in sequences per second.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from copus_ext.core.noise.noise_scale import NoiseEstimate

Values = float | NDArray[np.float64]

# Critical batch = c x noise scale, and c is no constant: ln c ~ Normal(ln 2, 0.9^2). McCandlish et al. 2018 (arXiv
# 1812.06162) argue for c = 1 and see factors of a few; 2 is the COPUS paper's fixed value (arXiv 2604.26687).
LOG_C_MEAN = math.log(2.0)
LOG_C_SD = 0.9

QUANTILES = 10  # equally likely values per uncertain factor; with 2 modulo 4 of them the lower quartile is one of them
_INTERVAL_95 = NormalDist().inv_cdf(0.975)


def critical_batch(noise_scale: Values, c: Values) -> Values:
    """The batch at which half of a sequence's worth is lost: c x noise scale."""
    return c * noise_scale


def statistical_efficiency(batch: Values, critical: Values) -> Values:
    """Worth of a sequence at a batch size, relative to one at a vanishing batch: SE(B) = 1 / (1 + B / Bc).

    McCandlish et al. 2018, section 2.2: a step's progress goes as 1 / (1 + Bc / B), and it costs B sequences. Pollux
    and AdaptDL (Qiao et al. 2021, section 3.1) write the same relative to a first batch B0, with c = 1:
    SE(B) / SE(B0) = (Bc + B0) / (Bc + B).
    """
    return 1.0 / (1.0 + batch / critical)


def goodput(throughput: Values, batch: Values, critical: Values) -> Values:
    """Useful sequences per second: throughput x statistical efficiency."""
    return throughput * statistical_efficiency(batch, critical)


def normal_quantiles(count: int = QUANTILES) -> NDArray[np.float64]:
    """[count] equally likely values of a standard normal: its quantiles at (k + 1/2) / count. The same every time."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((k + 0.5) / count) for k in range(count)])


def has_upper_bound(noise: NoiseEstimate) -> bool:
    """Whether the interval of the noise scale is closed."""
    return math.isfinite(noise.high)


def log_noise_quantiles(value: float, low: float, high: float) -> NDArray[np.float64] | None:
    """[QUANTILES] equally likely logarithms of the noise scale, from its estimate and its 95 % interval.

    The logarithm is taken as normal on either side of the estimate, with the width that the interval has on that side.
    With an open upper end (``inf``) all that is known is the lower one, and that is what is used. None where there is
    no positive lower bound.
    """
    if not (math.isfinite(low) and low > 0):
        return None
    z = normal_quantiles()
    if not math.isfinite(high):
        return np.full_like(z, math.log(low))
    centre = math.log(value)
    below, above = centre - math.log(low), math.log(high) - centre
    return np.asarray(centre + z / _INTERVAL_95 * np.where(z < 0, below, above))


def critical_batch_quantiles(
    noise: NoiseEstimate | None, log_c: NDArray[np.float64] | None = None
) -> NDArray[np.float64] | None:
    """[QUANTILES] equally likely critical batches, from the interval of the noise scale and what is known of c.

    ``log_c``: [n] equally likely values of ln c; the prior's by default. None where the noise scale has no positive
    lower bound: then nothing is known about the critical batch.
    """
    log_noise = None if noise is None else log_noise_quantiles(noise.value, noise.low, noise.high)
    if log_noise is None:
        return None
    if log_c is None:
        log_c = LOG_C_MEAN + LOG_C_SD * normal_quantiles()
    products = (log_noise[:, None] + log_c[None, :]).ravel()
    probabilities = (np.arange(QUANTILES) + 0.5) / QUANTILES
    return np.exp(np.quantile(products, probabilities, method="hazen"))


def expected_improvement(
    log_ratio: NDArray[np.float64], log_sd: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What can be hoped of a plan and what has to be feared, when ln(its speed / the present one) is normal.

    With X ~ Normal(m, s^2): E[(e^X - 1)+] = exp(m + s^2/2) Phi((m + s^2)/s) - Phi(m/s), the expected improvement of
    Bayesian optimisation (Jones et al. 1998) for a log-normal, and E[(1 - e^X)+] = that - E[e^X] + 1.

    Args:
        log_ratio: [n] m.
        log_sd: [n] s; where it is 0, nothing is uncertain.

    Returns:
        [n] expected gain where there is one, and [n] expected loss where there is one, as fractions of the speed.
    """
    sd = np.maximum(log_sd, 1e-12)
    mean = np.exp(log_ratio + sd**2 / 2)
    gain = mean * _normal_cdf(log_ratio / sd + sd) - _normal_cdf(log_ratio / sd)
    return gain, gain - mean + 1.0


def _normal_cdf(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n] probabilities that a standard normal is below z."""
    scaled = (z / math.sqrt(2.0)).tolist()
    return 0.5 * (1.0 + np.array([math.erf(value) for value in scaled]))


def gain_quantiles(
    log_throughput_ratio: NDArray[np.float64],
    log_sd: NDArray[np.float64],
    batches: NDArray[np.float64],
    current_batch: float,
    critical_batches: NDArray[np.float64] | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Quartiles of the gain, Goodput / current Goodput - 1, of n plans.

    Every plan meets the same critical batch, so where batches are equal its uncertainty cancels exactly. The rest of
    the uncertainty is the throughput's. Both run over a fixed grid of equally likely values: no random numbers, so
    that a decision can be replayed.

    Args:
        log_throughput_ratio: [n] median of log(throughput / current throughput), and whatever else a plan is worth.
        log_sd: [n] its standard deviation.
        batches: [n] global batch of each plan.
        current_batch: global batch now.
        critical_batches: equally likely values; None if nothing is known: then the gain is that of the throughput.

    Returns:
        [n] lower quartiles, [n] medians and [n] upper quartiles.
    """
    critical = np.array([math.inf]) if critical_batches is None else critical_batches
    sizes, size_of = np.unique(batches, return_inverse=True)
    efficiency_ratio = np.log((1.0 + current_batch / critical) / (1.0 + sizes[:, None] / critical))
    spread = log_sd[:, None, None] * normal_quantiles()
    log_gain = np.sort((spread + efficiency_ratio[size_of][:, :, None]).reshape(batches.size, -1), axis=1)
    low, median, high = (log_throughput_ratio + _quantile(log_gain, share) for share in (0.25, 0.5, 0.75))
    return np.expm1(low), np.expm1(median), np.expm1(high)


def _quantile(rows: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """[n] quantiles of [n, m] rows in rising order: ``np.quantile(method="hazen")``, which would sort them again."""
    place = share * rows.shape[1] - 0.5
    below, above = math.floor(place), math.ceil(place)
    return np.asarray(rows[:, below] + (place - below) * (rows[:, above] - rows[:, below]))
