"""What the log of a run says of c = critical batch / noise scale: how it was learned, and what that took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from copus_ext.core.efficiency.critical_ratio import PROBE, CriticalRatio
from copus_ext.core.events import Event

Interval = tuple[float, float, float]  # a value, and the lower and upper end of its 95 % interval


@dataclass(frozen=True)
class RatioLesson:
    """An observation of c, a branch that was to give one, or both where one came of the other.

    Attributes:
        iteration: steps finished then.
        kind: as logged with the observation; ``probe`` for a branch that said nothing.
        batches: the two that were compared, in sequences.
        log_ratio: ln (worth of a sequence at the second / at the first); None where nothing could be said.
        log_sd: its standard error.
        after: c as known with it; None where it changed nothing.
        seconds: of the branch; None of a free observation.
    """

    iteration: int
    kind: str
    batches: tuple[int, int]
    log_ratio: float | None
    log_sd: float | None
    after: Interval | None
    seconds: float | None


@dataclass(frozen=True)
class RatioStory:
    """All that was learned of c, in order. ``start`` and ``end``: as known at both ends; None where nobody asked."""

    lessons: tuple[RatioLesson, ...]
    start: Interval | None
    end: Interval | None

    @property
    def observations(self) -> tuple[RatioLesson, ...]:
        """What moved c."""
        return tuple(lesson for lesson in self.lessons if lesson.after is not None)

    @property
    def probes(self) -> tuple[RatioLesson, ...]:
        """Branches, whether they said something or not."""
        return tuple(lesson for lesson in self.lessons if lesson.seconds is not None)

    @property
    def probe_seconds(self) -> float:
        """Spent on branches."""
        return sum((lesson.seconds or 0.0 for lesson in self.lessons), 0.0)


def ratio_story(events: Sequence[Event]) -> RatioStory:
    """From the effective events of a run; an empty one where the log is older than these events."""
    lessons: list[RatioLesson] = []
    for event in events:
        if event["event"] not in ("critical_ratio", "probe"):
            continue
        lesson = _lesson(event)
        if lessons and _are_halves(lessons[-1], lesson):
            last = lessons.pop()
            seconds = last.seconds if lesson.seconds is None else lesson.seconds
            lesson = replace(lesson, after=lesson.after or last.after, seconds=seconds)
        lessons.append(lesson)
    known = [interval for event in events if (interval := known_ratio(event)) is not None]
    first, last_known = (known[0], known[-1]) if known else (None, None)
    return RatioStory(tuple(lessons), _known_at_start(events) or first, last_known)


def known_ratio(event: Event) -> Interval | None:
    """What was known of c at a ``decision`` or after a ``critical_ratio`` event; None where the event does not say."""
    if event["event"] == "decision":
        values = event.get("c")
    elif event["event"] == "critical_ratio":
        values = [event.get(name) for name in ("c", "low", "high")]
    else:
        return None
    return _interval(values)


def critical_batch_at(decision: Event, noise: Event | None) -> Interval:
    """The critical batch, c x noise scale, at a decision with its 95 % interval, in sequences; nan: not known.

    ``noise``: the latest ``noise_scale`` event. Both are taken as normal in the logarithm on either side of their
    values, and as independent: their distances to an end of the interval add up in squares. An open upper end of the
    noise scale leaves the product's open (inf).
    """
    ratio = known_ratio(decision)
    scale = None if noise is None else _interval([noise.get(name) for name in ("value", "low", "high")], open_end=True)
    if ratio is None or scale is None:
        return math.nan, math.nan, math.nan
    value = ratio[0] * scale[0]
    below = math.hypot(math.log(ratio[0] / ratio[1]), math.log(scale[0] / scale[1]))
    above = math.hypot(math.log(ratio[2] / ratio[0]), math.log(scale[2] / scale[0]))
    return value, value * math.exp(-below), value * math.exp(above)


def format_ratio(interval: Interval) -> str:
    """``1.9 [0.6, 6.1]``."""
    value, low, high = interval
    return f"{value:.2g} [{low:.2g}, {high:.2g}]"


def format_probes(story: RatioStory, run_seconds: float) -> str:
    """``3 in 12.4 s, 0.8 % of the run; 1 said nothing``."""
    seconds = story.probe_seconds
    share = f", {100 * seconds / run_seconds:.1f} % of the run" if run_seconds > 0 else ""
    silent = sum(probe.after is None for probe in story.probes)
    return f"{len(story.probes)} in {seconds:.1f} s{share}" + (f"; {silent} said nothing" if silent else "")


def _lesson(event: Event) -> RatioLesson:
    return RatioLesson(
        iteration=event["iteration"],
        kind=str(event.get("kind", PROBE)),
        batches=(event["batch_from"], event["batch_to"]),
        log_ratio=event.get("log_ratio"),
        log_sd=event.get("log_sd"),
        after=known_ratio(event),
        seconds=(event.get("seconds") or 0.0) if event["event"] == "probe" else None,
    )


def _are_halves(one: RatioLesson, other: RatioLesson) -> bool:
    """Whether one is a branch and the other what came of it: the log has them side by side as two events."""
    complete = (one.seconds is None) != (other.seconds is None) and (one.after is None) != (other.after is None)
    same = (one.kind, one.batches, one.log_ratio) == (other.kind, other.batches, other.log_ratio)
    return complete and same and one.kind == PROBE


def _known_at_start(events: Sequence[Event]) -> Interval | None:
    """What was known of c as the run began: by what it knew from a checkpoint, or the prior."""
    start = next((event for event in events if event["event"] == "run_start" and event.get("knowledge")), None)
    if start is None or "critical_ratio" not in start["knowledge"]:
        return None
    return CriticalRatio.from_json(start["knowledge"]["critical_ratio"]).interval(start["consumed_samples"])


def _interval(values: Any, open_end: bool = False) -> Interval | None:
    """Positive numbers, or None; ``open_end``: null stands for an upper end at infinity."""
    if values is None:
        return None
    value, low, high = values
    if high is None and open_end:
        high = math.inf
    if None in (value, low, high) or not 0 < low <= value <= high:
        return None
    return float(value), float(low), float(high)
