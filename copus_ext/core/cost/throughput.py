"""Predicted step times with their uncertainty: a closed form, corrected by every step that is measured.

The logarithm of observed / predicted is a Gaussian process over plans (Rasmussen and Williams 2006, eq. 2.23 and 2.24)
with the covariance of :mod:`copus_ext.core.cost.error_kernel`. A plan enters with the median of its steps, so
evaluations, checkpoints and other odd steps do no harm as long as they are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.cost.error_kernel import ErrorKernel, Features, explain
from copus_ext.core.cost.hardware import Hardware, hardware_from_json
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import RunOptions
from copus_ext.core.cost.plan_table import PlanTable
from copus_ext.core.cost.step_time import StepTimeParts, step_times
from copus_ext.core.plan import Plan, plan_from_json

Array = NDArray[np.float64]

STEP_SD = 0.1  # of the logarithm of single steps, until there are enough to tell
FLOOR_SD = 0.005  # a median is never better than this: machines drift

WINDOW = 64  # steps of a plan that are remembered
_STEP_SD_WORTH = 4  # observations that STEP_SD counts for
_MAD_TO_SD = 1.4826  # of a normal distribution
_MEDIAN_VARIANCE = math.pi / 2  # of a median over that of a mean


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

    parts: StepTimeParts  # of the closed form, before any correction; each [n]
    step_time_s: Array  # [n] median
    log_sd: Array  # [n] standard deviation of the log step time
    observed_steps: NDArray[np.int64]  # [n] steps measured of that very plan
    features: Features  # what the covariance before any measurement is computed from
    explained: Array  # [observed plans, n] columns whose products are what the measurements took from it
    kernel: ErrorKernel

    def log_covariance(self) -> Array:
        """[n, n] covariance of the log step times; n x n numbers, so not for thousands of plans."""
        return self.kernel.between(self.features, self.features) - self.explained.T @ self.explained

    def log_ratio_sd(self, reference: int) -> Array:
        """[n] standard deviation of log(step time / step time of plan number ``reference``); 0 for that plan."""
        one = self.features.take(slice(reference, reference + 1))
        shared = self.kernel.between(self.features, one)[:, 0]
        shared = shared - self.explained.T @ self.explained[:, reference]
        variance = self.log_sd**2 + self.log_sd[reference] ** 2 - 2.0 * shared
        variance[reference] = 0.0
        return np.asarray(np.sqrt(np.maximum(variance, 0.0)))

    def interval(self, probability: float = 0.9) -> tuple[Array, Array]:
        """[n] lower and [n] upper end of the credible interval of the step times, in seconds."""
        z = NormalDist().inv_cdf(0.5 + probability / 2)
        return self.step_time_s * np.exp(-z * self.log_sd), self.step_time_s * np.exp(z * self.log_sd)


@dataclass(frozen=True)
class ThroughputModel:
    """Step times of any plan of one model on one machine. A value: :meth:`observe` returns the next one."""

    model: ModelShape
    hardware: Hardware
    histories: tuple[PlanHistory, ...] = ()
    options: RunOptions = field(default_factory=RunOptions)
    kernel: ErrorKernel = field(default_factory=ErrorKernel)

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
        steps = {history.plan: history.steps for history in self.histories}
        return self.predict_table(PlanTable.of(plans), np.array([steps.get(plan, 0) for plan in plans], dtype=np.int64))

    def predict_table(self, table: PlanTable, observed_steps: NDArray[np.int64] | None = None) -> Predictions:
        """The same for plans as columns; where ``observed_steps`` are not told, they are given as 0."""
        parts = step_times(table, self.model, self.hardware, self.options)
        features = Features.of(table, parts)
        correction, explained = self._posterior(features)
        variance = self.kernel.variance(features) - np.sum(explained**2, axis=0)
        return Predictions(
            parts=parts,
            step_time_s=parts.total * np.exp(correction),
            log_sd=np.sqrt(np.maximum(variance, 0.0)),
            observed_steps=np.zeros(len(table), dtype=np.int64) if observed_steps is None else observed_steps,
            features=features,
            explained=explained,
            kernel=self.kernel,
        )

    def _posterior(self, features: Features) -> tuple[Array, Array]:
        """[n] expected log correction, and [observed, n] factors of the covariance that measurements took away."""
        medians = np.array([history.log_median() for history in self.histories]).reshape(-1, 2)
        table = PlanTable.of([history.plan for history in self.histories])
        parts = step_times(table, self.model, self.hardware, self.options)
        seen = Features.of(table, parts)
        within = self.kernel.between(seen, seen) + np.diag(medians[:, 1])
        return explain(within, self.kernel.between(seen, features), medians[:, 0] - np.log(parts.total))

    def to_json(self) -> dict[str, Any]:
        """Plain values; through ``json`` and :meth:`from_json` they come back to the last bit (floats by ``repr``)."""
        histories = [
            {"plan": history.plan.to_json(), "window": list(history.window), "steps": history.steps}
            for history in self.histories
        ]
        fixed = {name: asdict(getattr(self, name)) for name in ("model", "hardware", "options", "kernel")}
        return {**fixed, "histories": histories}

    @staticmethod
    def from_json(values: dict[str, Any]) -> ThroughputModel:
        """Inverse of :meth:`to_json`."""
        histories = tuple(
            PlanHistory(plan_from_json(history["plan"]), tuple(history["window"]), history["steps"])
            for history in values["histories"]
        )
        kernel = ErrorKernel(**{**values["kernel"], "lengths": tuple(values["kernel"]["lengths"])})
        return ThroughputModel(
            ModelShape(**values["model"]),
            hardware_from_json(values["hardware"]),
            histories,
            RunOptions(**values["options"]),
            kernel,
        )
