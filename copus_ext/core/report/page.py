"""The report of a run: one HTML page with its pictures inside, no script, nothing loaded from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from copus_ext.core.events import Event, read_events
from copus_ext.core.report.charts import draw_pictures
from copus_ext.core.report.decisions import decision_table
from copus_ext.core.report.html import plan_label, row, section, table
from copus_ext.core.report.ratio import RatioLesson, format_probes, format_ratio
from copus_ext.core.report.summary import (
    Summary,
    format_bytes,
    format_overview,
    format_phases,
    format_summary,
    plan_name,
    summarise,
)
from copus_ext.core.report.svg import PALETTE

_SIGMAS_95 = 1.96
_STYLE = """
body { font: 13px/1.45 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 1180px; margin: 20px auto; }
h1 { font-size: 20px; margin: 0 0 8px } h2 { font-size: 15px; margin: 26px 0 6px }
pre { background: #f6f8fa; border: 1px solid #e4e7eb; padding: 10px 12px; font-size: 12px; overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; border-bottom: 1px solid #59636e } th.n, td.n { text-align: right }
p { margin: 0 0 6px } td:first-child, td:nth-child(2) { white-space: nowrap }
th, td { padding: 3px 10px 3px 0; vertical-align: top } td { border-bottom: 1px solid #e4e7eb }
.quiet, .quiet td { color: #59636e } .bad { color: #b42318; font-weight: 600 } td.n { white-space: nowrap }
td.n + td.l, th.n + th.l { padding-left: 12px }
.swatch { display: inline-block; width: 10px; height: 10px; margin-right: 6px }
.bar { display: inline-block; height: 9px; margin-left: 8px }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 18px 20px; margin-bottom: 18px } svg { max-width: 100% }
"""


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
    model = summary.start.get("model")
    title = f"Run of {model}" if isinstance(model, str) else "Training run"
    parts = [
        f"<h1>{escape(title)}</h1><pre>{escape(format_overview(summary))}</pre>",
        *draw_pictures(events, colors),
        *section("Plans", _plan_table(summary, colors)),
        *section("Decisions", decision_table(events, colors)),
        *section("Switches", _switch_table(summary, colors)),
        *section("Critical batch / noise scale", *_ratio_part(summary)),
        *section("Faults", _fault_table(summary)),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _plan_table(summary: Summary, colors: dict[str, str]) -> str:
    fastest = max((use.tokens_per_second for use in summary.plans if use.seconds > 0), default=1.0)
    rows = []
    for use in summary.plans:
        speed = use.tokens_per_second
        length = 0 if math.isnan(speed) else 220 * speed / fastest
        bar = f'<span class="bar" style="width:{length:.0f}px;background:{colors[use.plan]}"></span>'
        share = use.seconds / summary.seconds if summary.seconds > 0 else 0.0
        cells = [
            plan_label(use.plan, colors),
            f"{use.steps:,}",
            f"{use.tokens:,}",
            f"{use.seconds:,.1f}",
            f"{share:.1%}",
        ]
        rows.append(row([*cells, f"{speed:,.0f}", bar], "lnnnnnl"))
    heads = ["plan", "steps", "tokens", "seconds in steps", "of the run", "tokens/s", ""]
    return table(heads, "lnnnnnl", rows)


def _switch_table(summary: Summary, colors: dict[str, str]) -> str:
    exact = {True: "yes", False: '<span class="bad">NO</span>', None: "not checked"}
    rows = []
    for switch in summary.switches:
        plans = [plan_label(plan_name(switch.get(end)), colors) for end in ("from", "to")]
        moved, least = (
            format_bytes(switch[n]) if switch.get(n) is not None else "-" for n in ("bytes_moved", "bytes_minimum")
        )
        phases = format_phases(switch.get("seconds") or {})
        rows.append(
            row([f"{switch['iteration']:,}", *plans, phases, moved, least, exact[switch.get("exact")]], "llllnnl")
        )
    return table(["step", "from", "to", "time", "moved", "least possible", "exact"], "llllnnl", rows)


def _ratio_part(summary: Summary) -> tuple[str, str]:
    """What was learned of c, one lesson a row, and what it comes to; two empty ones where nothing was."""
    story = summary.ratio
    if not story.lessons:
        return "", ""
    lines = ["The critical batch is c times the noise scale; intervals are of 95 %."]
    if story.start is not None and story.end is not None:
        lines.append(f"c: {format_ratio(story.start)} at the start, {format_ratio(story.end)} at the end.")
    if story.probes:
        lines.append(f"Probes, branches to measure it: {format_probes(story, summary.seconds)}.")
    heads = ["step", "learned from", "batches", "worth of a sequence", "c after it", "seconds"]
    return f"<p>{' '.join(lines)}</p>", table(heads, "lllnnn", [_lesson_row(lesson) for lesson in story.lessons])


def _lesson_row(lesson: RatioLesson) -> str:
    """One observation, or a branch that gave none."""
    worth = "nothing could be said"
    if lesson.log_ratio is not None:
        worth = f"x {math.exp(lesson.log_ratio):.2f}"
        if lesson.log_sd is not None:
            low, high = (math.exp(lesson.log_ratio + side * _SIGMAS_95 * lesson.log_sd) for side in (-1, 1))
            worth += f" [{low:.2f}, {high:.2f}]"
    cells = [
        f"{lesson.iteration:,}",
        escape(lesson.kind),
        f"{lesson.batches[0]} -> {lesson.batches[1]}",
        worth,
        "as before" if lesson.after is None else format_ratio(lesson.after),
        "-" if lesson.seconds is None else f"{lesson.seconds:.1f}",
    ]
    return row(cells, "lllnnn", "quiet" if lesson.after is None else "")


def _fault_table(summary: Summary) -> str:
    rows = []
    for fault in summary.faults:
        cells = [f"{fault['iteration']:,}", escape(str(fault.get("kind"))), escape(str(fault.get("message")))]
        rows.append(row(cells, "lll", "bad"))
    return table(["step", "kind", "message"], "lll", rows)
