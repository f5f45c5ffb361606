"""Line charts and timelines as SVG text: no script, no outside style, the same inline in a page and as a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# Tableau 10: told apart by most people with a colour vision deficiency, in print, too.
PALETTE = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#edc948", "#9c755f", "#ff9da7", "#bab0ac")

_INK, _GREY, _RULE = "#1b1f24", "#59636e", "#e4e7eb"
_TOP, _RIGHT, _BOTTOM, _LEFT = 46, 14, 36, 52  # margins around the plotting area, pixels
_RIBBON = 22  # height of one with the gap below it, pixels
_CHAR = 6.0  # width of a character of the small font, pixels, rather too wide than too narrow
_MAX_POINTS = 1600  # of a line; more than one screen pixel shows each


@dataclass(frozen=True)
class Series:
    """A line. ``x``, ``y`` and the edges of its shaded interval ``low`` and ``high`` are of one length.

    Values of ``y`` that are not finite break the line. An infinite ``high`` shades up to the top; nan shades nothing.
    """

    name: str
    x: ArrayLike
    y: ArrayLike
    color: str
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    width: float = 1.6
    opacity: float = 1.0
    stairs: bool = False  # y holds from the x before up to its own
    dots: bool = False
    whiskers: bool = False  # low and high as one stroke at every point, and not as an area
    outline: bool = False  # low and high as dashed lines, and not as an area: for one interval over another


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis, from ``start`` to ``end``, in a colour; ``text`` is written in it by a ribbon."""

    start: float
    end: float
    color: str
    text: str = ""


@dataclass(frozen=True)
class Ribbon:
    """A row of bands above a chart that says what holds where on its x axis."""

    name: str
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Chart:
    """A picture of lines over one x axis. Sizes in pixels; ``x_range`` and ``y_range`` cut off what lies outside.

    ``x_ticks``: where the x axis is labelled, if not at round values.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    bands: tuple[Band, ...] = ()
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    log_x: bool = False
    x_range: tuple[float, float] | None = None
    x_ticks: tuple[float, ...] = ()
    ribbons: tuple[Ribbon, ...] = ()
    width: int = 580
    height: int = 300


@dataclass(frozen=True)
class Axis:
    """Maps values in [low, high] to pixels; ``low`` > 0 where it is logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: ArrayLike) -> Array:
        """Pixels of the values; nan for what has none."""
        data = np.asarray(values, dtype=np.float64)
        if not self.log:
            share = (data - self.low) / (self.high - self.low)
        else:
            safe = np.where(data > 0, data, np.nan)
            share = np.log(safe / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, spacing: float) -> list[float]:
        """Round values within the axis, about ``spacing`` pixels apart or more."""
        count = max(2, round(abs(self.end - self.start) / spacing))
        if self.log and self.high / self.low > 20:
            return _log_ticks(self.low, self.high, count)
        return _linear_ticks(self.low, self.high, count)


def draw_chart(chart: Chart) -> str:
    """The chart as one ``<svg>`` element."""
    top = _TOP + _RIBBON * len(chart.ribbons)
    left = max([_LEFT, *(round(1.1 * _CHAR * len(ribbon.name)) + 12 for ribbon in chart.ribbons)])
    width, height = chart.width - left - _RIGHT, chart.height - top - _BOTTOM
    x_range = chart.x_range or _range([series.x for series in chart.series], chart.log_x)
    x_axis = Axis(*x_range, 0, width, chart.log_x)
    y_range = chart.y_range or _range([series.y for series in chart.series], chart.log_y, air=0.05)
    y_axis = Axis(*y_range, height, 0, chart.log_y)
    bands = [_rect(x_axis, band, 0, height, 0.13) for band in chart.bands]
    lines = [_draw_series(series, x_axis, y_axis) for series in chart.series]
    # An inner <svg> cuts off what leaves the plotting area, and unlike a clip path needs no name unique in the page.
    inside = f'<svg width="{width}" height="{height}">{"".join([*bands, *lines])}</svg>'
    frame = _grid_y(y_axis, width) + _grid_x(x_axis, height, chart.x_label, chart.x_ticks)
    rows = [_draw_ribbon(row, x_axis, -_RIBBON * (len(chart.ribbons) - i)) for i, row in enumerate(chart.ribbons)]
    body = f'<g transform="translate({left},{top})">{"".join(rows)}{frame}{inside}</g>'
    return _svg(chart.width, chart.height, chart.title, _legend(chart) + body)


def draw_timeline(
    title: str, x_label: str, rows: Sequence[tuple[str, Sequence[Band]]], width: int = 1180, x_end: float | None = None
) -> str:
    """One row of bands for each name, over a common x axis that starts at 0 and ends at ``x_end``."""
    left = 16 + round(7.2 * max((len(name) for name, _ in rows), default=0))
    end = x_end or max([band.end for _, bands in rows for band in bands if band.end > 0], default=1.0)
    row_height, plot_width, height = 20, width - left - _RIGHT, 20 * len(rows)
    axis = Axis(0.0, end, 0, plot_width)
    parts = [_grid_x(axis, height, x_label)]
    for number, (name, bands) in enumerate(rows):
        top = number * row_height
        parts.append(_text(-8, top + 14, name, "end", _INK))
        parts += [_rect(axis, band, top + 3, row_height - 6, 1.0) for band in bands]
    body = f'<g transform="translate({left},32)">{"".join(parts)}</g>'
    return _svg(width, height + 32 + _BOTTOM, title, body)


def write_svg(svg: str, path: str | Path) -> None:
    """Write a drawing as a file of its own."""
    Path(path).write_text('<?xml version="1.0" encoding="UTF-8"?>\n' + svg + "\n", encoding="utf-8")


def tick_label(value: float) -> str:
    """``0.05``, ``20``, ``1.5k``, ``2M``, ``1e-05``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _draw_series(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    data = np.asarray(series.y, dtype=np.float64)
    keep = _thin(data)
    x, y = x_axis(np.asarray(series.x, dtype=np.float64)[keep]), y_axis(data[keep])
    stroke = f'stroke="{series.color}" stroke-width="{series.width}" stroke-opacity="{series.opacity}"'
    shape = f'<path d="{_path(x, y, series.stairs)}" fill="none" {stroke} stroke-linejoin="round"/>'
    if series.dots:
        shape += "".join(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{series.color}"/>'
            for a, b in zip(x, y, strict=True)
            if math.isfinite(b)
        )
    if series.low is None or series.high is None:
        return shape
    low, high = (np.asarray(edge, dtype=np.float64)[keep] for edge in (series.low, series.high))
    if series.whiskers:
        return _whiskers(x, y_axis(low), y_axis(high), series.color) + shape
    if series.outline:
        return _outline(x, y_axis(low), y_axis(high), series) + shape
    # Open or far ends are drawn at the edge of the picture, where they are cut off anyway.
    edges = y_axis(np.maximum(low, y_axis.low)), y_axis(np.minimum(high, y_axis.high))
    return _area(x, *edges, series.color) + shape


def _draw_ribbon(ribbon: Ribbon, axis: Axis, top: float) -> str:
    """Its name in the margin, its bands with what is written in them."""
    parts = [_text(-7, top + 13, ribbon.name, "end", _GREY)]
    for band in ribbon.bands:
        parts.append(_rect(axis, band, top, _RIBBON - 4, 0.3))
        middle = float(np.mean(axis([band.start, band.end])))
        parts.append(_text(middle, top + 13, band.text, "middle", _INK) if band.text else "")
    return "".join(parts)


def _whiskers(x: Array, low: Array, high: Array, color: str) -> str:
    """A stroke from low to high at every point that has both."""
    ends = [(a, b, c) for a, b, c in zip(x, low, high, strict=True) if math.isfinite(b) and math.isfinite(c)]
    strokes = "".join(f"M{a:.1f} {b:.1f}V{c:.1f}" for a, b, c in ends)
    return f'<path d="{strokes}" stroke="{color}" stroke-width="1.4" stroke-opacity="0.7"/>'


def _outline(x: Array, low: Array, high: Array, series: Series) -> str:
    """Two dashed lines, each with a gap where it has no finite value."""
    dashes = f'fill="none" stroke="{series.color}" stroke-width="1" stroke-opacity="0.8" stroke-dasharray="4 3"'
    return "".join(f'<path d="{_path(x, edge, series.stairs)}" {dashes}/>' for edge in (low, high))


def _path(x: Array, y: Array, stairs: bool) -> str:
    """Path data with a new start after every gap."""
    parts, pen_down = [], False
    for a, b in zip(x, y, strict=True):
        if not math.isfinite(b):
            pen_down = False
            continue
        if not pen_down:
            parts.append(f"M{a:.1f} {b:.1f}")
        else:
            parts.append(f"V{b:.1f}H{a:.1f}" if stairs else f"L{a:.1f} {b:.1f}")
        pen_down = True
    return "".join(parts)


def _area(x: Array, low: Array, high: Array, color: str) -> str:
    """A shaded polygon for every stretch where both edges are known."""
    known = np.isfinite(low) & np.isfinite(high)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(int)))
    polygons = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        stretch = slice(start, end)
        corners = [
            *zip(x[stretch], low[stretch], strict=True),
            *zip(x[stretch][::-1], high[stretch][::-1], strict=True),
        ]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        polygons.append(f'<polygon points="{points}" fill="{color}" fill-opacity="0.18"/>')
    return "".join(polygons)


def _thin(values: Array) -> NDArray[np.int64]:
    """Indices of at most ``_MAX_POINTS`` values: the extremes of every stretch, so that no spike is lost."""
    if values.size <= _MAX_POINTS:
        return np.arange(values.size)
    kept: set[int] = set()
    for stretch in np.array_split(np.arange(values.size), _MAX_POINTS // 2):
        finite = np.isfinite(values[stretch])
        kept.add(int(stretch[np.argmin(np.where(finite, values[stretch], np.inf))]))
        kept.add(int(stretch[np.argmax(np.where(finite, values[stretch], -np.inf))]))
    return np.array(sorted(kept))


def _range(values: Sequence[ArrayLike], log: bool = False, air: float = 0.0) -> tuple[float, float]:
    """From the smallest to the largest value that can be drawn, wider by the share ``air``, and never empty."""
    data = np.concatenate([np.ravel(np.asarray(v, dtype=np.float64)) for v in values] or [np.zeros(0)])
    data = data[np.isfinite(data) & ((data > 0) | (not log))]
    low, high = (float(data.min()), float(data.max())) if data.size else (1.0, 1.0)
    if log:
        factor = (high / low) ** air if high > low else 2.0
        return low / factor, high * factor
    margin = air * (high - low) if high > low else 0.5
    return low - margin, high + margin


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= count / 2 + 1 else (1,)
    stride = math.ceil(len(powers) / (count + 2))
    ticks = (factor * 10.0**power for power in powers[::stride] for factor in factors)
    return [float(f"{tick:.12g}") for tick in ticks if low <= tick <= high]


def _grid_x(axis: Axis, height: float, label: str, given: Sequence[float] = ()) -> str:
    parts = [f'<path d="M0 {height}H{axis.end}" stroke="{_GREY}"/>']
    ticks = given or axis.ticks(spacing=55)
    for value, x in zip(ticks, axis(ticks), strict=True):
        name = f"{value:,.12g}" if given else tick_label(value)  # what was chosen is written out
        parts.append(f'<path d="M{x:.1f} {height}v4" stroke="{_GREY}"/>')
        parts.append(_text(float(x), height + 16, name, "middle", _GREY))
    parts.append(_text(axis.end, height + 30, label, "end", _GREY))
    return "".join(parts)


def _grid_y(axis: Axis, width: float) -> str:
    parts = []
    ticks = axis.ticks(spacing=35)
    for value, y in zip(ticks, axis(ticks), strict=True):
        parts.append(f'<path d="M0 {y:.1f}H{width}" stroke="{_RULE}"/>')
        parts.append(_text(-7, float(y) + 4, tick_label(value), "end", _GREY))
    return "".join(parts)


def _rect(axis: Axis, band: Band, top: float, height: float, opacity: float) -> str:
    start, end = axis([band.start, band.end])
    size = f'width="{max(0.0, end - start):.1f}" height="{height}"'
    return f'<rect x="{start:.1f}" y="{top}" {size} fill="{band.color}" fill-opacity="{opacity}"/>'


def _legend(chart: Chart) -> str:
    """The unit of the y axis, then what each named line is."""
    parts = [_text(0, 36, chart.y_label, "start", _GREY)]
    x = max(float(_LEFT), _CHAR * len(chart.y_label) + 16)
    for series in chart.series:
        if series.name:
            parts.append(f'<path d="M{x:.0f} 32h14" stroke="{series.color}" stroke-width="3"/>')
            parts.append(_text(x + 18, 36, series.name, "start", _INK))
            x += 32 + _CHAR * len(series.name)
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, color: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'


def _svg(width: int, height: int, title: str, body: str) -> str:
    heading = f'<text x="0" y="16" font-size="14" font-weight="600" fill="{_INK}">{escape(title)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="11" role="img">'
        f"<title>{escape(title)}</title>{heading}{body}</svg>"
    )
