"""Measured step times of plans in a CSV file: written by ``tools/profile_throughput.py``, read by a run that starts.

A row is one visit to a plan, with every step time of it, or with the reason why the plan could not be had. Rows are
whole lines that are only ever appended; a last line that a crash cut short does not count. Every row says what was
measured, so that a table is never taken for that of another model or machine.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.cost.visits import MAD_TO_SD
from copus_ext.core.errors import UserError
from copus_ext.core.plan import Layout, Plan

_LAYOUT_COLUMNS = {  # column: field of Layout
    **{size: size for size in ("dp", "tp", "pp", "vpp", "cp", "ep")},
    "sp": "sequence_parallel",
    "zero1": "distributed_optimizer",
    "recompute": "recompute",
}
_SUBJECT_COLUMNS = ("model", "ranks", "device", "options")
COLUMNS = (
    "plan",
    *_LAYOUT_COLUMNS,
    "mbs",
    "gbs",
    "lap",
    "step_time_s",
    "step_time_sd_s",
    "steps",
    "peak_memory_bytes",
    "failure",
    "step_times_s",
    *_SUBJECT_COLUMNS,
)


@dataclass(frozen=True)
class Subject:
    """What was measured. Step times of one subject say nothing exact about another.

    ``device`` names the device and how many of the ranks are on a node; ``options`` are the other flags that step times
    depend on, in words.
    """

    model: ModelShape
    ranks: int
    device: str
    options: str = ""

    def columns(self) -> dict[str, str]:
        """As it stands in every row."""
        words = [f"{name}={int(value)}" for name, value in _told(self.model).items()]
        return dict(zip(_SUBJECT_COLUMNS, (" ".join(words), str(self.ranks), self.device, self.options), strict=True))

    def difference(self, other: Subject) -> str | None:
        """Where ``self``, a table's, is not ``other``, a run's: in words; ``None`` where they are the same."""
        mine, theirs = _told(self.model), _told(other.model)
        pairs = [(name, mine.get(name), theirs.get(name)) for name in {**mine, **theirs}]
        pairs += [(name, getattr(self, name), getattr(other, name)) for name in _SUBJECT_COLUMNS[1:]]
        unlike = [f"{name} {_word(one)}, not {_word(two)}" for name, one, two in pairs if one != two]
        return "; ".join(unlike) or None


@dataclass(frozen=True)
class Row:
    """One visit to a plan, in lap number ``lap``: the times of its steps [s], or ``failure``, why there are none.

    ``peak_memory_bytes``: of the rank that needed most; ``None`` where that is not known.
    """

    plan: Plan
    lap: int
    step_times_s: tuple[float, ...] = ()
    peak_memory_bytes: int | None = None
    failure: str = ""

    @property
    def step_time_s(self) -> float:
        """Median; ``nan`` without steps."""
        return float(np.median(self.step_times_s)) if self.step_times_s else float("nan")

    @property
    def step_time_sd_s(self) -> float:
        """Standard deviation of a step, from the median absolute deviation, which bears a minority of odd steps."""
        if not self.step_times_s:
            return float("nan")
        return MAD_TO_SD * float(np.median(np.abs(np.array(self.step_times_s) - self.step_time_s)))


@dataclass(frozen=True)
class ThroughputTable:
    """The rows of a file in their order. ``subject`` is ``None`` while there is none."""

    subject: Subject | None
    rows: tuple[Row, ...]

    def failed(self) -> dict[Plan, str]:
        """Plans that could not be had, and why."""
        return {row.plan: row.failure for row in self.rows if row.failure}

    def step_times(self) -> dict[Plan, tuple[float, ...]]:
        """Every step time of each plan that was measured [s], its visits one after the other."""
        found: dict[Plan, tuple[float, ...]] = {}
        for row in self.rows:
            if row.step_times_s:
                found[row.plan] = found.get(row.plan, ()) + row.step_times_s
        return found

    def seed(self, throughput: ThroughputModel, known: Container[Plan] = ()) -> ThroughputModel:
        """The model after these steps, some time ago; plans that are ``known`` already are left as they are."""
        for row in self.rows:
            if row.plan in known:
                throughput = throughput.later(sum(row.step_times_s))
                continue
            for seconds in row.step_times_s:
                throughput = throughput.observe(row.plan, seconds)
            throughput = throughput.later()
        return throughput.after_a_break()

    def check(self, subject: Subject, flag: str) -> None:
        """See that the table is of this model, on as many ranks of the same machine.

        Raises:
            UserError: it is not.
        """
        if self.subject is not None and (unlike := self.subject.difference(subject)):
            raise UserError(f"{flag}: was measured with {unlike}; measure with the flags of this run")


def visits(plans: Iterable[Plan], laps: int, start: Layout, table: ThroughputTable) -> list[tuple[Plan, int]]:
    """Plans with the numbers of the laps in which they still have to be visited, in order.

    Every lap goes once round all plans, and a machine that is busy for a while spoils no plan's visits all. In a lap
    each layout has its turn once, beginning with ``start``: changing batch sizes costs next to nothing. Plans that
    failed are not tried again.
    """
    done, failed = {(row.plan, row.lap) for row in table.rows}, table.failed()
    turns = {start: 0}
    for plan in (wanted := list(dict.fromkeys(plans))):
        turns.setdefault(plan.layout, len(turns))
    wanted.sort(key=lambda plan: (turns[plan.layout], plan.global_batch, plan.micro_batch))
    rounds = [(plan, lap) for lap in range(1, laps + 1) for plan in wanted]
    return [visit for visit in rounds if visit not in done and visit[0] not in failed]


def read_table(path: str | Path, flag: str) -> ThroughputTable:
    """Read a table.

    Args:
        path: the file.
        flag: the flag that named it, for messages.

    Raises:
        UserError: there is no such file, or a whole line of it is not a row.
    """
    name = f"{flag} {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file; make it with tools/profile_throughput.py") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: can't be read: {error}") from None
    whole = text[: text.rfind("\n") + 1]
    return _table_of(whole.splitlines(), name)


def append_row(path: str | Path, subject: Subject, row: Row) -> None:
    """Append one row, as one whole line; a line that was cut short before goes, and a new file gets its head."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
        head = "" if whole else _line(COLUMNS)
        file.write((head + _line(_cells(row, subject))).encode())


@dataclass(frozen=True)
class Spread:
    """How noisy a table is, as shares of the step time: medians over plans of standard deviations."""

    within_visits: float  # of steps of one visit
    between_laps: float  # of the medians of a plan's visits


def spread(table: ThroughputTable) -> Spread:
    """How much step times scatter within visits and from lap to lap; ``nan`` where that can't be told."""
    visits: dict[Plan, list[Row]] = {}
    for row in table.rows:
        if row.step_times_s:
            visits.setdefault(row.plan, []).append(row)
    within = [row.step_time_sd_s / row.step_time_s for rows in visits.values() for row in rows]
    logs = [np.log([row.step_time_s for row in rows]) for rows in visits.values() if len(rows) > 1]
    between = [float(np.std(log, ddof=1)) for log in logs]
    return Spread(_median(within), _median(between))


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else float("nan")


# -- a row as cells


def _cells(row: Row, subject: Subject) -> list[str]:
    """A row in the order of ``COLUMNS``."""
    layout = {column: getattr(row.plan.layout, field) for column, field in _LAYOUT_COLUMNS.items()}
    found: dict[str, Any] = {
        "plan": row.plan,
        **{column: int(value) if isinstance(value, bool) else value for column, value in layout.items()},
        "mbs": row.plan.micro_batch,
        "gbs": row.plan.global_batch,
        "lap": row.lap,
        "step_time_s": f"{row.step_time_s:.6g}" if row.step_times_s else "",
        "step_time_sd_s": f"{row.step_time_sd_s:.6g}" if row.step_times_s else "",
        "steps": len(row.step_times_s),
        "peak_memory_bytes": "" if row.peak_memory_bytes is None else row.peak_memory_bytes,
        "failure": " ".join(row.failure.split()),  # whatever it says, in one line
        "step_times_s": " ".join(f"{seconds:.6g}" for seconds in row.step_times_s),
        **subject.columns(),
    }
    return [str(found[column]) for column in COLUMNS]


def _line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _table_of(lines: Sequence[str], name: str) -> ThroughputTable:
    if not lines:
        return ThroughputTable(None, ())
    head = next(csv.reader(lines[:1]))
    if tuple(head) != COLUMNS:
        lacking = [column for column in COLUMNS if column not in head]
        why = f"lacks the column {lacking[0]}" if lacking else "has other columns, or another order of them"
        raise UserError(f"{name}, line 1: {why}; make the file with this version of tools/profile_throughput.py")
    read = list(_rows(lines, name))
    if not read:
        return ThroughputTable(None, ())
    subject = read[0][1]
    for number, (_, other) in enumerate(read, start=2):
        if unlike := other.difference(subject):
            raise UserError(f"{name}, line {number}: has {unlike} in line 2; one table holds one model on one machine")
    return ThroughputTable(subject, tuple(row for row, _ in read))


def _rows(lines: Sequence[str], name: str) -> Iterator[tuple[Row, Subject]]:
    for number, line in enumerate(lines[1:], start=2):
        try:
            values = next(csv.reader([line]), [])
            if len(values) != len(COLUMNS):
                raise ValueError(f"has {len(values)} values, not {len(COLUMNS)}")
            cells = dict(zip(COLUMNS, values, strict=True))
            yield _row_of(cells), _subject_of(cells)
        except (ValueError, TypeError) as error:
            raise UserError(f"{name}, line {number}: {error}; mend or remove the line") from None


def _row_of(cells: dict[str, str]) -> Row:
    plan = _plan_of(cells)
    times = tuple(float(word) for word in cells["step_times_s"].split())
    if not all(np.isfinite(times)) or min(times, default=1.0) <= 0:
        raise ValueError("a step takes a positive number of seconds")
    if bool(times) == bool(cells["failure"]):
        raise ValueError("a row has either step_times_s or a failure")
    memory = cells["peak_memory_bytes"]
    return Row(plan, int(cells["lap"]), times, int(memory) if memory else None, cells["failure"])


def _plan_of(cells: dict[str, str]) -> Plan:
    values: dict[str, Any] = {field: cells[column] for column, field in _LAYOUT_COLUMNS.items()}
    for field in set(values) - {"recompute"}:
        values[field] = int(values[field])
    for field in ("sequence_parallel", "distributed_optimizer"):
        values[field] = bool(values[field])
    plan = Plan(Layout(**values), int(cells["mbs"]), int(cells["gbs"]))
    if str(plan) != cells["plan"]:
        raise ValueError(f"the plan is {cells['plan']}, and its columns say {plan}")
    return plan


def _subject_of(cells: dict[str, str]) -> Subject:
    words = dict(word.split("=", 1) for word in cells["model"].split())
    known = {entry.name: entry.type in ("bool", bool) for entry in fields(ModelShape)}
    if unknown := sorted(set(words) - set(known)):
        raise ValueError(f"a model has no {unknown[0]}")
    sizes: dict[str, Any] = {name: bool(int(word)) if known[name] else int(word) for name, word in words.items()}
    return Subject(ModelShape(**sizes), int(cells["ranks"]), cells["device"], cells["options"])


def _told(model: ModelShape) -> dict[str, int]:
    """The sizes of a model, without those that are what they are by default: a new field leaves old tables alone."""
    return {
        entry.name: getattr(model, entry.name)
        for entry in fields(model)
        if entry.default is MISSING or getattr(model, entry.name) != entry.default
    }


def _word(value: object) -> str:
    return "its default" if value is None else str(value) or "none"
