"""What a run knows before its first step and beside its checkpoints, so that it decides on as if it never stopped."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from copus_ext.adapters.arguments import model_shape, run_options
from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.cost.hardware import Hardware
from copus_ext.core.cost.memory_model import MemoryModel
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.cost.visits import Visits
from copus_ext.core.files import write_whole
from copus_ext.core.noise.noise_tracker import NoiseTracker
from copus_ext.core.plan import Plan
from copus_ext.core.planner.knowledge import Knowledge, plans_avoided
from copus_ext.core.planner.switch_cost import first_switch_cost
from copus_ext.run.config import CopusConfig

_FILE = "copus_state.json"


def first_knowledge(
    raw: argparse.Namespace,
    args: argparse.Namespace,
    config: CopusConfig,
    plan: Plan,
    candidates: Candidates,
    hardware: Hardware,
) -> Knowledge:
    """What is known before the first step of a run from scratch: closed forms, priors, and what may be chosen.

    Args:
        raw: upstream's arguments before validation.
        args: validated ones, of any plan.
        config: the checked ``--copus-*`` flags.
        plan: the first one.
        candidates: what may be chosen.
        hardware: what step times and memory are predicted for.
    """
    model, options = model_shape(args), run_options(raw)
    return Knowledge(
        plan=plan,
        candidates=candidates,
        noise=NoiseTracker.start(config.noise_estimator, config.noise_half_life_tokens),
        throughput=ThroughputModel(model, hardware, options=options),
        memory=MemoryModel(model, hardware.memory_bytes, options),
        switch_cost=first_switch_cost(model, hardware, args.world_size),
        avoided=plans_avoided(candidates, config.base, config.noise_estimator),
        can_probe=raw.eval_iters > 0,
    )


def carried_on(first: Knowledge, saved: Knowledge, hardware_is_named: bool) -> Knowledge:
    """What a resumed run knows: what stood beside its checkpoint, under the flags that it has now.

    ``hardware_is_named``: predictions are for the hardware that this run was told, not for what the saved one was on.
    """
    hardware = (first if hardware_is_named else saved).throughput.hardware
    return replace(
        saved,
        candidates=first.candidates,
        noise=first.noise.carried_on(saved.noise),
        throughput=replace(first.throughput, hardware=hardware, seen=saved.throughput.seen.after_a_break()),
        memory=replace(first.memory, peaks=saved.memory.peaks, exhausted=saved.memory.exhausted),
        avoided=first.avoided,
        steps_since_switch=0,  # the first steps behind a start are as slow as those behind a switch
        can_probe=first.can_probe and saved.can_probe,
    )


def save_knowledge(known: Knowledge, checkpoints: str, iteration: int) -> None:
    """Write it beside the checkpoint of ``iteration``, whole or not at all."""
    write_whole(Path(checkpoints) / f"iter_{iteration:07d}" / _FILE, json.dumps(known.to_json()))


def load_knowledge(checkpoints: str | None, iteration: int | None = None) -> Knowledge | None:
    """What stands beside a checkpoint, the latest of the folder where no iteration is given; without candidates.

    ``None`` where there is no checkpoint, or nothing beside it.
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
    values = json.loads(path.read_text())
    values["throughput"].setdefault("seen", Visits().to_json())  # of earlier versions; steps are soon measured anew
    return Knowledge.from_json(values, Candidates(()))
