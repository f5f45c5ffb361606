"""Predictions from published runs: conditioning is right, known software is predicted well, and doubt is said."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from copus_ext.core.points import Point, read_points, read_rows
from copus_ext.core.published import POINTS, Points, condition, covariance, read_fit, usable
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


def test_layouts_that_were_left_out_are_predicted_within_a_few_percent() -> None:
    """The quick form of what ``tools/fit_throughput.py`` reports: the constants are those of all points."""
    expected = KNOWN.expected(FIT.constants)
    residual = KNOWN.log_measured - expected.log_s
    noise = FIT.kernel.noise_sd**2 / np.array(FIT.weights) + expected.spread
    shared = covariance(FIT.kernel, KNOWN, expected, KNOWN, expected)
    layouts = np.array([f"{p.gpu} {p.row['model']} {p.layout} {p.vpp}" for p in SHIPPED])
    errors, held = [], []
    for layout in dict.fromkeys(layouts):
        out, rest = np.flatnonzero(layouts == layout), np.flatnonzero(layouts != layout)
        within = shared[np.ix_(rest, rest)] + np.diag(noise[rest])
        mean, variance = condition(within, shared[np.ix_(rest, out)], np.diag(shared)[out], residual[rest])
        errors += np.abs(np.expm1(mean - residual[out])).tolist()
        held += (np.abs(mean - residual[out]) < 1.645 * np.sqrt(variance + noise[out])).tolist()
    assert np.median(errors) < 0.04
    assert 0.85 < np.mean(held) < 0.97


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
