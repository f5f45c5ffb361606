"""The pictures of a report: losses, batches, speed and plans over a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.efficiency.critical_ratio import BATCH_CHANGE, PROBE
from copus_ext.core.events import Event
from copus_ext.core.report.ratio import critical_batch_at, known_ratio
from copus_ext.core.report.summary import plan_name
from copus_ext.core.report.svg import Band, Chart, Series, draw_chart, draw_timeline

Array = NDArray[np.float64]

_BLUE, _ORANGE, _GREEN, _GREY = "#1f6feb", "#d1690e", "#1a7f37", "#8c959f"


@dataclass(frozen=True)
class _Stretch:
    """Consecutive steps under one plan: where it begins and ends, in sequences and in seconds."""

    plan: str
    samples: tuple[float, float]
    time: tuple[float, float]


def _stretches(steps: Iterable[Event]) -> list[_Stretch]:
    """Each begins where the one before it ended in sequences, and with its first step in seconds."""
    found: list[_Stretch] = []
    samples = 0.0
    for plan, group in groupby(steps, key=lambda step: plan_name(step.get("plan"))):
        run = list(group)
        began = run[0]["time_s"] - (run[0].get("step_time_s") or 0.0)
        found.append(_Stretch(plan, (samples, run[-1]["consumed_samples"]), (began, run[-1]["time_s"])))
        samples = run[-1]["consumed_samples"]
    return found


def draw_pictures(events: Sequence[Event], colors: dict[str, str]) -> list[str]:
    """Charts and timeline, for the effective events of a run and the colours of its plans; none without a step."""
    steps = [event for event in events if event["event"] == "step"]
    if not steps:
        return []
    stretches = _stretches(steps)
    unit, scale = _time_unit(events[-1]["time_s"])
    by_samples = tuple(Band(*s.samples, colors[s.plan]) for s in stretches)
    by_time = tuple(Band(s.time[0] / scale, s.time[1] / scale, colors[s.plan]) for s in stretches)
    evals = [event for event in events if event["event"] == "eval"]
    losses = [
        Chart(
            "Loss against sequences", "sequences", "loss", _loss_lines(steps, evals, "consumed_samples", 1), by_samples
        ),
        Chart("Loss against time", unit, "loss", _loss_lines(steps, evals, "time_s", scale), by_time),
    ]
    batches = _batch_chart(steps, events, by_samples)
    speed = Chart("Speed", "sequences", "tokens/s", _speed_lines(steps), by_samples)
    others = [*_rate_chart(steps, by_samples), *_ratio_chart(steps, events, by_samples)]
    rows = [(plan, [b for b, s in zip(by_time, stretches, strict=True) if s.plan == plan]) for plan in colors]
    probes = [event for event in events if event["event"] == "probe"]
    if probes:
        rows.append(("probes", [_spent(probe, scale) for probe in probes]))
    pairs = "".join(draw_chart(chart) for chart in (*losses, batches, speed, *others))
    timeline = draw_timeline("Plans over time", unit, rows, x_end=events[-1]["time_s"] / scale)
    return [f'<div class="pair">{pairs}</div>', timeline]


def _loss_lines(steps: Sequence[Event], evals: Sequence[Event], x: str, scale: float) -> tuple[Series, ...]:
    """Every step thin, their running mean on top, validation as dots."""
    loss, where = _column(steps, "loss"), _column(steps, x) / scale
    lines = [
        Series("", where, loss, _GREY, width=0.8, opacity=0.6),
        Series("training", where, _running_mean(loss, max(1, loss.size // 40)), _BLUE),
    ]
    if evals:
        lines.append(Series("validation", _column(evals, x) / scale, _column(evals, "loss"), _ORANGE, dots=True))
    return tuple(lines)


def _spent(event: Event, scale: float) -> Band:
    """When an event that tells its seconds, and is logged at their end, went on."""
    return Band((event["time_s"] - (event.get("seconds") or 0.0)) / scale, event["time_s"] / scale, _GREY)


def _batch_chart(steps: Sequence[Event], events: Sequence[Event], bands: tuple[Band, ...]) -> Chart:
    """Batch, noise scale and critical batch, logarithmic; the wild ends of early intervals may leave the picture."""
    sizes = [re.search(r"gbs(\d+)", plan_name(step.get("plan"))) for step in steps]
    batch = np.array([float(size.group(1)) if size else math.nan for size in sizes])
    lines = [Series("global batch", _column(steps, "consumed_samples"), batch, _BLUE, stairs=True, width=2.2)]
    noise = [event for event in events if event["event"] == "noise_scale"]
    value, low, high = (_column(noise, name) for name in ("value", "low", "high"))
    high = np.where(np.isfinite(low) & np.isnan(high), np.inf, high)  # an open end is null in the log
    if noise:
        lines.append(Series("noise scale, 95 %", _column(noise, "consumed_samples"), value, _ORANGE, low, high))
    where, (critical, least, most) = _critical_batches(events)
    knows = bool(np.isfinite(critical).any())
    if knows:
        lines.append(Series("critical batch, 95 %", where, critical, _GREEN, least, most, outline=True))
    span = _span(np.concatenate([batch, critical[np.isfinite(most)]]), np.concatenate([value, low, high]))
    title = "Global batch size, noise scale and critical batch" if knows else "Global batch size and noise scale"
    return Chart(title, "sequences", "sequences", tuple(lines), bands, log_y=True, y_range=span)


def _span(whole: Array, mostly: Array) -> tuple[float, float] | None:
    """From the least to the most of all of one and nearly all of the other, with some air; None without any."""
    seen = mostly[np.isfinite(mostly) & (mostly > 0)]
    ends = [*whole[np.isfinite(whole)], *(np.quantile(seen, [0.02, 0.95]) if seen.size else ())]
    return (min(ends) / 1.4, max(ends) * 1.4) if ends else None


def _critical_batches(events: Iterable[Event]) -> tuple[Array, Array]:
    """[decisions] samples, and [3, decisions] critical batch with its interval, by what was known then."""
    noise, where, found = None, [], []
    for event in events:
        if event["event"] == "noise_scale":
            noise = event
        elif event["event"] == "decision":
            where.append(float(event["consumed_samples"]))
            found.append(critical_batch_at(event, noise))
    return np.array(where), np.array(found, dtype=np.float64).reshape(-1, 3).T


def _rate_chart(steps: Sequence[Event], bands: tuple[Band, ...]) -> list[Chart]:
    """The learning rate in force: the schedule, and what the batch makes of it."""
    rate = _column(steps, "learning_rate")
    if np.unique(rate[np.isfinite(rate)]).size < 2:
        return []
    line = Series("", _column(steps, "consumed_samples"), rate, _BLUE)
    return [Chart("Learning rate", "sequences", "learning rate", (line,), bands)]


def _ratio_chart(steps: Sequence[Event], events: Sequence[Event], bands: tuple[Band, ...]) -> list[Chart]:
    """What was known of c, and where it was learned."""
    known = [(event["consumed_samples"], interval) for event in events if (interval := known_ratio(event)) is not None]
    if not known:
        return []
    value, low, high = np.array([interval for _, interval in known]).T
    lines = [Series("c, 95 %", [float(samples) for samples, _ in known], value, _GREEN, low, high)]
    for kind, color in ((BATCH_CHANGE, _BLUE), (PROBE, _ORANGE)):
        found = [event for event in events if event["event"] == "critical_ratio" and event.get("kind") == kind]
        if found:
            where = _column(found, "consumed_samples")
            lines.append(Series(f"after a {kind}", where, _column(found, "c"), color, dots=True, width=0.0))
    title = "c = critical batch / noise scale"
    run = _column(steps, "consumed_samples")
    x_range, y_range = (run[0], max(run[-1], run[0] + 1)), (low.min() / 1.2, high.max() * 1.2)  # x as its neighbours
    return [Chart(title, "sequences", "c", tuple(lines), bands, log_y=True, y_range=y_range, x_range=x_range)]


def _speed_lines(steps: Sequence[Event]) -> tuple[Series, ...]:
    speed = _column(steps, "tokens") / np.maximum(_column(steps, "step_time_s"), 1e-9)
    where = _column(steps, "consumed_samples")
    # The mean is taken plan by plan: a switch is a jump, and a window across it would draw a slope.
    groups = groupby(range(len(steps)), key=lambda index: plan_name(steps[index].get("plan")))
    means = [_running_mean(speed[list(group)], max(1, speed.size // 40)) for _, group in groups]
    line = Series("", where, np.concatenate(means), _BLUE)
    return Series("", where, speed, _GREY, width=0.8, opacity=0.6), line


def _column(events: Sequence[Event], name: str) -> Array:
    """One field of all events; nan where it is null or missing."""
    return np.array([math.nan if event.get(name) is None else event[name] for event in events], dtype=np.float64)


def _running_mean(values: Array, window: int) -> Array:
    """Mean over a centred window of about ``window`` values; what is not finite is left out of it."""
    known = np.isfinite(values)
    kernel = np.ones(min(values.size, 2 * (window // 2) + 1))
    count = np.convolve(known.astype(float), kernel, mode="same")
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1.0), math.nan)


def _time_unit(seconds: float) -> tuple[str, float]:
    """The unit a duration is best read in, and its seconds."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds > 3 * size:
            return unit, size
    return "seconds", 1.0
