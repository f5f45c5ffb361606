"""Predicted step times with their uncertainty: a closed form, corrected by every step that is measured.

The logarithm of observed / predicted is a Gaussian process over plans and time (Rasmussen and Williams 2006, eq. 2.23
and 2.24) with the covariance of :mod:`copus_ext.core.cost.error_kernel`. A visit to a plan enters with the median of
its steps, so evaluations, checkpoints and other odd steps do no harm as long as they are few. Predictions are for now.
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
from copus_ext.core.cost.visits import Visits
from copus_ext.core.plan import Plan

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """What is expected of n plans, in their order."""

    parts: StepTimeParts  # of the closed form, before any correction; each [n]
    step_time_s: Array  # [n] median
    log_sd: Array  # [n] standard deviation of the log step time
    observed_steps: NDArray[np.int64]  # [n] steps of that very plan that are remembered
    features: Features  # what the covariance before any measurement is computed from
    explained: Array  # [at most observed plans + 1, n] columns whose products are what the measurements took from it
    own_sd: float  # of the deviation that a layout has with a micro-batch, and shares with no other
    drift_sd: float  # of what the machine drifts by, which all plans share
    kernel: ErrorKernel

    def log_covariance(self) -> Array:
        """[n, n] covariance of the log step times; n x n numbers, so not for thousands of plans."""
        before = self.kernel.between(self.features, self.features) + self.drift_sd**2
        before = before + self.own_sd**2 * self.features.own_deviation(self.features)
        return np.asarray(before - self.explained.T @ self.explained)

    def log_ratio_sd(self, reference: int) -> Array:
        """[n] standard deviation of log(step time / step time of plan number ``reference``); 0 for that plan."""
        one = self.features.take(slice(reference, reference + 1))
        shared = self.kernel.between(self.features, one)[:, 0] + self.drift_sd**2
        shared = shared + self.own_sd**2 * self.features.own_deviation(one)[:, 0]
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
    seen: Visits = field(default_factory=Visits)
    options: RunOptions = field(default_factory=RunOptions)
    kernel: ErrorKernel = field(default_factory=ErrorKernel)

    def observe(self, plan: Plan, step_time_s: float) -> ThroughputModel:
        """The model after a step of ``plan`` took ``step_time_s``. Steps right after a switch are better left out.

        Raises:
            ValueError: a time that is not a positive finite number.
        """
        if not (math.isfinite(step_time_s) and step_time_s > 0):
            raise ValueError(f"a step takes a positive number of seconds, not {step_time_s}")
        return replace(self, seen=self.seen.add(plan, step_time_s))

    def later(self, seconds: float = 0.0) -> ThroughputModel:
        """The model after some time in which nothing was measured: the next step begins another visit."""
        return replace(self, seen=self.seen.later(seconds))

    def after_a_break(self) -> ThroughputModel:
        """The model when what was measured is long ago."""
        return replace(self, seen=self.seen.after_a_break())

    def predict(self, plans: Sequence[Plan]) -> Predictions:
        """Expected step times of ``plans``, measured or not, with their joint uncertainty."""
        steps = self.seen.steps
        return self.predict_table(PlanTable.of(plans), np.array([steps[plan] for plan in plans], dtype=np.int64))

    def predict_table(self, table: PlanTable, observed_steps: NDArray[np.int64] | None = None) -> Predictions:
        """The same for plans as columns; where ``observed_steps`` are not told, they are given as 0."""
        parts = step_times(table, self.model, self.hardware, self.options)
        features = Features.of(table, parts)
        correction, explained, own_sd, drift_sd = self._posterior(features)
        variance = self.kernel.variance(features) + own_sd**2 + drift_sd**2 - np.sum(explained**2, axis=0)
        return Predictions(
            parts=parts,
            step_time_s=parts.total * np.exp(correction),
            log_sd=np.sqrt(np.maximum(variance, 0.0)),
            observed_steps=np.zeros(len(table), dtype=np.int64) if observed_steps is None else observed_steps,
            features=features,
            explained=explained,
            own_sd=own_sd,
            drift_sd=drift_sd,
            kernel=self.kernel,
        )

    def _posterior(self, features: Features) -> tuple[Array, Array, float, float]:
        """[n] expected log correction, [at most observed plans + 1, n] factors of the covariance that measurements took
        away, and the standard deviations of own deviations and of drift.
        """
        visits, kernel = self.seen.visits, self.kernel
        numbers = {plan: number for number, plan in enumerate(self.seen.steps)}
        visited = np.array([numbers[visit.plan] for visit in visits], dtype=np.int64)
        table = PlanTable.of(list(numbers))
        parts = step_times(table, self.model, self.hardware, self.options)
        seen = Features.of(table, parts)
        medians, noise = self.seen.log_medians()
        residual = medians - np.log(parts.total)[visited]
        times = np.array([visit.middle_s for visit in visits])
        shared = kernel.between(seen, seen)[np.ix_(visited, visited)] + np.diag(noise + kernel.visit_sd**2)
        own = seen.own_deviation(seen)[np.ix_(visited, visited)]
        own_sd, drift_sd = kernel.likeliest_sizes(shared, own, times, residual)
        within = shared + own_sd**2 * own + drift_sd**2 * kernel.persistence(times, times)
        # A visit shares with a plan now what the plan seen shares with it, and the drift: as many factors are enough.
        now = drift_sd**2 * kernel.persistence(times, np.array([self.seen.now_s]))
        factors = np.hstack([np.eye(len(numbers))[visited], now])
        between = kernel.between(seen, features) + own_sd**2 * seen.own_deviation(features)
        across = np.vstack([between, np.ones(len(features.shares))])
        correction, explained = explain(within, factors, residual)
        return correction @ across, np.linalg.qr(explained, mode="r") @ across, own_sd, drift_sd

    def to_json(self) -> dict[str, Any]:
        """Plain values; through ``json`` and :meth:`from_json` they come back to the last bit (floats by ``repr``)."""
        fixed = {name: asdict(getattr(self, name)) for name in ("model", "hardware", "options", "kernel")}
        return {**fixed, "seen": self.seen.to_json()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> ThroughputModel:
        """Inverse of :meth:`to_json`."""
        told = {"own_sd": 0.0, **values["kernel"]}  # logs from before there were own deviations
        kernel = ErrorKernel(**{**told, "lengths": tuple(told["lengths"])})
        return ThroughputModel(
            ModelShape(**values["model"]),
            hardware_from_json(values["hardware"]),
            Visits.from_json(values["seen"]),
            RunOptions(**values["options"]),
            kernel,
        )
