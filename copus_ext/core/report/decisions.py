"""The table of decisions in a report: what was chosen, why, and what else there was."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from copus_ext.core.events import Event
from copus_ext.core.report.html import number, percent, plan_label, row, table
from copus_ext.core.report.summary import is_change, plan_name

_TOP_CANDIDATES = 12  # shown of a decision


def decision_table(events: Sequence[Event], colors: dict[str, str]) -> str:
    """Changes and probes one by one; other decisions to stay that follow each other share a row with the last reason.

    Of a shared row the gains are the last decision's, too.
    """
    rows = []
    decisions = [event for event in events if event["event"] == "decision"]
    for notable, group in groupby(decisions, key=_is_notable):
        run = list(group)
        for decision in run if notable else run[-1:]:
            at = f"{decision['iteration']:,}"
            if not notable and len(run) > 1:
                at = f"{run[0]['iteration']:,}-{at}"
            what = _outcome(decision, colors) if notable else f"stay, {len(run)} x"
            why = escape(str(decision.get("reason") or "")) + _refusals(decision) + _candidates(decision)
            gains = [percent(decision.get("gain")), _quartiles(decision), percent(decision.get("gain_needed"))]
            rows.append(row([at, what, why, *gains], "lllnnn", "" if notable else "quiet"))
    return table(["step", "decision", "why", "gain", "quartiles", "needed"], "lllnnn", rows)


def _is_notable(decision: Event) -> bool:
    return is_change(decision) or bool(decision.get("probe"))


def _outcome(decision: Event, colors: dict[str, str]) -> str:
    """The plan that was chosen, or of a probe the one it ran under."""
    if is_change(decision):
        return plan_label(plan_name(decision.get("chosen")), colors)
    return f"stay, probe<div>{plan_label(plan_name(decision['probe']['plan']), colors)}</div>"


def _quartiles(decision: Event) -> str:
    """``-1.2 to +5.0 %``; older logs have the lower one alone."""
    low, high = decision.get("gain_low"), decision.get("gain_high")
    if low is None or high is None:
        return percent(low)
    return f"{100 * low:+.1f} to {percent(high)}"


def _refusals(decision: Event) -> str:
    """Plans that were wanted first, and what upstream's validation said of them."""
    refused = decision.get("refused") or []
    lines = [
        f'<div class="quiet">refused: {escape(plan_name(plan))}: {escape(str(why))}</div>' for plan, why in refused
    ]
    return "".join(lines)


def _candidates(decision: Event) -> str:
    """The plans that were weighed, best Goodput first, folded away."""
    candidates = sorted(
        decision.get("candidates") or [], key=lambda c: -(c.get("goodput") or c.get("throughput") or 0.0)
    )
    if not candidates:
        return ""
    rows = []
    for candidate in candidates[:_TOP_CANDIDATES]:
        numbers = [number(candidate.get(name)) for name in ("throughput", "efficiency", "goodput")]
        name, why_not = plan_name(candidate.get("plan")), candidate.get("why_not") or ""
        rows.append(row([escape(name), *numbers, escape(why_not)], "lnnnl"))
    inner = table(["plan", "sequences/s", "efficiency", "Goodput", "why not"], "lnnnl", rows)
    total = len(candidates) + (decision.get("unlisted") or 0)
    shown = f"{len(rows)} of " if len(rows) < total else ""
    return f"<details><summary>{shown}{total:,} candidates</summary>{inner}</details>"
