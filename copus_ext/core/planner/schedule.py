"""Plans at given points of a run: ``--copus-schedule "0:dp4,mbs2,gbs16 4000:tp2,pp2,mbs2,gbs32"``."""

from __future__ import annotations

from dataclasses import dataclass

from copus_ext.core.errors import UserError
from copus_ext.core.plan import Plan, parse_plan

_FLAG = "--copus-schedule"


@dataclass(frozen=True)
class Schedule:
    """Which plan holds from which number of consumed samples on; the first from 0. Made by :func:`parse_schedule`."""

    entries: tuple[tuple[int, Plan], ...]

    def plan_at(self, consumed_samples: int) -> Plan:
        """The plan of the step that starts at ``consumed_samples``."""
        return [plan for start, plan in self.entries if start <= consumed_samples][-1]

    def next_change(self, consumed_samples: int) -> int | None:
        """The first change after ``consumed_samples``; None if the plan stays."""
        return next((start for start, _ in self.entries if start > consumed_samples), None)


def parse_schedule(text: str, base: Plan) -> Schedule:
    """Read ``samples:plan`` entries separated by spaces; plans as in :func:`~copus_ext.core.plan.parse_plan`.

    Args:
        text: the value of the flag.
        base: gives the number of ranks, and the batch sizes and switches that an entry does not name.

    Raises:
        UserError: an entry that is not understood or impossible, starts that do not begin at 0 or do not rise, or a
            stretch that its plan's steps would not end exactly.
    """
    words = text.split()
    if not words:
        raise UserError(f"{_FLAG} is empty; write entries like 0:dp4,mbs2,gbs16, separated by spaces")
    entries = tuple(_parse_entry(word, base) for word in words)
    if entries[0][0] != 0:
        raise UserError(f"{_FLAG}: the first entry {words[0]!r} must start at 0 samples; put a plan for 0: before it")
    for index in range(1, len(entries)):
        _check_stretch(entries[index - 1], entries[index], words[index])
    return Schedule(entries)


def _parse_entry(word: str, base: Plan) -> tuple[int, Plan]:
    start, colon, plan = word.partition(":")
    if not (colon and start.isdecimal()):
        raise UserError(f"{_FLAG}: entry {word!r} is not SAMPLES:PLAN; write it like 4000:tp2,pp2,mbs2,gbs32")
    try:
        return int(start), parse_plan(plan, base)
    except ValueError as error:
        raise UserError(f"{_FLAG}: entry {word!r}: {error}; give a plan that fits") from error


def _check_stretch(before: tuple[int, Plan], after: tuple[int, Plan], word: str) -> None:
    """Steps are whole: the plan in force must reach the next start exactly."""
    start, plan = before
    end, batch = after[0], plan.global_batch
    if end <= start:
        raise UserError(f"{_FLAG}: entry {word!r} must start after the {start} samples of the one before it; sort them")
    steps, over = divmod(end - start, batch)
    if over:
        below, above = start + steps * batch, start + (steps + 1) * batch
        nearest = f"{below} or {above}" if steps else f"{above}"
        raise UserError(
            f"{_FLAG}: entry {word!r}: steps of {batch} samples from {start} on do not end at {end}; "
            f"start it at {nearest}"
        )
