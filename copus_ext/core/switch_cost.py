"""What a switch costs in seconds: expected before the first one, measured afterwards."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from copus_ext.core.hardware import Hardware
from copus_ext.core.model_shape import ModelShape
from copus_ext.core.plan import Plan

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
    """Seconds a switch takes, apart for switches that change the layout and those that change batch sizes only."""

    layout_change: RunningMean
    batch_change: RunningMean = field(default_factory=lambda: RunningMean(_BATCH_CHANGE_S))

    def expected_s(self, current: Plan, target: Plan) -> float:
        """Seconds from one plan to another; 0 for the same one."""
        if current == target:
            return 0.0
        return (self.batch_change if current.layout == target.layout else self.layout_change).mean

    def observe(self, current: Plan, target: Plan, seconds: float) -> SwitchCost:
        """The costs after the switch from ``current`` to ``target`` took ``seconds``."""
        if current.layout == target.layout:
            return replace(self, batch_change=self.batch_change.add(seconds))
        return replace(self, layout_change=self.layout_change.add(seconds))

    def to_json(self) -> dict[str, Any]:
        """Plain values; through ``json`` and :meth:`from_json` they come back to the last bit."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> SwitchCost:
        """Inverse of :meth:`to_json`."""
        return SwitchCost(RunningMean(**values["layout_change"]), RunningMean(**values["batch_change"]))


def first_switch_cost(model: ModelShape, hardware: Hardware, world_size: int) -> SwitchCost:
    """What is expected before the first switch: every rank receives its share of all state over its slowest link."""
    one_node = world_size <= hardware.devices_per_node
    bandwidth = hardware.intra_node_bandwidth if one_node else hardware.inter_node_bandwidth
    moved = _STATE_BYTES * model.params / world_size / bandwidth
    return SwitchCost(RunningMean(_REBUILD_S + moved))
