"""Predicted step times with their uncertainty: a closed form, corrected by every step that is measured.

The logarithm of observed / predicted is a Gaussian process over plans (Rasmussen and Williams 2006, eq. 2.23 and 2.24):
one common error of the hardware figures, and one that changes slowly with the logarithms of the plan's sizes. Plans
that resemble each other err alike, so the ratio of two step times is known better than either; hence the covariances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.hardware import Hardware
from copus_ext.core.model_shape import ModelShape
from copus_ext.core.plan import Plan, plan_from_json
from copus_ext.core.step_time import step_time_parts

Array = NDArray[np.float64]

# Standard deviations of a log step time. Chosen by hand, not yet fitted to measurements.
COMMON_SD = 1.0  # wide: the figures of the hardware may be off by a factor of three
PLAN_SD = 0.25  # what a plan may be off by beyond that
STEP_SD = 0.1  # of single steps, until there are enough to tell
FLOOR_SD = 0.005  # a median is never better than this: machines drift

WINDOW = 64  # steps of a plan that are remembered
_STEP_SD_WORTH = 4  # observations that STEP_SD counts for
_MAD_TO_SD = 1.4826  # of a normal distribution
_MEDIAN_VARIANCE = math.pi / 2  # of a median over that of a mean

# How many doublings of each size until errors are unrelated: tp, pp, dp, vpp, micro-batch, number of micro-batches.
# The last is long because step time is nearly linear in it at a fixed layout, and the closed form has that line.
_LENGTH_SCALES = np.array([2.0, 2.0, 2.0, 2.0, 3.0, 12.0])


@dataclass(frozen=True)
class PlanHistory:
    """The latest step times of one plan [s], and how many there were in all."""

    plan: Plan
    window: tuple[float, ...]
    steps: int

    def add(self, step_time_s: float) -> PlanHistory:
        """The history with one more step."""
        return replace(self, window=(*self.window, step_time_s)[-WINDOW:], steps=self.steps + 1)

    def log_median(self) -> tuple[float, float]:
        """Median of the log step time and the variance of that median; both bear a minority of odd steps."""
        logs = np.log(np.asarray(self.window))
        median = float(np.median(logs))
        spread = _MAD_TO_SD * float(np.median(np.abs(logs - median)))
        variance = (_STEP_SD_WORTH * STEP_SD**2 + logs.size * spread**2) / (_STEP_SD_WORTH + logs.size)
        return median, _MEDIAN_VARIANCE * variance / logs.size + FLOOR_SD**2


@dataclass(frozen=True)
class Predictions:
    """What is expected of n plans, in their order."""

    step_time_s: Array  # [n] median
    log_sd: Array  # [n] standard deviation of the log step time
    observed_steps: NDArray[np.int64]  # [n] steps measured of that very plan
    features: Array  # [n, 6] what the covariance before any measurement is computed from
    explained: Array  # [observed plans, n] columns whose products are what the measurements took from it

    def log_covariance(self) -> Array:
        """[n, n] covariance of the log step times; n x n numbers, so not for thousands of plans."""
        return _kernel(self.features, self.features) - self.explained.T @ self.explained

    def log_ratio_sd(self, reference: int) -> Array:
        """[n] standard deviation of log(step time / step time of plan number ``reference``); 0 for that plan."""
        shared = _kernel(self.features, self.features[reference : reference + 1])[:, 0]
        shared = shared - self.explained.T @ self.explained[:, reference]
        variance = self.log_sd**2 + self.log_sd[reference] ** 2 - 2.0 * shared
        variance[reference] = 0.0
        return np.asarray(np.sqrt(np.maximum(variance, 0.0)))


@dataclass(frozen=True)
class ThroughputModel:
    """Step times of any plan of one model on one machine. A value: :meth:`observe` returns the next one."""

    model: ModelShape
    hardware: Hardware
    histories: tuple[PlanHistory, ...] = ()

    def observe(self, plan: Plan, step_time_s: float) -> ThroughputModel:
        """The model after a step of ``plan`` took ``step_time_s``. Steps right after a switch are better left out.

        Raises:
            ValueError: a time that is not a positive finite number.
        """
        if not (math.isfinite(step_time_s) and step_time_s > 0):
            raise ValueError(f"a step takes a positive number of seconds, not {step_time_s}")
        known = {history.plan: history for history in self.histories}
        known[plan] = known.get(plan, PlanHistory(plan, (), 0)).add(step_time_s)
        return replace(self, histories=tuple(known.values()))

    def predict(self, plans: Sequence[Plan]) -> Predictions:
        """Expected step times of ``plans``, measured or not, with their joint uncertainty."""
        features = _features(plans)
        log_prior = self._log_prior(plans)
        steps = {history.plan: history.steps for history in self.histories}
        correction, explained = self._posterior(features)
        variance = COMMON_SD**2 + PLAN_SD**2 - np.sum(explained**2, axis=0)
        return Predictions(
            step_time_s=np.exp(log_prior + correction),
            log_sd=np.sqrt(np.maximum(variance, 0.0)),
            observed_steps=np.array([steps.get(plan, 0) for plan in plans], dtype=np.int64),
            features=features,
            explained=explained,
        )

    def _log_prior(self, plans: Sequence[Plan]) -> Array:
        """[n] log of the closed form's step times."""
        return np.log([step_time_parts(plan, self.model, self.hardware).total for plan in plans])

    def _posterior(self, features: Array) -> tuple[Array, Array]:
        """[n] expected log correction, and [observed, n] factors of the covariance that measurements took away."""
        seen = [history.plan for history in self.histories]
        medians = np.array([history.log_median() for history in self.histories]).reshape(-1, 2)
        seen_features = _features(seen)
        covariance = _kernel(seen_features, seen_features) + np.diag(medians[:, 1])
        factor = np.linalg.cholesky(covariance)
        explained = np.linalg.solve(factor, _kernel(seen_features, features))
        residual = np.linalg.solve(factor, medians[:, 0] - self._log_prior(seen))
        return explained.T @ residual, explained

    def to_json(self) -> dict[str, Any]:
        """Plain values; through ``json`` and :meth:`from_json` they come back to the last bit (floats by ``repr``)."""
        histories = [
            {"plan": history.plan.to_json(), "window": list(history.window), "steps": history.steps}
            for history in self.histories
        ]
        return {"model": asdict(self.model), "hardware": asdict(self.hardware), "histories": histories}

    @staticmethod
    def from_json(values: dict[str, Any]) -> ThroughputModel:
        """Inverse of :meth:`to_json`."""
        histories = tuple(
            PlanHistory(plan_from_json(history["plan"]), tuple(history["window"]), history["steps"])
            for history in values["histories"]
        )
        return ThroughputModel(ModelShape(**values["model"]), Hardware(**values["hardware"]), histories)


def _features(plans: Sequence[Plan]) -> Array:
    """[n, 6] doublings of the sizes that a plan is told apart by, each divided by its length scale."""
    sizes = [(p.layout.tp, p.layout.pp, p.layout.dp, p.layout.vpp, p.micro_batch, p.num_microbatches) for p in plans]
    return np.asarray(np.log2(np.array(sizes, dtype=np.float64).reshape(-1, _LENGTH_SCALES.size)) / _LENGTH_SCALES)


def _kernel(left: Array, right: Array) -> Array:
    """[n, m] covariance of the log errors before any measurement: the common one, and a squared exponential."""
    square = np.sum(left**2, axis=1)[:, None] + np.sum(right**2, axis=1)[None, :] - 2.0 * left @ right.T
    return COMMON_SD**2 + PLAN_SD**2 * np.exp(-0.5 * np.maximum(square, 0.0))
