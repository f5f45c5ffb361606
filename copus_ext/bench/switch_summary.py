"""From single switches to the figures that sum them up. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Switched:
    """One switch, of all ranks: seconds and shares are the largest of any rank.

    ``wall_s`` lies between barriers, without the steps behind it; ``ahead_s`` is what making ready took while training
    would have gone on. ``wire``: what the switch moved over (:mod:`copus_ext.adapters.wire`). ``transport``: the same
    bytes sent by torch's messages and copied raw. ``ram_save_s`` and ``ram_load_s``: upstream's checkpoint in memory,
    between the same two layouts just before; ``ram_same``: it brought the same weights and optimizer state.
    ``..._counted`` is what the switch says itself.
    """

    model: str
    kind: str
    old: str
    new: str
    first_visit: bool
    wall_s: float
    ahead_s: float
    seconds: dict[str, float]
    move_s: float
    bytes_moved: int
    bytes_minimum: int
    exact: bool
    rank_state_bytes: int
    peak_extra_over_state_rss: float
    peak_extra_over_state_counted: float | None
    first_step_s: float
    second_step_s: float
    transport: dict[str, Any]
    wire: str = ""
    ram_save_s: float | None = None
    ram_load_s: float | None = None
    ram_same: bool | None = None

    @property
    def ram_s(self) -> float | None:
        """Seconds through a checkpoint in memory."""
        if self.ram_save_s is None or self.ram_load_s is None:
            return None
        return self.ram_save_s + self.ram_load_s

    @property
    def peak_extra_over_state(self) -> float:
        """As the switch counts it, and else from the resident set."""
        counted = self.peak_extra_over_state_counted
        return self.peak_extra_over_state_rss if counted is None else counted

    @property
    def bytes_moved_over_min(self) -> float:
        """1 where nothing has to move and nothing does."""
        return self.bytes_moved / self.bytes_minimum if self.bytes_minimum else 1.0 + self.bytes_moved

    @property
    def move_over_memcpy_bound(self) -> float:
        """Our moving over the best raw transport of the same bytes."""
        return self.move_s / float(self.transport["best_s"])

    @property
    def move_over_fresh_transport(self) -> float:
        """The same over the best into memory that was just taken, as a switch's is."""
        return self.move_s / float(self.transport["fresh_s"])

    @property
    def bookkeeping_s(self) -> float:
        """All but moving and verifying."""
        return sum(self.seconds.get(name, 0.0) for name in ("prepare", "plan", "sync", "release"))

    @property
    def verify_over_wall(self) -> float:
        """The share of checksums, and of comparing what stays on its rank."""
        return self.seconds.get("verify", 0.0) / self.wall_s

    @property
    def first_step_over_second(self) -> float:
        """What the first step behind the switch costs more."""
        return self.first_step_s / self.second_step_s

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Switched:
        """Inverse of :meth:`to_json`."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """Plain values, with what follows from them."""
        derived = (
            "ram_s",
            "peak_extra_over_state",
            "bytes_moved_over_min",
            "move_over_memcpy_bound",
            "move_over_fresh_transport",
            "first_step_over_second",
        )
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class Restarted:
    """A checkpoint on disk and a new start of all processes in another layout, without the step it ends with."""

    kind: str
    old: str
    new: str
    save_s: float
    start_s: float

    @property
    def total_s(self) -> float:
        """What training stands still."""
        return self.save_s + self.start_s


def summarise(switches: Sequence[Switched], restarts: Sequence[Restarted]) -> dict[str, Any]:
    """All timed switches count, with those that go somewhere for the first time.

    Without a checkpoint of its own a switch is compared with the median one between the same layouts with the same
    optimizer; without a restart of its own, with one between the same layouts with another optimizer, and else with the
    shortest restart there was.
    """
    restart, ram = (_speedups(switches, other) for other in (_restart_of(restarts), _ram_of(switches)))
    known = [one.ram_same for one in switches if one.ram_same is not None]
    first = [one.wall_s for one in switches if one.first_visit]
    later = [one.wall_s for one in switches if not one.first_visit]
    return {
        "speedup_vs_restart_min": _of(min, restart),
        "speedup_vs_restart_median": _of(statistics.median, restart),
        "speedup_vs_ram_checkpoint_min": _of(min, ram),
        "speedup_vs_ram_checkpoint_median": _of(statistics.median, ram),
        "bytes_moved_over_min_max": _of(max, [one.bytes_moved_over_min for one in switches]),
        "peak_extra_over_rank_state_max": _of(max, [one.peak_extra_over_state for one in switches]),
        "peak_extra_over_rank_state_max_rss": _of(max, [one.peak_extra_over_state_rss for one in switches]),
        "move_over_memcpy_bound_median": _of(statistics.median, [one.move_over_memcpy_bound for one in switches]),
        "move_over_fresh_transport_median": _of(statistics.median, [one.move_over_fresh_transport for one in switches]),
        "all_exact": all(one.exact for one in switches),
        "ram_checkpoint_all_same": all(known) if known else None,
        "switch_s_first_visit_median": _of(statistics.median, first),
        "switch_s_later_median": _of(statistics.median, later),
        "ram_checkpoint_s_median": _of(statistics.median, [one.ram_s for one in switches if one.ram_s is not None]),
        "restart_s_median": _of(statistics.median, [one.total_s for one in restarts]),
        "ahead_s_first_visit_median": _of(statistics.median, [one.ahead_s for one in switches if one.first_visit]),
        "bookkeeping_s_median": _of(statistics.median, [one.bookkeeping_s for one in switches]),
        "verify_over_switch_median": _of(statistics.median, [one.verify_over_wall for one in switches]),
        "first_step_over_second_median": _of(statistics.median, [one.first_step_over_second for one in switches]),
        "switches": len(switches),
        "uses": "all timed switches, first visits included",
    }


def _of(function: Callable[[list[float]], float], values: Iterable[float]) -> float | None:
    listed = list(values)
    return function(listed) if listed else None


def _speedups(switches: Sequence[Switched], other_s: Callable[[Switched], float | None]) -> list[float]:
    return [other / one.wall_s for one in switches if (other := other_s(one)) is not None]


def _ram_of(switches: Sequence[Switched]) -> Callable[[Switched], float | None]:
    def seconds(one: Switched) -> float | None:
        if one.ram_s is not None:
            return one.ram_s
        alike = [s for s in switches if (s.model, s.kind, s.old, s.new) == (one.model, one.kind, one.old, one.new)]
        return _of(statistics.median, [s.ram_s for s in alike if s.ram_s is not None])

    return seconds


def _restart_of(restarts: Sequence[Restarted]) -> Callable[[Switched], float | None]:
    def seconds(one: Switched) -> float | None:
        alike = [r for r in restarts if _sizes(r) == _sizes(one)]
        own = [r for r in alike if r.kind == one.kind]
        return _of(min, [r.total_s for r in own or alike or restarts])

    return seconds


def _sizes(one: Switched | Restarted) -> tuple[str, str]:
    """From and to what layout, whatever the optimizer."""
    return one.old.removesuffix(",zero1"), one.new.removesuffix(",zero1")
