"""What a switch costs in seconds: expected before the first one, measured afterwards, for each pair of layouts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.cost.hardware import Hardware
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.plan import Layout, Plan

_STATE_BYTES = 12  # per parameter: the fp32 parameter and Adam's two moments
_REBUILD_S = 1.0  # model, optimizer and groups of the next layout; the order of what was measured on one machine
_BATCH_CHANGE_S = 0.01  # only the micro-batch calculator and the data iterator


@dataclass(frozen=True)
class RunningMean:
    """Mean of ``count`` measurements; before the first one it is what was expected."""

    mean: float
    count: int = 0

    def add(self, value: float) -> RunningMean:
        """The mean with one more measurement; the first replaces the expectation."""
        count = self.count + 1
        return RunningMean(value if count == 1 else self.mean + (value - self.mean) / count, count)


@dataclass(frozen=True)
class SwitchCost:
    """Seconds a switch takes: those of that very change of layout where it was made before, else those of others.

    Going back to a layout builds nothing, so of each pair of layouts the latest switch counts half, those before it
    together the other half. Changes of batch sizes alone are kept apart.
    """

    layout_change: RunningMean
    batch_change: RunningMean = field(default_factory=lambda: RunningMean(_BATCH_CHANGE_S))
    pairs: tuple[tuple[Layout, Layout, float], ...] = ()

    def expected_s(self, current: Plan, target: Plan) -> float:
        """Seconds from one plan to another; 0 for the same one."""
        return float(self.expected_many(current, Candidates((target,)))[0])

    def expected_many(self, current: Plan, targets: Candidates) -> NDArray[np.float64]:
        """[n] seconds from one plan to each of others; 0 for the same one."""
        to_layout = {new: seconds for old, new, seconds in self.pairs if old == current.layout}
        to_layout[current.layout] = self.batch_change.mean
        layouts, layout_of = targets.layouts
        seconds = np.array([to_layout.get(layout, self.layout_change.mean) for layout in layouts])[layout_of]
        if (row := targets.row_of.get(current)) is not None:
            seconds[row] = 0.0
        return seconds

    def observe(self, current: Plan, target: Plan, seconds: float) -> SwitchCost:
        """The costs after the switch from ``current`` to ``target`` took ``seconds``."""
        if current.layout == target.layout:
            return replace(self, batch_change=self.batch_change.add(seconds))
        known = {(old, new): before for old, new, before in self.pairs}
        pair = (current.layout, target.layout)
        known[pair] = (known[pair] + seconds) / 2 if pair in known else seconds
        pairs = tuple((old, new, value) for (old, new), value in known.items())
        return replace(self, layout_change=self.layout_change.add(seconds), pairs=pairs)

    def to_json(self) -> dict[str, Any]:
        """Plain values; through ``json`` and :meth:`from_json` they come back to the last bit."""
        pairs = [[asdict(old), asdict(new), seconds] for old, new, seconds in self.pairs]
        return {"layout_change": asdict(self.layout_change), "batch_change": asdict(self.batch_change), "pairs": pairs}

    @staticmethod
    def from_json(values: dict[str, Any]) -> SwitchCost:
        """Inverse of :meth:`to_json`; what was saved before pairs were told apart has none."""
        pairs = [(Layout(**old), Layout(**new), seconds) for old, new, seconds in values.get("pairs", ())]
        layout, batch = RunningMean(**values["layout_change"]), RunningMean(**values["batch_change"])
        return SwitchCost(layout, batch, tuple(pairs))


def first_switch_cost(model: ModelShape, hardware: Hardware, world_size: int) -> SwitchCost:
    """What is expected before the first switch: every rank receives its share of all state over its slowest link."""
    one_node = world_size <= hardware.devices_per_node
    bandwidth = hardware.intra_node_bandwidth if one_node else hardware.inter_node_bandwidth
    moved = _STATE_BYTES * model.params / world_size / bandwidth
    return SwitchCost(RunningMean(_REBUILD_S + moved))
