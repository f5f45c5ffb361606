"""What a run did, in a page: from its events, for the terminal and for the report."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copus_ext.core.events import Event
from copus_ext.core.plan import plan_from_json
from copus_ext.core.report.ratio import RatioStory, format_probes, format_ratio, ratio_story

_WIDTH = 100  # columns
_EDGE_STEPS = 10  # a single step's loss is noise: the mean of this many stands for the start and for the end


@dataclass(frozen=True)
class PlanUse:
    """What the steps under one plan amounted to."""

    plan: str
    steps: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of step time; nan where no time was logged."""
        return self.tokens / self.seconds if self.seconds > 0 else math.nan


@dataclass(frozen=True)
class Summary:
    """The short story of a run. Events are kept as logged; losses that were not finite are counted, not averaged."""

    start: Event
    status: str  # as in ``run_end``; "not finished" without one
    iteration: int
    consumed_samples: int
    seconds: float
    losses: tuple[float, ...]
    bad_losses: int
    evals: tuple[Event, ...]
    plans: tuple[PlanUse, ...]
    noise: tuple[Event, ...]
    ratio: RatioStory
    changes: tuple[Event, ...]  # decisions for another plan
    stays: int
    weighs_gains: bool  # in some decision
    switches: tuple[Event, ...]
    checks: tuple[Event, ...]  # of switches of the layout: whether N and S went on
    faults: tuple[Event, ...]
    resumes: tuple[int, ...]
    source: str | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of step time, over all plans."""
        return PlanUse("", 0, sum(p.tokens for p in self.plans), sum(p.seconds for p in self.plans)).tokens_per_second


def summarise(events: Iterable[Event], source: str | Path | None = None) -> Summary:
    """Sum up the effective events of a run (:func:`copus_ext.core.events.read_events`), read from ``source``.

    Raises:
        ValueError: no events at all.
    """
    events = list(events)
    if not events:
        raise ValueError(f"no events in {source or 'the log'}")
    kinds: dict[str, list[Event]] = {}
    for event in events:
        kinds.setdefault(event["event"], []).append(event)
    starts, steps, decisions = kinds.get("run_start", []), kinds.get("step", []), kinds.get("decision", [])
    losses = tuple(step["loss"] for step in steps if step.get("loss") is not None)
    changes = tuple(decision for decision in decisions if is_change(decision))
    ends = kinds.get("run_end", [])
    return Summary(
        start=starts[-1] if starts else {},
        status=str(ends[-1].get("status", "finished")) if ends else "not finished",
        iteration=events[-1]["iteration"],
        consumed_samples=events[-1]["consumed_samples"],
        seconds=events[-1]["time_s"],
        losses=losses,
        bad_losses=len(steps) - len(losses),
        evals=tuple(event for event in kinds.get("eval", []) if event.get("loss") is not None),
        plans=plan_uses(steps),
        noise=tuple(event for event in kinds.get("noise_scale", []) if event.get("N") is not None),
        ratio=ratio_story(events),
        changes=changes,
        stays=len(decisions) - len(changes),
        weighs_gains=any(decision.get("gain") is not None for decision in decisions),
        switches=tuple(kinds.get("switch", [])),
        checks=tuple(kinds.get("switch_check", [])),
        faults=tuple(kinds.get("fault", [])),
        resumes=tuple(start["resumed_from"] for start in starts if start.get("resumed_from") is not None),
        source=None if source is None else str(source),
    )


def is_change(decision: Event) -> bool:
    """Whether a decision was for another plan than the current one."""
    return plan_name(decision.get("chosen")) != plan_name(decision.get("current"))


def plan_name(value: Any) -> str:
    """A plan as people write it (``dp4,mbs2,gbs16``), from an event that holds it so or as :meth:`Plan.to_json`."""
    return str(plan_from_json(value)) if isinstance(value, dict) else str(value)


def plan_uses(steps: Iterable[Event]) -> tuple[PlanUse, ...]:
    """What was done under each plan, in order of first use."""
    uses: dict[str, PlanUse] = {}
    for step in steps:
        plan = plan_name(step.get("plan"))
        old = uses.get(plan, PlanUse(plan, 0, 0, 0.0))
        tokens, seconds = step.get("tokens") or 0, step.get("step_time_s") or 0.0
        uses[plan] = PlanUse(plan, old.steps + 1, old.tokens + tokens, old.seconds + seconds)
    return tuple(uses.values())


def format_summary(summary: Summary) -> str:
    """The summary for a terminal of 100 columns, without colours."""
    lines = [*_decision_lines(summary), *_switch_lines(summary), *_fault_lines(summary)]
    if summary.source is not None:
        lines.append(_entry("events", summary.source))
    return "\n".join([format_overview(summary), *lines])


def format_overview(summary: Summary) -> str:
    """The part of the summary that does not grow with what happened: policy, loss, speed, noise scale, c."""
    lines = [*_loss_lines(summary), *_speed_lines(summary), *_noise_lines(summary), *_ratio_lines(summary)]
    return "\n".join([_headline(summary), *_policy_line(summary), *lines])


def format_noise(event: Event) -> str:
    """``33.1 [25, 48]``; what the log holds as null is open above, or not known."""
    value, low, high = event.get("value"), event.get("low"), event.get("high")
    text = "open" if value is None else _number(value)
    if low is None:
        return f"{text} [too early to say]"
    return f"{text} [{_number(low)}, {'open' if high is None else _number(high)}]"


def format_phases(seconds: dict[str, float]) -> str:
    """``0.41 s (groups 0.02, model 0.10)``: the whole, then what it is made of."""
    parts = ", ".join(f"{phase} {spent:.2f}" for phase, spent in seconds.items() if phase != "total")
    return f"{switch_seconds(seconds):.2f} s" + (f" ({parts})" if parts else "")


def switch_seconds(seconds: dict[str, float]) -> float:
    """What a switch took: its ``total`` where that was measured too, else the sum of its phases."""
    return float(seconds.get("total", sum(seconds.values())))


def _headline(summary: Summary) -> str:
    start = summary.start
    words = [f"Run {summary.status}: {_count(summary.iteration, 'step')}", f"{summary.consumed_samples:,} sequences"]
    words.append(f"{summary.seconds:.1f} s")
    if "world_size" in start:
        words.append(_count(start["world_size"], "rank"))
    policy = (start.get("settings") or {}).get("policy", start.get("policy"))
    if policy is not None:
        words.append(f"policy {policy}")
    return ", ".join(words)


def _policy_line(summary: Summary) -> list[str]:
    """What a policy that weighs gains went by; others have settings for it that they do not follow."""
    settings = summary.start.get("settings") or {}
    if not summary.weighs_gains or "objective" not in settings:
        return []
    return [_entry("objective", f"{settings['objective']}, switch rule {settings.get('switch_rule')}")]


def _loss_lines(summary: Summary) -> list[str]:
    losses = summary.losses
    lines = []
    if losses:
        edge = min(_EDGE_STEPS, len(losses))
        means = (
            f"mean of the first {edge} steps {_mean(losses[:edge]):.4f}, of the last {edge} {_mean(losses[-edge:]):.4f}"
        )
        lines.append(_entry("loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}   ({means})"))
    if summary.bad_losses:
        lines.append(_entry("", f"{_count(summary.bad_losses, 'step')} without a finite loss"))
    if summary.evals:
        first, last = summary.evals[0], summary.evals[-1]
        lines.append(_entry("validation", f"{first['loss']:.4f} -> {last['loss']:.4f}   (step {last['iteration']})"))
    return lines


def _speed_lines(summary: Summary) -> list[str]:
    if not summary.plans:
        return []
    over_all = sum(p.tokens for p in summary.plans) / summary.seconds if summary.seconds > 0 else math.nan
    text = f"{summary.tokens_per_second:,.0f} tokens/s in steps, {over_all:,.0f} with everything between them"
    width = max(len(use.plan) for use in summary.plans)
    lines = [_entry("speed", text)]
    for use in summary.plans:
        lines.append(_entry("", f"{use.plan:<{width}}  {use.tokens_per_second:>9,.0f} tokens/s  {use.steps:>6,} steps"))
    return lines


def _noise_lines(summary: Summary) -> list[str]:
    if not summary.noise:
        return []
    first, last = summary.noise[0], summary.noise[-1]
    text = f"{format_noise(first)} at step {first['iteration']} -> {format_noise(last)} at step {last['iteration']}"
    return [_entry("noise scale", text), _entry("", "(in sequences, with 95 % interval)")]


def _ratio_lines(summary: Summary) -> list[str]:
    """c, critical batch / noise scale, where it was observed; and the branches that were made to measure it."""
    story, lines = summary.ratio, []
    if story.observations and story.end is not None:
        kinds = Counter(lesson.kind for lesson in story.observations)
        told = ", ".join(_count(number, kind) for kind, number in kinds.items())
        lines.append(_entry("c", f"{format_ratio(story.start or story.end)} -> {format_ratio(story.end)} by {told}"))
        lines.append(_entry("", "(critical batch / noise scale, with 95 % interval)"))
    if story.probes:
        lines.append(_entry("probes", format_probes(story, summary.seconds)))
    return lines


def _decision_lines(summary: Summary) -> list[str]:
    changes = summary.changes
    total = len(changes) + summary.stays
    lines = [
        _entry("decisions", f"{total}: {_count(len(changes), 'change')}, {summary.stays} to stay" if total else "none")
    ]
    for decision in changes:
        lines.append(_entry("", f"step {decision['iteration']}: {_from_to(decision, 'current', 'chosen')}"))
        lines += _wrapped(str(decision.get("reason") or "no reason given"))
    return lines


def _switch_lines(summary: Summary) -> list[str]:
    lines = [_entry("switches", str(len(summary.switches)) if summary.switches else "none")]
    for switch in summary.switches:
        exact = {True: "exact", False: "NOT EXACT", None: "exactness not checked"}[switch.get("exact")]
        spent = f"{switch_seconds(switch.get('seconds') or {}):.2f} s"
        lines.append(_entry("", f"step {switch['iteration']}: {spent}, {_format_moved(switch)}{exact}"))
    return lines + _check_lines(summary)


def _check_lines(summary: Summary) -> list[str]:
    """Whether |G|^2 and tr(Sigma) went on after switches of the layout as before them."""
    if not summary.checks:
        return []
    suspect = [check for check in summary.checks if check.get("suspect")]
    text = f"gradients compared before and after: {len(summary.checks)}, {len(suspect) or 'none'} suspect"
    sigmas = [f"step {c['iteration']}: {c['z_n']:+.1f} and {c['z_s']:+.1f} sigma" for c in suspect]
    return [_entry("", text), *(_entry("", line) for line in sigmas)]


def _format_moved(switch: Event) -> str:
    """Bytes that a switch moved, and the least that had to be where it moved more."""
    moved, least = switch.get("bytes_moved"), switch.get("bytes_minimum")
    if moved is None:
        return ""
    of_least = "" if least in (None, moved) else f" where {format_bytes(least)} had to be"
    return f"{format_bytes(moved)} moved{of_least}, "


def _fault_lines(summary: Summary) -> list[str]:
    lines = [_entry("faults", str(len(summary.faults)) if summary.faults else "none")]
    for fault in summary.faults:
        lines.append(_entry("", f"step {fault['iteration']}: {fault.get('kind')}"))
        lines += _wrapped(str(fault.get("message")))
    if summary.resumes:
        lines.append(_entry("resumed", "from step " + ", ".join(str(iteration) for iteration in summary.resumes)))
    return lines


def format_bytes(count: float) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"


def _from_to(event: Event, source: str, target: str) -> str:
    return f"{plan_name(event.get(source))} -> {plan_name(event.get(target))}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * 16, subsequent_indent=" " * 16)


def _entry(name: str, text: Any) -> str:
    return f"  {name:<11} {text}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
