"""Predictions from published runs: conditioning is right, known software is predicted well, and doubt is said."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from copus_ext.core.cost.constants import FITTED
from copus_ext.core.cost.points import Point, read_points, read_rows
from copus_ext.core.cost.published import (
    POINTS,
    Z90,
    Pairs,
    Points,
    condition,
    covariance,
    covariance_terms,
    noise_variance,
    read_fit,
    usable,
)
from fit_throughput import (
    Problem,
    forget_others,
    kernel_cost,
    kernel_of,
    kernel_start,
    layouts_of,
    predict_fold,
    publishers_of,
)
from predict_throughput import main, predictions

SHIPPED = usable(read_points(POINTS))
KNOWN, FIT = Points(SHIPPED), read_fit()


def relabelled(point: Point, **columns: str) -> Point:
    return replace(point, row={**point.row, **columns})


def test_conditioning_is_that_of_a_joint_normal() -> None:
    generator = np.random.default_rng(0)
    root = generator.standard_normal((9, 9))
    joint, values = root @ root.T, generator.standard_normal(6)
    mean, variance = condition(joint[:6, :6], joint[:6, 6:], np.diag(joint)[6:], values)
    gain = joint[6:, :6] @ np.linalg.inv(joint[:6, :6])
    np.testing.assert_allclose(mean, gain @ values)
    np.testing.assert_allclose(variance, np.diag(joint[6:, 6:] - gain @ joint[:6, 6:]))


def test_the_covariance_is_one() -> None:
    expected = KNOWN.expected(FIT.constants)
    shared = covariance(FIT.kernel, KNOWN, expected, KNOWN, expected)
    np.testing.assert_allclose(shared, shared.T)
    assert np.linalg.eigvalsh(shared).min() > -1e-8


def test_plans_of_a_publisher_who_scatters_say_less_about_each_other() -> None:
    """In the same software on the same GPU; what is not about plans stays."""
    rows = np.flatnonzero((KNOWN.labels("stack") == "mlm2021") & (KNOWN.labels("gpu") == "A100"))[:20]
    some = Points([SHIPPED[row] for row in rows])
    expected = some.expected(FIT.constants)
    pairs = Pairs.of(some, some)
    calm, wild = (replace(FIT.kernel, plan_scale=dict.fromkeys(some.labels("publisher"), s)) for s in (1.0, 3.0))
    before, after = (covariance_terms(kernel, pairs, expected, expected) for kernel in (calm, wild))
    for name, term in before.items():
        np.testing.assert_allclose(
            after[name], term * (9 if name in ("plan_sd", "machine_plan_sd", "layout_sd") else 1)
        )


def kernel_values(publishers: list[str]) -> NDArray[np.float64]:
    """What the shipped kernel was fitted as: the inverse of ``kernel_of``."""
    free = [FIT.kernel.lengths[place] for place in (0, 1, 2, 3, 4, 5, 10, 11)]
    sds = [getattr(FIT.kernel, name.name) for name in fields(FIT.kernel) if name.name.endswith("_sd")]
    scales = [scale[name] for scale in (FIT.kernel.plan_scale, FIT.kernel.noise_scale) for name in publishers]
    return np.log([*sds, *free, *scales])


def test_a_kernel_is_read_back_from_what_was_fitted() -> None:
    again, kernel = asdict(kernel_of(kernel_values(publishers_of(KNOWN)), publishers_of(KNOWN))), asdict(FIT.kernel)
    assert again.keys() == kernel.keys()
    for name, value in again.items():
        assert value == pytest.approx(kernel[name])


def test_the_slope_of_the_likelihood_is_that_of_its_differences() -> None:
    points = Points(SHIPPED[::16])
    problem, expected = Problem.of(points), points.expected(FIT.constants)
    rows = np.arange(1, len(points.points))
    start, _ = kernel_start(len(publishers_of(points)))
    values = start + 0.1 * np.random.default_rng(0).standard_normal(start.size)
    _, slope = kernel_cost(values, problem, expected, rows)
    for place, step in enumerate(1e-5 * np.eye(values.size)):
        above, below = (kernel_cost(values + side * step, problem, expected, rows)[0] for side in (1, -1))
        assert slope[place] == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=1e-4)


def test_layouts_that_were_left_out_are_predicted_within_a_few_percent() -> None:
    """The quick form of what ``tools/fit_throughput.py`` reports: constants and kernel are those of all points.

    What the others say of a block is in the inverse of the whole covariance: its block's inverse is the variance given
    the others, and that times the weighted residual what it is off by (Rasmussen and Williams 2006, eq. 5.12).
    """
    expected, weights = KNOWN.expected(FIT.constants), np.array(FIT.weights)
    noise = FIT.kernel.noise(KNOWN) ** 2 / weights + expected.spread
    own = noise_variance(FIT.kernel, weights, KNOWN) + expected.spread
    inverse = np.linalg.inv(covariance(FIT.kernel, KNOWN, expected, KNOWN, expected) + np.diag(noise))
    weighted = inverse @ (KNOWN.log_measured - expected.log_s)
    off, sd, layouts = np.zeros(noise.size), np.zeros(noise.size), layouts_of(KNOWN)
    for layout in dict.fromkeys(layouts):
        out = np.flatnonzero(layouts == layout)
        given_others = np.linalg.inv(inverse[np.ix_(out, out)])
        off[out] = given_others @ weighted[out]
        sd[out] = np.sqrt(np.diag(given_others) - noise[out] + own[out])
    assert np.median(np.abs(np.expm1(-off))) < 0.035
    assert 0.85 < np.mean(np.abs(off) < Z90 * sd) < 0.95


def test_publishers_that_were_left_out_are_predicted_and_doubted() -> None:
    """Quick as well: of the kernel, only how their plans scatter and how noisy their figures are is forgotten."""
    expected, weights, publishers = KNOWN.expected(FIT.constants), np.array(FIT.weights), KNOWN.labels("publisher")
    values = kernel_values(publishers_of(KNOWN))
    off, sd = np.zeros(weights.size), np.zeros(weights.size)
    for publisher in dict.fromkeys(publishers):
        out, rest = np.flatnonzero(publishers == publisher), np.flatnonzero(publishers != publisher)
        kernel = kernel_of(forget_others(KNOWN, values, rest), publishers_of(KNOWN))
        assert kernel.noise(KNOWN)[out] == pytest.approx(kernel.noise_sd)
        shared = covariance(kernel, KNOWN, expected, KNOWN, expected)
        within = shared + np.diag(kernel.noise(KNOWN) ** 2 / weights + expected.spread)
        residual = KNOWN.log_measured - expected.log_s
        across, prior = shared[np.ix_(rest, out)], np.diag(shared)[out]
        mean, variance = condition(within[np.ix_(rest, rest)], across, prior, residual[rest])
        own = noise_variance(kernel, weights[rest], KNOWN) + expected.spread
        off[out], sd[out] = mean - residual[out], np.sqrt(variance + own[out])
    assert np.median(np.abs(np.expm1(off))) < 0.065
    assert 0.85 < np.mean(np.abs(off) < Z90 * sd) < 0.96


def test_a_prediction_in_cross_validation_does_not_see_what_it_predicts() -> None:
    points = SHIPPED[::10]
    doubled = [relabelled(point, step_time_s=str(2 * (point.step_time_s or 0.0))) for point in points]
    publishers = Points(points).labels("publisher")
    out, rest = np.flatnonzero(publishers == "vTrain"), np.flatnonzero(publishers != "vTrain")
    known = [doubled[row] if row in out else point for row, point in enumerate(points)]
    found = []
    for some in (Points(points), Points(known)):
        problem, expected = Problem.of(some), some.expected(FIT.constants)
        start = forget_others(some, kernel_values(publishers_of(some)), rest)
        off, sd = predict_fold(problem, expected, start, rest, out)
        found.append((off + some.log_measured[out], sd))
    np.testing.assert_allclose(found[0], found[1])


@pytest.mark.parametrize(("left_out", "most"), [("unseen_layouts", 0.04), ("unseen_sources", 0.08)])
def test_the_shipped_fit_kept_what_it_promises(left_out: str, most: float) -> None:
    """As ``tools/fit_throughput.py --write`` found it, everything fitted without what is predicted."""
    errors = json.loads(FITTED.read_text())["errors"][left_out]
    assert errors["points"] == len(SHIPPED), "fit.json is older than points.csv"
    assert errors["median_error"] < most
    assert 0.85 <= round(errors["coverage_of_90_percent"], 2) <= 0.95


def test_software_that_is_not_known_is_predicted_with_more_doubt() -> None:
    point = SHIPPED[-1]
    strange = relabelled(point, stack="another", source="somewhere else")
    known, unknown = (FIT.predict(KNOWN, Points([one])) for one in (point, strange))
    assert known.high_s[0] / known.low_s[0] < unknown.high_s[0] / unknown.low_s[0]
    assert unknown.low_s[0] < unknown.step_time_s[0] < unknown.high_s[0]


def test_memory_of_reported_runs_is_predicted() -> None:
    reported = [point for point in SHIPPED if point.row["mem_gb"] and point.stack in ("bigscience", "nanotron")]
    predicted = FIT.predict(KNOWN, Points(reported)).memory_bytes / 1e9
    errors = np.abs(predicted / [float(point.row["mem_gb"]) for point in reported] - 1)
    assert np.median(errors) < 0.08


def test_the_tool_writes_four_columns_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_rows(POINTS)[:3]
    rows[1] = {**rows[1], "layers": ""}
    source, out = tmp_path / "points.csv", tmp_path / "out.csv"
    with source.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr("sys.argv", ["predict", "--points", str(source), "--out", str(out)])
    assert main() == 0
    written = read_rows(out)
    assert [row["model"] for row in written] == [row["model"] for row in rows]
    for row in (written[0], written[2]):
        low, middle, high = (float(row[name]) for name in ("low", "predicted_step_time_s", "high"))
        assert low < middle < high
        assert float(row["predicted_mem_gb"]) > 1
    assert written[1]["predicted_step_time_s"] == "", "a model without layers can't be predicted"


def test_measurements_in_the_table_are_not_looked_at() -> None:
    point = SHIPPED[0]
    told, untold = predictions([point]), predictions([relabelled(point, step_time_s="", tflops_per_gpu="")])
    assert told == untold


@pytest.mark.parametrize(("flag", "value"), [("--points", "nowhere.csv"), ("--out", "/nowhere/out.csv")])
def test_bad_paths_are_one_line(
    flag: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"--points": str(POINTS), "--out": "unused.csv"} | {flag: value}
    monkeypatch.setattr("sys.argv", ["predict", *(word for pair in flags.items() for word in pair)])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"predict_throughput.py: {flag} {value}")
    assert error.count("\n") == 1
