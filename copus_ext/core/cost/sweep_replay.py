"""What a planner would have made of a sweep that was measured: how soon its predictions were right, and its choice.

A sweep is a set of plans of one model on one machine with the step time of each. It is replayed as a run would meet it:
a plan is observed, the model learns, and says of all the others how long they take.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.efficiency.goodput import expected_improvement
from copus_ext.core.plan import Plan

_STEPS = 8  # that each plan is observed for; the published time of a sweep stands for all of them


@dataclass(frozen=True)
class Sweep:
    """Plans and their measured seconds per step. ``prior`` has observed nothing yet."""

    name: str
    prior: ThroughputModel
    plans: tuple[Plan, ...]
    seconds: tuple[float, ...]

    @property
    def per_sequence(self) -> NDArray[np.float64]:
        """[n] seconds per sequence: what plans of unequal global batch are compared by."""
        return np.asarray(np.array(self.seconds) / np.array([plan.global_batch for plan in self.plans]))


def observe(sweep: Sweep, model: ThroughputModel, number: int) -> ThroughputModel:
    """The model after plan ``number`` has run for a while."""
    for _ in range(_STEPS):
        model = model.observe(sweep.plans[number], sweep.seconds[number])
    return model


def most_uncertain(sweep: Sweep, observed: Sequence[int], model: ThroughputModel) -> int:
    """The plan that least is known about: what observing is for when all predictions are to be right."""
    sd = model.predict(sweep.plans).log_sd
    sd[list(observed)] = -1.0
    return int(np.argmax(sd))


def most_promising(sweep: Sweep, observed: Sequence[int], model: ThroughputModel) -> int | None:
    """The plan with the highest expected improvement on the best one observed: what probing is for. None: no other."""
    best = min(observed, key=lambda number: sweep.per_sequence[number])
    predictions = model.predict(sweep.plans)
    batches = np.array([plan.global_batch for plan in sweep.plans])
    log_ratio = np.log(batches / predictions.step_time_s)
    hope, _ = expected_improvement(log_ratio - log_ratio[best], predictions.log_ratio_sd(best))
    hope[list(observed)] = -1.0
    return int(np.argmax(hope)) if hope.max() > 0 else None


def errors_after(sweep: Sweep, observations: int, first: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Relative errors of all plans that were not observed, and whether the 90 % interval held each.

    Args:
        sweep: what to replay.
        observations: how many plans are observed, one after another, each the one least is known about.
        first: number of the first one.
    """
    observed, model = [first], observe(sweep, sweep.prior, first)
    while len(observed) < observations:
        observed.append(most_uncertain(sweep, observed, model))
        model = observe(sweep, model, observed[-1])
    others = np.setdiff1d(np.arange(len(sweep.plans)), observed)
    predictions, measured = model.predict(sweep.plans), np.array(sweep.seconds)
    low, high = predictions.interval(0.9)
    held = (low <= measured) & (measured <= high)
    return np.abs(predictions.step_time_s / measured - 1.0)[others], held[others]


def errors_left_out(sweep: Sweep) -> NDArray[np.float64]:
    """Relative error of each plan when all others were observed: what a few can hardly improve on."""
    errors = []
    for left_out, (plan, seconds) in enumerate(zip(sweep.plans, sweep.seconds, strict=True)):
        model = sweep.prior
        for number in range(len(sweep.plans)):
            if number != left_out:
                model = observe(sweep, model, number)
        errors.append(abs(float(model.predict([plan]).step_time_s[0]) / seconds - 1.0))
    return np.array(errors)


def regret_after(sweep: Sweep, probes: int, first: int) -> float:
    """How much slower the fastest plan observed is than the fastest there is, after so many probes from ``first``."""
    observed, model = [first], observe(sweep, sweep.prior, first)
    for _ in range(probes):
        number = most_promising(sweep, observed, model)
        if number is None:
            break
        observed.append(number)
        model = observe(sweep, model, number)
    cost = sweep.per_sequence
    return float(cost[observed].min() / cost.min() - 1.0)


def predicted_best(sweep: Sweep) -> int:
    """The plan that looks fastest before any was observed."""
    batches = np.array([plan.global_batch for plan in sweep.plans])
    return int(np.argmin(sweep.prior.predict(sweep.plans).step_time_s / batches))


@dataclass(frozen=True)
class VisitError:
    """How a visit to a plan came out that was predicted from all before it.

    ``log_ratio``: ln(measured / predicted); ``log_sd``: what that was expected to scatter by, the visit's own noise
    included; ``known``: the plan had been visited before.
    """

    log_ratio: float
    log_sd: float
    known: bool

    def is_within(self, probability: float) -> bool:
        """The credible interval held it."""
        return abs(self.log_ratio) < NormalDist().inv_cdf(0.5 + probability / 2) * self.log_sd


def visit_errors(model: ThroughputModel, visits: Iterable[tuple[Plan, Sequence[float]]]) -> list[VisitError]:
    """Go through visits in the order they were made in, predict each but the first, and learn from it."""
    errors = []
    for plan, seconds in visits:
        before = model.later()
        model = before
        for step in seconds:
            model = model.observe(plan, step)
        if not before.seen.visits:
            continue
        expected = before.predict([plan])
        medians, variances = model.seen.log_medians()
        off = float(medians[-1] - np.log(expected.step_time_s[0]))
        sd = math.sqrt(expected.log_sd[0] ** 2 + model.kernel.visit_sd**2 + variances[-1])
        errors.append(VisitError(off, sd, plan in before.seen.steps))
    return errors
