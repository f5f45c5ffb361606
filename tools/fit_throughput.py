"""Fit the constants of the step time model to published measurements, and say how well it predicts unseen ones.

    python tools/fit_throughput.py                       fit to the points of the package, print the errors as JSON
    python tools/fit_throughput.py --write               and make them the ones that every prediction uses

Two things are fitted in turns: the constants by least squares, whitened by the covariance of the deviations; and that
covariance by marginal likelihood (Rasmussen and Williams 2006, section 5.4). Every point's noise has Student's t
distribution, so that single odd measurements count for little. All are held near plausible values by log-normal priors.
Those of the covariance are narrow: likelihood alone lets components explain what they do not, and predicts worse. What
it consists of and the medians of its priors were chosen, among some ninety, by the probability of what was left out,
which is therefore a little too high. What is left out has no part in any of the fits that predict it.

Needs scipy: pip install "copus-megatron[fit]".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize

from copus_ext.core.cost.constants import FITTED, OVERHEADS, Constants
from copus_ext.core.cost.hardware import Reached
from copus_ext.core.cost.points import read_points
from copus_ext.core.cost.published import (
    POINTS,
    Z90,
    Expected,
    Pairs,
    Points,
    PublishedFit,
    PublishedKernel,
    condition,
    covariance_terms,
    noise_variance,
    usable,
)
from copus_ext.core.errors import UserError
from copus_ext.core.files import write_whole

Array = NDArray[np.float64]
Rows = NDArray[np.int64]

# Where each constant is held: a median and the standard deviation of its logarithm.
PRIOR = {
    "latency_s": (1e-5, 0.5),
    "layer_overhead_s": (2e-4, 0.5),
    "step_overhead_s": (0.03, 0.5),
    "matmul": (0.8, 0.15),
    "half_tokens": (150.0, 0.7),
    "half_width": (160.0, 0.7),
    "attention": (0.45, 0.3),
    "scores": (0.35, 0.4),
    "memory": (0.8, 0.2),
    "intra_node": (0.65, 0.1),
    "inter_node": (0.6, 0.1),
    "fp8": (0.75, 0.15),
    "tensor_exposed": (0.3, 0.4),
    "pipeline_exposed": (1.0, 0.3),
    "data_exposed": (0.05, 0.4),
}
_NAMES = tuple(PRIOR)
START, _PRIOR_SD = (np.array(column) for column in zip(*((np.log(m), sd) for m, sd in PRIOR.values()), strict=True))

# The kernel's, likewise: standard deviations, then lengths (what does not vary among the points is left where it is),
# then scales by publisher: of its plans, and of its noise.
_SD_PRIOR_SD = {
    "gpu_sd": 0.35,
    "stack_sd": 0.35,
    "source_sd": 0.35,
    "stack_part_sd": 0.1,
    "source_part_sd": 0.1,
    "fp8_sd": 0.35,
    "plan_sd": 0.5,
    "machine_plan_sd": 0.5,
    "layout_sd": 0.5,
    "noise_sd": 0.1,
}
_SDS = tuple(_SD_PRIOR_SD)
_OF_PLANS = ("plan_sd", "machine_plan_sd")  # what lengths are for
_SCALED = (*_OF_PLANS, "layout_sd")
_FREE_LENGTHS = (0, 1, 2, 3, 4, 5, 10, 11)
_LENGTH_PRIOR_SD = 0.1
_SCALE_PRIOR_SD = 0.5

_FREEDOM = 3.0  # of Student's t
_TURNS = 4
_TRIES, _FOLD_TRIES = 8, 4  # of the least squares in each turn; with points left out it starts where all points led
_KERNEL_TRIES, _FOLD_KERNEL_TRIES = 30, 10  # likewise, of the likelihood
_REWEIGHTINGS = 5


class Problem(NamedTuple):
    """The points, what they have in common, and how much each counts."""

    points: Points
    pairs: Pairs
    weights: Array

    @classmethod
    def of(cls, points: Points, weights: Array | None = None) -> Problem:
        """At first all points count alike."""
        return cls(points, Pairs.of(points, points), np.ones(len(points.points)) if weights is None else weights)

    def noise(self, kernel: PublishedKernel) -> Array:
        """[n] variance of each point's own noise."""
        return np.asarray(kernel.noise(self.points) ** 2 / self.weights)

    def terms(self, kernel: PublishedKernel, expected: Expected, rows: Rows) -> dict[str, Array]:
        """What the covariance of ln(measured / closed form) of the points ``rows`` is the sum of, but for noise."""
        own = expected.take(rows)
        return covariance_terms(kernel, self.pairs.take(rows), own, own)

    def residual_covariance(self, kernel: PublishedKernel, expected: Expected, rows: Rows) -> Array:
        """Their covariance, noise included."""
        own = np.diag((self.noise(kernel) + expected.spread)[rows])
        return np.asarray(sum(self.terms(kernel, expected, rows).values()) + own)


def publishers_of(points: Points) -> list[str]:
    """Everyone who published, once."""
    return list(dict.fromkeys(points.labels("publisher").tolist()))


def constants_of(log_values: Array) -> Constants:
    """Constants from the vector that is fitted."""
    values = {name: float(np.exp(value)) for name, value in zip(_NAMES, log_values, strict=True)}
    return Constants(
        **{name: values[name] for name in OVERHEADS},
        reached=Reached(**{name: value for name, value in values.items() if name not in OVERHEADS}),
    )


def kernel_of(log_values: Array, publishers: Sequence[str]) -> PublishedKernel:
    """The kernel from the vector that is fitted."""
    sds, free, plans, noise = _split(np.exp(log_values), len(publishers))
    lengths = list(PublishedKernel().lengths)
    for place, value in zip(_FREE_LENGTHS, free.tolist(), strict=True):
        lengths[place] = value
    return PublishedKernel(
        **dict(zip(_SDS, sds.tolist(), strict=True)),
        lengths=tuple(lengths),
        plan_scale=dict(zip(publishers, plans.tolist(), strict=True)),
        noise_scale=dict(zip(publishers, noise.tolist(), strict=True)),
    )


def _split(values: Array, publishers: int) -> list[Array]:
    """Standard deviations, lengths, scales of plans, scales of noise."""
    return np.split(values, np.cumsum([len(_SDS), len(_FREE_LENGTHS), publishers]))


def kernel_start(publishers: int) -> tuple[Array, Array]:
    """Medians and standard deviations of the logarithms of what the kernel consists of."""
    first = PublishedKernel()
    start = [getattr(first, name) for name in _SDS] + [first.lengths[place] for place in _FREE_LENGTHS]
    sds = [*_SD_PRIOR_SD.values(), *(_LENGTH_PRIOR_SD for _ in _FREE_LENGTHS)]
    scales = np.full(2 * publishers, _SCALE_PRIOR_SD)
    return np.concatenate([np.log(start), np.zeros(2 * publishers)]), np.concatenate([sds, scales])


def fit_constants(problem: Problem, kernel: PublishedKernel, start: Array, rows: Rows, tries: int) -> Array:
    """Generalised least squares for the constants, over the points ``rows``."""
    within = problem.residual_covariance(kernel, problem.points.expected(constants_of(start)), rows)
    factor = np.linalg.cholesky(within)
    measured = problem.points.log_measured

    def whitened(values: Array) -> Array:
        residual = (measured - problem.points.expected(constants_of(values)).log_s)[rows]
        return np.concatenate([np.linalg.solve(factor, residual), (values - START) / _PRIOR_SD])

    return np.asarray(least_squares(whitened, start, x_scale=_PRIOR_SD, max_nfev=tries).x)


def fit_kernel(problem: Problem, expected: Expected, start: Array, rows: Rows, tries: int) -> Array:
    """The kernel of highest marginal likelihood of the points ``rows``, at these expectations."""
    options = {"maxiter": tries}
    return np.asarray(minimize(kernel_cost, start, (problem, expected, rows), "L-BFGS-B", jac=True, options=options).x)


def kernel_cost(values: Array, problem: Problem, expected: Expected, rows: Rows) -> tuple[float, Array]:
    """Minus the logarithm of the marginal likelihood and of the prior, and its slope.

    Rasmussen and Williams 2006, eq. 5.8 and 5.9.
    """
    publishers = publishers_of(problem.points)
    kernel = kernel_of(values, publishers)
    residual = (problem.points.log_measured - expected.log_s)[rows]
    medians, sds = kernel_start(len(publishers))
    terms, noise = problem.terms(kernel, expected, rows), problem.noise(kernel)[rows]
    within = np.asarray(sum(terms.values()) + np.diag(noise + expected.spread[rows]))
    inverse = np.linalg.inv(within)
    white = inverse @ residual
    cost = 0.5 * residual @ white + np.sum(np.log(np.diag(np.linalg.cholesky(within))))
    by_covariance = 0.5 * (inverse - np.outer(white, white))
    away = (values - medians) / sds
    slope = _slope(problem, kernel, expected.coordinates, terms, noise, by_covariance, rows)
    return float(cost + 0.5 * away @ away), slope + away / sds


def _slope(
    problem: Problem,
    kernel: PublishedKernel,
    coordinates: Array,
    terms: dict[str, Array],
    noise: Array,
    by_covariance: Array,
    rows: Rows,
) -> Array:
    """Derivatives by the logarithms of the kernel's values of what has ``by_covariance`` by the covariance."""
    by_noise = np.diag(by_covariance) * noise
    by_term = {name: by_covariance * term for name, term in terms.items()}
    of_sds = [2.0 * np.sum(by_term[name]) for name in _SDS[:-1]] + [2.0 * np.sum(by_noise)]
    by_plan = sum(by_term[name] for name in _OF_PLANS)
    of_lengths = []
    for place in _FREE_LENGTHS:
        apart = np.subtract.outer(coordinates[rows, place], coordinates[rows, place]) / kernel.lengths[place]
        of_lengths.append(np.sum(by_plan * apart**2))
    scaled = 2.0 * np.sum(sum(by_term[name] for name in _SCALED), axis=1)
    own = problem.points.labels("publisher")[rows, None] == np.array(publishers_of(problem.points))
    return np.concatenate([of_sds, of_lengths, scaled @ own, 2.0 * by_noise @ own])


def reweighted(problem: Problem, expected: Expected, kernel: PublishedKernel, rows: Rows) -> Problem:
    """The points ``rows`` weighed by how odd their noise looks: expectation maximisation for Student's t."""
    shared = sum(problem.terms(kernel, expected, rows).values()) + np.diag(expected.spread[rows])
    residual = (problem.points.log_measured - expected.log_s)[rows]
    usual = kernel.noise(problem.points)[rows] ** 2
    weights = problem.weights.copy()
    for _ in range(_REWEIGHTINGS):
        noise = usual / weights[rows]
        inverse = np.linalg.inv(shared + np.diag(noise))
        mean = noise * (inverse @ residual)
        variance = noise - noise**2 * np.diag(inverse)
        weights[rows] = (_FREEDOM + 1) / (_FREEDOM + (mean**2 + variance) / usual)
    return problem._replace(weights=weights)


def fit(points: Points, report: Callable[[str], None]) -> tuple[Problem, Array, Array]:
    """Points with their weights, the constants and the kernel, both as logarithms."""
    publishers = publishers_of(points)
    problem, constants, values = Problem.of(points), START, kernel_start(len(publishers))[0]
    rows = np.arange(len(points.points))
    for turn in range(_TURNS):
        constants = fit_constants(problem, kernel_of(values, publishers), constants, rows, _TRIES)
        expected = points.expected(constants_of(constants))
        values = fit_kernel(problem, expected, values, rows, _KERNEL_TRIES)
        problem = reweighted(problem, expected, kernel_of(values, publishers), rows)
        report(f"turn {turn + 1} of {_TURNS}")
    return problem, constants, values


def cross_validate(problem: Problem, constants: Array, values: Array, folds: NDArray[np.str_]) -> dict[str, Any]:
    """Predict every fold from all others: constants, kernel and weights are fitted without it."""
    points, publishers = problem.points, publishers_of(problem.points)
    off, sd = np.zeros(folds.size), np.zeros(folds.size)
    for fold in dict.fromkeys(folds):
        out, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        start = forget_others(points, values, rest)
        found = fit_constants(problem, kernel_of(start, publishers), constants, rest, _FOLD_TRIES)
        off[out], sd[out] = predict_fold(problem, points.expected(constants_of(found)), start, rest, out)
    error, held = np.abs(np.expm1(off)), np.abs(off) < Z90 * sd
    return {
        "points": int(folds.size),
        "folds": len(set(folds)),
        "median_error": float(np.median(error)),
        "p90_error": float(np.quantile(error, 0.9)),
        "coverage_of_90_percent": float(np.mean(held)),
        "by_publisher": _by_publisher(points, error, held),
    }


def forget_others(points: Points, values: Array, rows: Rows) -> Array:
    """The kernel without the scales of publishers who have none of the points ``rows``: they are 1, their median."""
    seen = np.isin(publishers_of(points), points.labels("publisher")[rows])
    return np.concatenate([values[: -2 * seen.size], np.tile(seen, 2) * values[-2 * seen.size :]])


def predict_fold(problem: Problem, expected: Expected, start: Array, rest: Rows, out: Rows) -> tuple[Array, Array]:
    """ln(predicted / measured) of the points ``out`` from those of ``rest``, and its standard deviation.

    Kernel and weights are fitted to ``rest``, from where all points led.
    """
    points, publishers = problem.points, publishers_of(problem.points)
    kernel = kernel_of(fit_kernel(problem, expected, start, rest, _FOLD_KERNEL_TRIES), publishers)
    weights = reweighted(problem, expected, kernel, rest).weights[rest]
    shared = np.asarray(sum(problem.terms(kernel, expected, np.arange(len(points.points))).values()))
    noise = kernel.noise(points)[rest] ** 2 / weights + expected.spread[rest]
    residual = points.log_measured - expected.log_s
    within = shared[np.ix_(rest, rest)] + np.diag(noise)
    mean, variance = condition(within, shared[np.ix_(rest, out)], np.diag(shared)[out], residual[rest])
    own = noise_variance(kernel, weights, points)[out] + expected.spread[out]
    return mean - residual[out], np.sqrt(variance + own)


def _by_publisher(points: Points, error: Array, held: NDArray[np.bool_]) -> dict[str, dict[str, float]]:
    labels = points.labels("publisher")
    return {
        publisher: {
            "points": int(np.sum(labels == publisher)),
            "median_error": float(np.median(error[labels == publisher])),
            "coverage_of_90_percent": float(np.mean(held[labels == publisher])),
        }
        for publisher in publishers_of(points)
    }


def layouts_of(points: Points) -> NDArray[np.str_]:
    """[n] what tells layouts apart: rows of one GPU, model and layout are one, whoever measured them, and when."""
    keys = ("gpu", "model", "tp", "pp", "vpp", "cp", "ep")
    return np.array(["|".join(point.row.get(key, "") for key in keys) for point in points.points])


def memory_bias(points: Points) -> dict[str, float]:
    """By software: median of ln(reported / computed) memory, of at least two points."""
    reported = np.array([float(point.row.get("mem_gb") or "nan") * 1e9 for point in points.points])
    ratio, stacks = np.log(reported / points.memory()), points.labels("stack")
    known = np.isfinite(ratio)
    return {
        str(stack): float(np.median(ratio[known & (stacks == stack)]))
        for stack in dict.fromkeys(stacks)
        if np.sum(known & (stacks == stack)) > 1
    }


def main() -> None:
    """Fit, cross-validate, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", default=str(POINTS), metavar="CSV", help="measurements (default: the package's)")
    parser.add_argument("--write", action="store_true", help=f"write {FITTED.name}, which every prediction uses")
    args = parser.parse_args()
    points = Points(usable(read_points(args.points)))
    problem, log_constants, log_kernel = fit(points, lambda text: print(text, file=sys.stderr, flush=True))
    kernel = kernel_of(log_kernel, publishers_of(points))
    found = PublishedFit(constants_of(log_constants), kernel, tuple(problem.weights.tolist()), memory_bias(points))
    errors = {
        "unseen_layouts": cross_validate(problem, log_constants, log_kernel, layouts_of(points)),
        "unseen_sources": cross_validate(problem, log_constants, log_kernel, points.labels("publisher")),
    }
    print(json.dumps({**found.to_json(), "weights": None, **errors}, indent=1))
    if args.write:
        write_whole(Path(FITTED), json.dumps({**found.to_json(), "errors": errors}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"fit_throughput.py: {error}", file=sys.stderr)
        sys.exit(2)
