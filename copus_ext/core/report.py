"""The report of a run: one HTML page with its pictures inside, no script, nothing loaded from anywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.events import Event, read_events
from copus_ext.core.summary import (
    Summary,
    format_bytes,
    format_overview,
    format_phases,
    format_summary,
    is_change,
    plan_name,
    summarise,
)
from copus_ext.core.svg import PALETTE, Band, Chart, Series, draw_chart, draw_timeline

Array = NDArray[np.float64]

_TOP_CANDIDATES = 12  # shown of a decision
_BLUE, _ORANGE, _GREY = "#1f6feb", "#d1690e", "#8c959f"
_STYLE = """
body { font: 13px/1.45 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 1180px; margin: 20px auto; }
h1 { font-size: 20px; margin: 0 0 8px } h2 { font-size: 15px; margin: 26px 0 6px }
pre { background: #f6f8fa; border: 1px solid #e4e7eb; padding: 10px 12px; font-size: 12px; overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; border-bottom: 1px solid #59636e } th.n, td.n { text-align: right }
td:first-child, td:nth-child(2) { white-space: nowrap }
th, td { padding: 3px 10px 3px 0; vertical-align: top } td { border-bottom: 1px solid #e4e7eb }
.quiet, .quiet td { color: #59636e } .bad { color: #b42318; font-weight: 600 } td.n { white-space: nowrap }
td.n + td.l, th.n + th.l { padding-left: 12px }
.swatch { display: inline-block; width: 10px; height: 10px; margin-right: 6px }
.bar { display: inline-block; height: 9px; margin-left: 8px }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 18px 20px; margin-bottom: 18px } svg { max-width: 100% }
"""


@dataclass(frozen=True)
class _Stretch:
    """Consecutive steps under one plan: where it begins and ends, in sequences and in seconds."""

    plan: str
    samples: tuple[float, float]
    time: tuple[float, float]


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` beside the ``events.jsonl`` of a run, and return where.

    Raises:
        FileNotFoundError: no ``events.jsonl`` in ``run_dir``.
        ValueError: one without events, or with lines that are not events.
    """
    source = Path(run_dir) / "events.jsonl"
    page = render_report(read_events(source), source)
    path = Path(run_dir) / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def report_run(run_dir: str | Path) -> str:
    """Write ``report.html`` and give the summary to print, which says where everything lies.

    Raises:
        FileNotFoundError, ValueError: as :func:`write_report`.
    """
    source = Path(run_dir) / "events.jsonl"
    return f"{format_summary(summarise(read_events(source), source))}\n  report      {write_report(run_dir)}"


def render_report(events: Sequence[Event], source: str | Path | None = None) -> str:
    """The page for the effective events of a run."""
    summary = summarise(events, source)
    colors = {use.plan: PALETTE[number % len(PALETTE)] for number, use in enumerate(summary.plans)}
    stretches = _stretches([event for event in events if event["event"] == "step"])
    model = summary.start.get("model")
    title = f"Run of {model}" if isinstance(model, str) else "Training run"
    parts = [
        f"<h1>{escape(title)}</h1><pre>{escape(format_overview(summary))}</pre>",
        *_pictures(events, stretches, colors),
        *_section("Plans", _plan_table(summary, colors)),
        *_section("Decisions", _decision_table(events, colors)),
        *_section("Switches", _switch_table(summary, colors)),
        *_section("Faults", _fault_table(summary)),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


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


def _pictures(events: Sequence[Event], stretches: Sequence[_Stretch], colors: dict[str, str]) -> list[str]:
    steps = [event for event in events if event["event"] == "step"]
    if not steps:
        return []
    unit, scale = _time_unit(events[-1]["time_s"])
    by_samples = tuple(Band(*s.samples, colors[s.plan]) for s in stretches)
    by_time = tuple(Band(s.time[0] / scale, s.time[1] / scale, colors[s.plan]) for s in stretches)
    evals = [event for event in events if event["event"] == "eval"]
    noise = [event for event in events if event["event"] == "noise_scale"]
    losses = [
        Chart(
            "Loss against sequences", "sequences", "loss", _loss_lines(steps, evals, "consumed_samples", 1), by_samples
        ),
        Chart("Loss against time", unit, "loss", _loss_lines(steps, evals, "time_s", scale), by_time),
    ]
    batches = _batch_chart(steps, noise, by_samples)
    speed = Chart("Speed", "sequences", "tokens/s", _speed_lines(steps), by_samples)
    rows = [(plan, [b for b, s in zip(by_time, stretches, strict=True) if s.plan == plan]) for plan in colors]
    pairs = "".join(draw_chart(chart) for chart in (*losses, batches, speed))
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


def _batch_chart(steps: Sequence[Event], noise: Sequence[Event], bands: tuple[Band, ...]) -> Chart:
    """Batch and noise scale, logarithmic; the wild ends of early intervals may leave the picture."""
    sizes = [re.search(r"gbs(\d+)", plan_name(step.get("plan"))) for step in steps]
    batch = np.array([float(size.group(1)) if size else math.nan for size in sizes])
    lines = [Series("global batch", _column(steps, "consumed_samples"), batch, _BLUE, stairs=True, width=2.2)]
    value, low, high = (_column(noise, name) for name in ("value", "low", "high"))
    high = np.where(np.isfinite(low) & np.isnan(high), np.inf, high)  # an open end is null in the log
    if noise:
        lines.append(Series("noise scale, 95 %", _column(noise, "consumed_samples"), value, _ORANGE, low, high))
    seen = np.concatenate([value, low, high])
    seen = seen[np.isfinite(seen) & (seen > 0)]
    ends = [*batch[np.isfinite(batch)], *(np.quantile(seen, [0.02, 0.95]) if seen.size else ())]
    span = (min(ends) / 1.4, max(ends) * 1.4) if ends else None
    title = "Global batch size and noise scale"
    return Chart(title, "sequences", "sequences", tuple(lines), bands, log_y=True, y_range=span)


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


def _plan_table(summary: Summary, colors: dict[str, str]) -> str:
    fastest = max((use.tokens_per_second for use in summary.plans if use.seconds > 0), default=1.0)
    rows = []
    for use in summary.plans:
        speed = use.tokens_per_second
        length = 0 if math.isnan(speed) else 220 * speed / fastest
        bar = f'<span class="bar" style="width:{length:.0f}px;background:{colors[use.plan]}"></span>'
        share = use.seconds / summary.seconds if summary.seconds > 0 else 0.0
        cells = [_plan(use.plan, colors), f"{use.steps:,}", f"{use.tokens:,}", f"{use.seconds:,.1f}", f"{share:.1%}"]
        rows.append(_row([*cells, f"{speed:,.0f}", bar], "lnnnnnl"))
    heads = ["plan", "steps", "tokens", "seconds in steps", "of the run", "tokens/s", ""]
    return _table(heads, "lnnnnnl", rows)


def _decision_table(events: Sequence[Event], colors: dict[str, str]) -> str:
    """Changes one by one; decisions to stay that follow each other share a row with the last one's reason."""
    rows = []
    decisions = [event for event in events if event["event"] == "decision"]
    for changed, group in groupby(decisions, key=is_change):
        run = list(group)
        for decision in run if changed else run[-1:]:
            at = f"{decision['iteration']:,}"
            if not changed and len(run) > 1:
                at = f"{run[0]['iteration']:,}-{at}"
            chosen = _plan(plan_name(decision.get("chosen")), colors) if changed else f"stay, {len(run)} x"
            why = escape(str(decision.get("reason") or "")) + _candidates(decision)
            gains = [_percent(decision.get(name)) for name in ("gain", "gain_low", "gain_needed")]
            rows.append(_row([at, chosen, why, *gains], "lllnnn", "" if changed else "quiet"))
    return _table(["step", "decision", "why", "gain", "lower quartile", "needed"], "lllnnn", rows)


def _candidates(decision: Event) -> str:
    """The plans that were weighed, best Goodput first, folded away."""
    candidates = sorted(
        decision.get("candidates") or [], key=lambda c: -(c.get("goodput") or c.get("throughput") or 0.0)
    )
    if not candidates:
        return ""
    rows = []
    for candidate in candidates[:_TOP_CANDIDATES]:
        numbers = [_number(candidate.get(name)) for name in ("throughput", "efficiency", "goodput")]
        rows.append(
            _row([escape(plan_name(candidate.get("plan"))), *numbers, escape(candidate.get("why_not") or "")], "lnnnl")
        )
    table = _table(["plan", "sequences/s", "efficiency", "Goodput", "why not"], "lnnnl", rows)
    return f"<details><summary>{len(candidates)} candidates</summary>{table}</details>"


def _switch_table(summary: Summary, colors: dict[str, str]) -> str:
    exact = {True: "yes", False: '<span class="bad">NO</span>', None: "not checked"}
    rows = []
    for switch in summary.switches:
        plans = [_plan(plan_name(switch.get(end)), colors) for end in ("from", "to")]
        moved, least = (
            format_bytes(switch[n]) if switch.get(n) is not None else "-" for n in ("bytes_moved", "bytes_minimum")
        )
        phases = format_phases(switch.get("seconds") or {})
        rows.append(
            _row([f"{switch['iteration']:,}", *plans, phases, moved, least, exact[switch.get("exact")]], "llllnnl")
        )
    return _table(["step", "from", "to", "time", "moved", "least possible", "exact"], "llllnnl", rows)


def _fault_table(summary: Summary) -> str:
    rows = [
        _row(
            [f"{fault['iteration']:,}", escape(str(fault.get("kind"))), escape(str(fault.get("message")))], "lll", "bad"
        )
        for fault in summary.faults
    ]
    return _table(["step", "kind", "message"], "lll", rows)


def _section(title: str, table: str) -> list[str]:
    return [f"<h2>{title}</h2>", table] if table else []


def _table(heads: Sequence[str], align: str, rows: Sequence[str]) -> str:
    """A table, or nothing at all where it would have no rows."""
    return f"<table>{_row(heads, align, cell='th')}{''.join(rows)}</table>" if rows else ""


def _row(cells: Sequence[str], align: str, style: str = "", cell: str = "td") -> str:
    """A row of HTML cells; ``align`` has a letter for each: l(eft) or n(umber)."""
    inner = "".join(f'<{cell} class="{side}">{text}</{cell}>' for text, side in zip(cells, align, strict=True))
    return f'<tr class="{style}">{inner}</tr>'


def _plan(name: str, colors: dict[str, str]) -> str:
    color = colors.get(name, "transparent")
    return f'<span class="swatch" style="background:{color}"></span>{escape(name)}'


def _percent(fraction: Any) -> str:
    return "-" if fraction is None else f"{100 * fraction:+.1f} %"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
