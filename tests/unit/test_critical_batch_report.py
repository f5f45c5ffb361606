"""Critical batches as JSON, as a table and as a picture, closed intervals and open ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from copus_ext.core.efficiency.critical_batch import Interval
from copus_ext.core.efficiency.critical_batch_result import BranchedPoint, Measurement, measure, ratio_spread
from copus_ext.core.efficiency.loss_curves import BranchCurve
from copus_ext.core.report.critical_batch import format_interval, format_measurements, write_results

SAMPLES = np.linspace(0, 1024, 9)
UNKNOWN = Interval(math.nan, math.nan, math.nan)


def point(critical: float, noise: Interval, at: int = 512) -> Measurement:
    """Branches with that critical batch, and a little noise of their own."""
    random, curves = np.random.default_rng(0), []
    level = random.normal(0, 0.3, 8)
    for batch in (8, 16, 32, 64):
        worth = math.exp(random.normal(0, 0.03)) / (1 + batch / critical)
        losses = 2 - 0.4 * np.log1p(SAMPLES * worth / 300)
        curves.append(BranchCurve(batch, SAMPLES, losses[:, None] + level))
    return measure(BranchedPoint(at, 8, tuple(curves), dict.fromkeys((8, 16, 32, 64), noise)), 256, 0.01)


def written(folder: Path, *measurements: Measurement) -> Any:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    write_results(folder, measurements, {"seed": 1234})
    return json.loads((folder / "critical_batch.json").read_text(), parse_constant=no_constant)


def test_what_was_measured_is_written_and_told(tmp_path: Path) -> None:
    closed = point(40.0, Interval(20.0, 15.0, 30.0))
    found = written(tmp_path, closed, point(40.0, Interval(10.0, 8.0, 12.0), at=2048))
    assert found["conditions"] == {"seed": 1234}
    first, second = found["points"]
    assert (first["samples"], second["samples"], first["base_batch"]) == (512, 2048, 8)
    assert first["critical_batch"]["outcome"] == "measured"
    assert first["critical_batch"]["low"] < 40 < first["critical_batch"]["high"]
    assert first["c"]["value"] == pytest.approx(first["critical_batch"]["value"] / 20)
    assert found["c"]["points"] == 2
    assert found["c"]["log_sd"] == pytest.approx(math.log(2) / math.sqrt(2))
    assert [branch["batch"] for branch in first["branches"]] == [8, 16, 32, 64]
    assert np.mean(first["branches"][0]["block_losses"][3]) == pytest.approx(first["branches"][0]["loss"][3])
    table = format_measurements([closed])
    assert f"critical batch Bc           {format_interval(closed.fit.critical)}" in table
    assert table.count("\n  ") >= 9


def test_open_ends_are_null_in_the_file_and_said_on_the_terminal(tmp_path: Path) -> None:
    opened = point(1e9, Interval(20.0, 15.0, math.inf))
    found = written(tmp_path, opened)
    assert found["points"][0]["critical_batch"]["outcome"] == "at least"
    assert found["points"][0]["critical_batch"]["high"] is None
    assert found["c"] == {"points": 0, "mean": None, "log_sd": None}
    table = format_measurements([opened])
    assert "no upper end" in table
    assert "geometric mean" not in table


def test_two_branches_are_not_told_as_if_they_had_residuals() -> None:
    two = [curve for curve in point(40.0, UNKNOWN).point.curves if curve.batch in (8, 64)]
    table = format_measurements([measure(BranchedPoint(0, 8, tuple(two), dict.fromkeys((8, 64), UNKNOWN)), 256, 0.01)])
    assert "covers the validation sequences only" in table


def test_a_noise_scale_that_was_not_measured_leaves_the_ratio_unknown() -> None:
    without = point(40.0, UNKNOWN)
    assert format_interval(without.ratio) == "- [-, -]"
    assert ratio_spread([without, point(40.0, Interval(20.0, 15.0, 30.0))]).points == 1


@pytest.mark.parametrize("critical", [40.0, 1e9, -200.0], ids=["closed", "open", "contradicted"])
def test_the_picture_is_drawn_whatever_came_out(tmp_path: Path, critical: float) -> None:
    noise = Interval(20.0, 15.0, 30.0)
    stuck = BranchCurve(8, SAMPLES, np.ones((9, 8)))
    nothing = measure(
        BranchedPoint(0, 8, (stuck, BranchCurve(16, SAMPLES, np.ones((9, 8)))), {8: noise, 16: noise}), 0, 1
    )
    assert nothing.fit.outcome == "no overlap"
    write_results(tmp_path, [point(critical, noise), nothing], {})
    picture = ElementTree.parse(tmp_path / "critical_batch.svg")
    assert len(picture.getroot().findall("./{*}g/{*}svg")) == 4
    assert "nan" not in (tmp_path / "critical_batch.svg").read_text()
    assert "no two branches" in format_measurements([nothing])
