"""What a run has learned, kept beside its checkpoints so that a resumed run decides as one that never stopped."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from copus_ext.core.files import write_whole
from copus_ext.core.memory_model import MemoryModel
from copus_ext.core.noise_tracker import NoiseTracker
from copus_ext.core.plan import Plan, plan_from_json
from copus_ext.core.plan_table import PlanTable
from copus_ext.core.switch_cost import SwitchCost
from copus_ext.core.throughput import ThroughputModel

_FILE = "copus_state.json"


@dataclass
class Knowledge:
    """The estimators as they stand, and the plans there are to choose from.

    ``rate_noise_scale``: the noise scale, in sequences, that learning rates are by; the same on every rank, and ``inf``
    until one is known.
    """

    noise: NoiseTracker
    throughput: ThroughputModel
    memory: MemoryModel
    switch_cost: SwitchCost
    candidates: tuple[Plan, ...]
    rejected: dict[Plan, str] = field(default_factory=dict)
    rate_noise_scale: float = math.inf

    def learn_memory(self, plan: Plan, peak: float) -> float:
        """Take in what ``plan`` was seen to take of the fullest rank's device; the bytes that were expected."""
        expected = float(self.memory.predict(PlanTable.of([plan]))[0])
        self.memory = self.memory.observe(plan, peak)
        return expected

    def objections(self) -> dict[Plan, str]:
        """Which candidates can't be chosen now, and why: refused for good, or by what memory is thought to do."""
        return self.memory.objections(self.candidates) | self.rejected

    def save(self, checkpoints: str, iteration: int, plan: Plan) -> None:
        """Write it beside the checkpoint of ``iteration``, whole or not at all."""
        state = {
            "plan": plan.to_json(),
            "noise": self.noise.to_json(),
            "throughput": self.throughput.to_json(),
            "memory": self.memory.to_json(),
            "switch_cost": self.switch_cost.to_json(),
            "rate_noise_scale": self.rate_noise_scale if math.isfinite(self.rate_noise_scale) else None,
        }
        write_whole(Path(checkpoints) / f"iter_{iteration:07d}" / _FILE, json.dumps(state))

    def restore(self, state: SavedState, hardware_is_named: bool = False) -> None:
        """Go on from what a checkpoint knew; ``hardware_is_named``: but with the hardware that this run was told."""
        self.noise = self.noise.carried_on(state.noise)
        self.memory = self.memory.restored(state.memory)
        hardware = self.throughput.hardware if hardware_is_named else state.throughput.hardware
        self.throughput = replace(self.throughput, hardware=hardware, histories=state.throughput.histories)
        self.switch_cost = state.switch_cost
        self.rate_noise_scale = state.rate_noise_scale


@dataclass(frozen=True)
class SavedState:
    """What stands beside a checkpoint."""

    plan: Plan
    noise: NoiseTracker
    throughput: ThroughputModel
    memory: dict[str, Any]
    switch_cost: SwitchCost
    rate_noise_scale: float


def load_state(checkpoints: str | None, iteration: int | None = None) -> SavedState | None:
    """The state beside a checkpoint, the latest of the folder where no iteration is given.

    ``None`` where there is no checkpoint, or it has no state.
    """
    tracker = Path(checkpoints or "") / "latest_checkpointed_iteration.txt"
    if not checkpoints or not tracker.exists():
        return None
    latest = tracker.read_text().strip()
    if iteration is None and not latest.isdecimal():
        return None
    iteration = int(latest) if iteration is None else iteration
    path = Path(checkpoints) / f"iter_{iteration:07d}" / _FILE
    if not path.exists():
        return None
    state = json.loads(path.read_text())
    rate_noise_scale = state.get("rate_noise_scale")  # older states have none
    return SavedState(
        plan=plan_from_json(state["plan"]),
        noise=NoiseTracker.from_json(state["noise"]),
        throughput=ThroughputModel.from_json(state["throughput"]),
        memory=state["memory"],
        switch_cost=SwitchCost.from_json(state["switch_cost"]),
        rate_noise_scale=math.inf if rate_noise_scale is None else rate_noise_scale,
    )
