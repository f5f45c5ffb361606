"""The record of a run: ``events.jsonl``, one JSON object a line, written as things happen and only ever appended to.

Every event has ``event`` (one of :data:`EVENTS`), ``time_s`` (seconds of running since the run began, going on where
it stopped after a resume), ``iteration`` (steps finished) and ``consumed_samples``. JSON has no infinities: a number
that is not finite is written as null. So the ``high`` of a noise scale is null where the upper end is open, ``low`` is
null too before there is an interval, and ``value`` is null where the squared gradient came out at 0 or less.

A resumed run writes on in the same file. What the earlier attempt did after the checkpoint it was resumed from did not
happen as far as the training is concerned, yet stays in the file; :func:`read_events` leaves it out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

Event = dict[str, Any]

EVENTS = (
    "run_start",
    "step",
    "noise_scale",
    "decision",
    "switch",
    "switch_check",
    "critical_ratio",
    "probe",
    "checkpoint",
    "eval",
    "prepare",
    "memory",
    "fault",
    "run_end",
)


class EventSink(Protocol):
    """Where events go: :class:`EventLog` on the rank that writes, :class:`NullEventLog` on the others."""

    def write(self, event: str, iteration: int, consumed_samples: int, **fields: Any) -> None:
        """Record one event."""

    def close(self) -> None:
        """No more events will come."""


class NullEventLog:
    """Takes events and drops them."""

    def write(self, event: str, iteration: int, consumed_samples: int, **fields: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class EventLog:
    """Appends events to a file, each flushed as a whole line, so that a killed run loses the last one at most.

    Args:
        path: the file; its folder is made where it is missing. A last line that was cut short is removed.
        clock: seconds from any origin, wall or virtual.
        resumed_from: the iteration a resumed run goes on from, None for a run from scratch. It is written into
            ``run_start``, which has to be the first event of every attempt.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float], resumed_from: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.path)
        self._resumed_from = resumed_from
        self._clock = clock
        self._origin = clock() - (_last_time(self.path) if resumed_from is not None else 0.0)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, event: str, iteration: int, consumed_samples: int, **fields: Any) -> None:
        """Append one event.

        Args:
            event: one of :data:`EVENTS`.
            iteration: steps finished.
            consumed_samples: training sequences consumed.
            fields: anything JSON can hold, numpy scalars and numbers that are not finite besides.

        Raises:
            ValueError: an event of no known kind.
        """
        if event not in EVENTS:
            raise ValueError(f"unknown event {event!r}; known: {', '.join(EVENTS)}")
        record: Event = {
            "event": event,
            "time_s": round(self._clock() - self._origin, 6),
            "iteration": iteration,
            "consumed_samples": consumed_samples,
        }
        if event == "run_start":
            record["resumed_from"] = self._resumed_from
        # One write call for the line and its end: what a crash leaves behind is then a prefix of it.
        self._file.write(json.dumps(plain(record | fields), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; writing after that is an error."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: str | Path) -> list[Event]:
    """The events of a run in order, without those that a resume has superseded or a crash cut short.

    A ``run_start`` that is resumed from iteration k takes back what came after the checkpoint of k (where that was not
    logged: what has a higher iteration); one from scratch begins a new run, and what stands before it is another's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not an event.
    """
    effective: list[Event] = []
    for event in _read_lines(Path(path)):
        if event["event"] == "run_start":
            resumed_from = event.get("resumed_from")
            effective = [] if resumed_from is None else _up_to(effective, resumed_from)
        effective.append(event)
    return effective


def _up_to(events: list[Event], iteration: int) -> list[Event]:
    """What of ``events`` a checkpoint of ``iteration`` holds."""
    kept = [e for e in events if e["iteration"] <= iteration and e["event"] != "run_end"]
    for index in range(len(kept) - 1, -1, -1):
        if kept[index]["event"] == "checkpoint" and kept[index]["iteration"] == iteration:
            return kept[: index + 1]
    return kept


def _read_lines(path: Path) -> Iterator[Event]:
    """Every whole line, superseded or not. One without its end was cut short by a crash and does not count."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                event = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(event, dict) or not {"event", "time_s", "iteration", "consumed_samples"} <= event.keys():
                raise ValueError(f"{path}:{number}: an event has event, time_s, iteration and consumed_samples")
            yield event


def _last_time(path: Path) -> float:
    """Seconds the run had been going when the file ends; time spent on superseded steps was spent all the same."""
    time_s = 0.0
    if path.exists():
        for event in _read_lines(path):
            time_s = float(event["time_s"])
    return time_s


def _drop_torn_line(path: Path) -> None:
    """Cut the file after its last line end, so that the next event starts a line of its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def plain(value: Any) -> Any:
    """The value as JSON can hold it: numpy scalars as Python's, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
