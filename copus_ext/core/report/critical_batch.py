"""Critical batches as a table for the terminal, as ``critical_batch.json`` and as ``critical_batch.svg``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.efficiency.critical_batch import CriticalBatchFit, Interval
from copus_ext.core.efficiency.critical_batch_result import Measurement, ratio_spread, to_json
from copus_ext.core.files import write_whole
from copus_ext.core.report.svg import PALETTE, Chart, Series, draw_chart, write_svg

Array = NDArray[np.float64]

_WIDTH, _HEIGHT, _GAP = 580, 300, 20
_INK = "#1b1f24"
_SAYINGS = {
    "measured": "",
    "at least": "no upper end: a cost of 0 is within the error",
    "at most": "no lower end: a cost in proportion to the batch is within the error",
    "undetermined": "the noise is larger than the difference: nothing can be said",
    "contradicted": "larger batches needed fewer samples, beyond the error: SE(B) does not hold here",
    "no overlap": "no two branches came to the same loss after settling: give more --branch-samples",
}


def write_results(directory: Path, measurements: Sequence[Measurement], conditions: Mapping[str, Any]) -> None:
    """Write ``critical_batch.json`` and ``critical_batch.svg``, the former whole or not at all."""
    text = json.dumps(to_json(measurements, conditions), indent=1, allow_nan=False) + "\n"
    write_whole(directory / "critical_batch.json", text)
    write_svg(draw_measurements(measurements), directory / "critical_batch.svg")


def format_measurements(measurements: Sequence[Measurement]) -> str:
    """What was measured, for the terminal."""
    lines = [line for m in measurements for line in _format_point(m)]
    spread = ratio_spread(measurements)
    if spread.points > 1:
        lines.append(
            f"c over {spread.points} points with closed intervals: {spread.mean:.3g} (geometric mean), times or "
            f"divided by {math.exp(spread.log_sd):.3g} from point to point"
        )
    return "\n".join(lines)


def _format_point(m: Measurement) -> list[str]:
    batches = ", ".join(str(curve.batch) for curve in sorted(m.point.curves, key=lambda curve: curve.batch))
    lines = [f"Branches at {m.point.samples:,} samples, batches {batches} (the run's own is {m.point.base_batch})"]
    lines.append("  batch   loss at end   above the run's own        samples to equal loss   noise scale")
    cost = dict(zip(m.fit.batches, m.fit.cost, strict=True))
    losses = {curve.batch: float(curve.losses[-1].mean()) for curve in m.point.curves}
    for e in m.excess:
        times = f"{cost[e.batch]:.2f} x" if e.batch in cost else "never reached"
        lines.append(
            f"  {e.batch:5d}   {losses[e.batch]:11.4f}   {e.value:+.4f} [{e.low:+.4f}, {e.high:+.4f}]   {times:>21}"
            f"   {format_interval(m.point.noise[e.batch])}"
        )
    below = "no branch is beyond it" if m.within.below is None else f"{m.within.below} is beyond it"
    return [
        *lines,
        f"  critical batch Bc           {_format_fit(m.fit)}",
        f"    recovery left out         {_format_fit(m.settled_fit)}",
        f"    cost as a power of B      {_format_power(m.fit)}",
        f"  within {m.tolerance:g} nats           {m.within.value} (surely {m.within.at_least}; {below})",
        f"  noise scale of the run      {format_interval(m.noise)}",
        f"  c = Bc / noise scale        {format_interval(m.ratio)}",
    ]


def _format_fit(fit: CriticalBatchFit) -> str:
    said = _SAYINGS[fit.outcome]
    if len(fit.batches) == 2 and not said:
        said = "two branches: the interval covers the validation sequences only"
    left_out = f"; left out: {', '.join(map(str, fit.excluded))}" if fit.excluded else ""
    return format_interval(fit.critical) + (f"  ({said})" if said else "") + left_out


def _format_power(fit: CriticalBatchFit) -> str:
    """The rival law, beside how well the two fit."""
    if math.isnan(fit.exponent):
        return "-"
    rms = f"{100 * fit.exponent_residual:.1f} % off, where 1 + B / Bc is {100 * fit.residual:.1f} % off"
    return f"{fit.exponent:.2f} ({rms if len(fit.batches) > 2 else 'two batches tell no law from another'})"


def format_interval(interval: Interval) -> str:
    """``35.2 [20.1, inf]``; what is not known is a dash."""
    value, low, high = ("-" if math.isnan(end) else f"{end:.3g}" for end in interval)
    return f"{value} [{low}, {high}]"


def draw_measurements(measurements: Sequence[Measurement]) -> str:
    """One row for each point: loss against samples, and efficiency against batch with the fit."""
    rows = []
    for number, m in enumerate(measurements):
        top = number * (_HEIGHT + _GAP) + _GAP / 2
        charts = (_loss_chart(m), _efficiency_chart(m))
        rows += [
            f'<g transform="translate({x},{top})">{draw_chart(chart)}</g>'
            for x, chart in zip((_GAP / 2, _WIDTH + 1.5 * _GAP), charts, strict=True)
        ]
    width, height = 2 * (_WIDTH + _GAP), max(1, len(measurements)) * (_HEIGHT + _GAP)
    paper = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img">{paper}{"".join(rows)}</svg>'


def _loss_chart(m: Measurement) -> Chart:
    """Validation loss of every branch."""
    series = tuple(
        Series(f"{curve.batch}", curve.samples, curve.losses.mean(axis=1), PALETTE[i % len(PALETTE)], dots=True)
        for i, curve in enumerate(sorted(m.point.curves, key=lambda curve: curve.batch))
    )
    title = f"Branches at {m.point.samples:,} samples: validation loss by batch"
    return Chart(title, "samples since the snapshot", "nats per token", series, width=_WIDTH, height=_HEIGHT)


def _efficiency_chart(m: Measurement) -> Chart:
    """Samples to equal loss of the smallest batch over those of each, and what the fit says of it."""
    title = f"Worth of a sample: Bc {format_interval(m.fit.critical)}"
    batches, cost = np.array(m.fit.batches, dtype=np.float64), np.array(m.fit.cost)
    if batches.size == 0:
        return Chart(title, "global batch", "", (), width=_WIDTH, height=_HEIGHT)
    first = batches[0]
    grid = np.linspace(first, batches[-1], 80)
    # On a fit that is level in the mean of all branches, the smallest batch is one point among the others.
    level = float(np.exp(np.mean(np.log(_efficiency(batches, first, m.fit.critical.value) * cost))))
    middle, low, high = (_efficiency(grid, first, end) / level for end in m.fit.critical)
    series = (
        Series("fit, 95 % interval of Bc", grid, middle, PALETTE[0], low, high),
        Series("measured", batches, 1.0 / cost, _INK, width=0.0, dots=True),
    )
    label = f"relative to batch {first:g}"
    return Chart(title, "global batch", label, series, width=_WIDTH, height=_HEIGHT)


def _efficiency(batches: Array, first: float, critical: float) -> Array:
    """SE(B) / SE(first); [n] for [n] batches."""
    if math.isinf(critical) or math.isnan(critical):
        return np.ones_like(batches)
    return np.asarray((critical + first) / (critical + batches))
