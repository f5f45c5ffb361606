"""Fit the constants of the step time model to published measurements, and say how well it predicts unseen ones.

    python tools/fit_throughput.py                       fit to the points of the package, print the errors as JSON
    python tools/fit_throughput.py --write               and make them the ones that every prediction uses

Two things are fitted in turns: the constants by least squares, whitened by the covariance of the deviations; and that
covariance by marginal likelihood (Rasmussen and Williams 2006, section 5.4). Every point's noise has Student's t
distribution, so that single odd measurements count for little. All are held near plausible values by log-normal priors.
Those of the covariance are narrow: likelihood alone lets components explain what they do not, and predicts worse. Their
medians were chosen, among some thirty, by the errors on layouts left out, which are therefore a little too good.

Needs scipy: pip install "copus-megatron[fit]".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize

from copus_ext.core.constants import FITTED, OVERHEADS, Constants
from copus_ext.core.errors import UserError
from copus_ext.core.files import write_whole
from copus_ext.core.hardware import Reached
from copus_ext.core.points import read_points
from copus_ext.core.published import (
    POINTS,
    Z90,
    Expected,
    Points,
    PublishedFit,
    PublishedKernel,
    condition,
    covariance,
    noise_variance,
    usable,
)

Array = NDArray[np.float64]

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

# The kernel's, likewise: standard deviations, then lengths. What does not vary among the points is left where it is.
_SDS = ("gpu_sd", "stack_sd", "source_sd", "stack_part_sd", "source_part_sd", "fp8_sd", "plan_sd", "noise_sd")
_SD_PRIOR_SD = np.array([0.35, 0.35, 0.35, 0.1, 0.1, 0.35, 0.2, 0.1])
_FREE_LENGTHS = (0, 1, 2, 3, 4, 5, 10, 11)
_LENGTH_PRIOR_SD = 0.1

_FREEDOM = 3.0  # of Student's t
_TURNS = 4
_TRIES = 8  # of the least squares, in each turn
_FOLD_TRIES = 4  # with points left out: it starts where all points led
_REWEIGHTINGS = 5


class Problem(NamedTuple):
    """The points, and how much each counts."""

    points: Points
    weights: Array

    def residual_covariance(self, kernel: PublishedKernel, expected: Expected) -> Array:
        """[n, n] covariance of ln(measured / closed form), noise included."""
        shared = covariance(kernel, self.points, expected, self.points, expected)
        return shared + np.diag(kernel.noise_sd**2 / self.weights + expected.spread)


def constants_of(log_values: Array) -> Constants:
    """Constants from the vector that is fitted."""
    values = {name: float(np.exp(value)) for name, value in zip(_NAMES, log_values, strict=True)}
    return Constants(
        **{name: values[name] for name in OVERHEADS},
        reached=Reached(**{name: value for name, value in values.items() if name not in OVERHEADS}),
    )


def kernel_of(log_values: Array) -> PublishedKernel:
    """The kernel from the vector that is fitted."""
    values = np.exp(log_values)
    lengths = list(PublishedKernel().lengths)
    for place, value in zip(_FREE_LENGTHS, values[len(_SDS) :], strict=True):
        lengths[place] = float(value)
    return PublishedKernel(
        **{name: float(value) for name, value in zip(_SDS, values, strict=False)}, lengths=tuple(lengths)
    )


def kernel_start() -> tuple[Array, Array]:
    """Medians and standard deviations of the logarithms of what the kernel consists of."""
    first = PublishedKernel()
    start = [getattr(first, name) for name in _SDS] + [first.lengths[place] for place in _FREE_LENGTHS]
    return np.log(start), np.concatenate([_SD_PRIOR_SD, np.full(len(_FREE_LENGTHS), _LENGTH_PRIOR_SD)])


def fit_constants(
    problem: Problem, kernel: PublishedKernel, start: Array, rows: NDArray[np.int64], tries: int
) -> Array:
    """Generalised least squares for the constants, over the points ``rows``."""
    within = problem.residual_covariance(kernel, problem.points.expected(constants_of(start)))[np.ix_(rows, rows)]
    factor = np.linalg.cholesky(within)
    measured = problem.points.log_measured

    def whitened(values: Array) -> Array:
        residual = (measured - problem.points.expected(constants_of(values)).log_s)[rows]
        return np.concatenate([np.linalg.solve(factor, residual), (values - START) / _PRIOR_SD])

    return np.asarray(least_squares(whitened, start, x_scale=_PRIOR_SD, max_nfev=tries).x)


def fit_kernel(problem: Problem, constants: Array, start: Array) -> Array:
    """The kernel of highest marginal likelihood, at these constants."""
    expected = problem.points.expected(constants_of(constants))
    residual = problem.points.log_measured - expected.log_s
    medians, sds = kernel_start()

    def cost(values: Array) -> float:
        factor = np.linalg.cholesky(problem.residual_covariance(kernel_of(values), expected))
        white = np.linalg.solve(factor, residual)
        prior = float(np.sum(((values - medians) / sds) ** 2))
        return float(0.5 * white @ white + np.sum(np.log(np.diag(factor))) + 0.5 * prior)

    return np.asarray(minimize(cost, start, method="L-BFGS-B", options={"maxiter": 30}).x)


def reweighted(problem: Problem, constants: Array, kernel: PublishedKernel) -> Array:
    """Weights of the points by how odd their noise looks: one step of expectation maximisation for Student's t."""
    expected = problem.points.expected(constants_of(constants))
    inverse = np.linalg.inv(problem.residual_covariance(kernel, expected))
    noise = kernel.noise_sd**2 / problem.weights
    mean = noise * (inverse @ (problem.points.log_measured - expected.log_s))
    variance = noise - noise**2 * np.diag(inverse)
    return np.asarray((_FREEDOM + 1) / (_FREEDOM + (mean**2 + variance) / kernel.noise_sd**2))


def fit(points: Points, report: Callable[[str], None]) -> tuple[Problem, Array, Array]:
    """Points with their weights, the constants and the kernel, both as logarithms."""
    problem, constants, kernel = Problem(points, np.ones(len(points.points))), START, kernel_start()[0]
    rows = np.arange(len(points.points))
    for turn in range(_TURNS):
        constants = fit_constants(problem, kernel_of(kernel), constants, rows, _TRIES)
        kernel = fit_kernel(problem, constants, kernel)
        for _ in range(_REWEIGHTINGS):
            problem = Problem(points, reweighted(problem, constants, kernel_of(kernel)))
        report(f"turn {turn + 1} of {_TURNS}")
    return problem, constants, kernel


def cross_validate(
    problem: Problem, constants: Array, kernel: PublishedKernel, folds: NDArray[np.str_]
) -> dict[str, Any]:
    """Predict every fold from all others, constants fitted without it; the kernel and the weights stay."""
    measured = problem.points.log_measured
    error, covered = np.zeros(folds.size), np.zeros(folds.size, dtype=bool)
    for fold in dict.fromkeys(folds):
        out, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        expected = problem.points.expected(constants_of(fit_constants(problem, kernel, constants, rest, _FOLD_TRIES)))
        whole = problem.residual_covariance(kernel, expected)
        residual = measured - expected.log_s
        noise = kernel.noise_sd**2 / problem.weights + expected.spread  # of no use to the others
        shared = whole - np.diag(noise)
        across, prior = shared[np.ix_(rest, out)], np.diag(shared)[out]
        mean, variance = condition(whole[np.ix_(rest, rest)], across, prior, residual[rest])
        off = expected.log_s[out] + mean - measured[out]
        error[out] = np.abs(np.expm1(off))
        seen = noise_variance(kernel, problem.weights[rest])
        covered[out] = np.abs(off) < Z90 * np.sqrt(variance + seen + expected.spread[out])
    return {
        "points": int(folds.size),
        "folds": len(set(folds)),
        "median_error": float(np.median(error)),
        "p90_error": float(np.quantile(error, 0.9)),
        "coverage_of_90_percent": float(np.mean(covered)),
        "by_publisher": _by_publisher(problem.points, error),
    }


def _by_publisher(points: Points, error: Array) -> dict[str, dict[str, float]]:
    publishers = points.labels("publisher")
    found = {}
    for publisher in dict.fromkeys(publishers.tolist()):
        own = error[publishers == publisher]
        found[publisher] = {"points": own.size, "median_error": float(np.median(own))}
    return found


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
    constants, kernel = constants_of(log_constants), kernel_of(log_kernel)
    found = PublishedFit(constants, kernel, tuple(problem.weights.tolist()), memory_bias(points))
    errors = {
        "unseen_layouts": cross_validate(problem, log_constants, kernel, layouts_of(points)),
        "unseen_sources": cross_validate(problem, log_constants, kernel, points.labels("publisher")),
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
