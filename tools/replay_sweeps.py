"""Replay measured sweeps: the error of predictions after a few plans were observed, and the regret of the choice.

    python tools/replay_sweeps.py [--table tests/data/cpu_sweep_4_ranks*.csv --hardware tests/data/cpu_4_ranks.toml]

Of each sweep among the published points, the constants are fitted without its source first. Every plan of a sweep is
the first one observed in turn. Prints JSON: by sweep ``median_error`` and ``coverage`` of the 90 % interval after
``--observed`` plans, ``median_error_left_out`` of each plan after all others, ``regret_of_first_choice`` of the plan
predicted best, and after ``--probes`` more ``regret_from_first_choice`` and ``mean_regret`` over all plans to start
from. Of each table also ``visits``: median errors of plans seen before and not, where every visit is predicted from
those before it, and ``coverage``.
``median_error_of_all`` is that of all predictions for the published sweeps, and for the tables, together: one of n
plans counts as n times n - observed.

Needs scipy: pip install "copus-megatron[fit]".
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.cost.error_kernel import ErrorKernel
from copus_ext.core.cost.hardware_file import load_hardware
from copus_ext.core.cost.options import FUSED, RunOptions
from copus_ext.core.cost.points import read_points
from copus_ext.core.cost.published import POINTS, Points, hardware_of, open_plans, read_fit, usable
from copus_ext.core.cost.sweep_replay import (
    Sweep,
    errors_after,
    errors_left_out,
    predicted_best,
    regret_after,
    visit_errors,
)
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.cost.throughput_table import ThroughputTable, read_table
from copus_ext.core.errors import UserError
from fit_throughput import START, Problem, constants_of, fit_constants

Replay = tuple[NDArray[np.float64], NDArray[np.bool_]]

_KERNEL = ErrorKernel()
_LEAST_PLANS = 8
_FIGURES = (
    "median_error",
    "median_error_left_out",
    "coverage",
    "regret_of_first_choice",
    "regret_from_first_choice",
    "mean_regret",
)


def published_sweeps(kernel: ErrorKernel) -> Iterator[Sweep]:
    """Sweeps of at least eight plans among the package's points."""
    fit = read_fit()
    points = Points(usable(read_points(POINTS)))
    problem = Problem.of(points, np.array(fit.weights))
    sources, names = points.labels("source"), np.array([point.row["sweep"] for point in points.points])
    for name in dict.fromkeys(names):
        rows = np.flatnonzero(names == name)
        if not name or rows.size < _LEAST_PLANS:
            continue
        others = np.flatnonzero(sources != sources[rows[0]])
        constants = constants_of(fit_constants(problem, fit.kernel, START, others, 12))
        own = [points.points[row] for row in rows]
        times = {open_plans(point)[0]: point.step_time_s or 0.0 for point in own}
        prior = ThroughputModel(own[0].model, constants.of(hardware_of(own[0])), options=own[0].options, kernel=kernel)
        yield Sweep(str(name), prior, tuple(times), tuple(times.values()))


def replays_of(sweep: Sweep, observed: int) -> list[Replay]:
    """Errors of what was not observed, and which intervals held, every plan being the first one in turn."""
    return [errors_after(sweep, observed, first) for first in range(len(sweep.plans))]


def judge(sweep: Sweep, replays: Sequence[Replay], probes: int) -> dict[str, Any]:
    """The figures of one sweep."""
    everyone = range(len(sweep.plans))
    first = predicted_best(sweep)
    return {
        "plans": len(sweep.plans),
        "median_error": float(np.mean([np.median(errors) for errors, _ in replays])),
        "coverage": float(np.mean([np.mean(held) for _, held in replays])),
        "median_error_left_out": float(np.median(errors_left_out(sweep))),
        "regret_of_first_choice": regret_after(sweep, 0, first),
        "regret_from_first_choice": regret_after(sweep, probes, first),
        "mean_regret": float(np.mean([regret_after(sweep, probes, start) for start in everyone])),
    }


def measured_table(path: str, visits: int | None = None) -> ThroughputTable:
    """A table of ``tools/profile_throughput.py``; of each plan so many visits."""
    table = read_table(path, "--table")
    if table.subject is None:
        raise UserError(f"--table {path} has no rows; make it with tools/profile_throughput.py")
    return replace(table, rows=tuple(row for row in table.rows if visits is None or row.lap <= visits))


def measured_sweep(name: str, prior: ThroughputModel, table: ThroughputTable) -> Sweep:
    """The plans of a table, each with the median of all its steps."""
    times = {plan: float(np.median(seconds)) for plan, seconds in table.step_times().items()}
    return Sweep(name, prior, tuple(times), tuple(times.values()))


def prior_of(table: ThroughputTable, hardware: str, kernel: ErrorKernel = _KERNEL) -> ThroughputModel:
    """What is expected of a table's plans before anything was measured."""
    assert table.subject is not None
    words = table.subject.options.split()
    options = RunOptions(**{name: f"no_{name}" not in words for name in FUSED})
    return ThroughputModel(table.subject.model, load_hardware(hardware), options=options, kernel=kernel)


def judge_visits(prior: ThroughputModel, table: ThroughputTable) -> dict[str, float | None]:
    """How well each visit is told by those before it; ``None`` where no plan is visited twice."""
    errors = visit_errors(prior, [(row.plan, row.step_times_s) for row in table.rows if row.step_times_s])
    known, unknown = ([abs(math.expm1(e.log_ratio)) for e in errors if e.known is which] for which in (True, False))
    return {
        "median_error_known": float(np.median(known)) if known else None,
        "median_error_unknown": float(np.median(unknown)) if unknown else None,
        "coverage": float(np.mean([e.is_within(0.9) for e in errors])) if errors else None,
    }


def main() -> int:
    """Replay all sweeps and print; 2 where a table can't be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", metavar="CSV", help="tables of measured step times, replayed as well")
    parser.add_argument("--hardware", default="a100", metavar="NAME", help="what they were measured on, name or file")
    parser.add_argument("--visits", type=int, metavar="N", help="use the first N visits to each plan of these tables")
    parser.add_argument("--observed", type=int, default=4, metavar="N", help="plans observed before errors are taken")
    parser.add_argument("--probes", type=int, default=3, metavar="N", help="plans tried after the first choice")
    parser.add_argument(
        "--own-sd", type=float, default=_KERNEL.own_sd, metavar="SD", help="least own deviation of layouts; 0: none"
    )
    parser.add_argument(
        "--drift-sd", type=float, default=_KERNEL.drift_sd, metavar="SD", help="for visits; 0: without drift"
    )
    args = parser.parse_args()
    kernel = replace(_KERNEL, own_sd=args.own_sd)
    try:
        tables = {path: measured_table(path, args.visits) for path in args.table or ()}
        priors = {path: prior_of(table, args.hardware, kernel) for path, table in tables.items()}
    except UserError as error:
        print(f"replay_sweeps.py: {error}", file=sys.stderr)
        return 2
    found: dict[str, dict[str, Any]] = {}
    together: dict[str, float] = {}
    measured = [measured_sweep(path, priors[path], table) for path, table in tables.items()]
    for kind, sweeps in (("published", list(published_sweeps(kernel))), ("tables", measured)):
        replays = [replays_of(sweep, args.observed) for sweep in sweeps]
        found |= {sweep.name: judge(sweep, each, args.probes) for sweep, each in zip(sweeps, replays, strict=True)}
        if sweeps:
            together[kind] = float(np.median(np.concatenate([errors for each in replays for errors, _ in each])))
    for path, table in tables.items():
        drifting = replace(priors[path], kernel=replace(kernel, drift_sd=args.drift_sd))
        found[path]["visits"] = judge_visits(drifting, table)
    means = {name: float(np.mean([figures[name] for figures in found.values()])) for name in _FIGURES}
    print(json.dumps({"sweeps": found, "mean_over_sweeps": means, "median_error_of_all": together}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
