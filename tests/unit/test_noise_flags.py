"""Flags of the noise scale that a machine without an accelerator never gets to, and what a plain run saves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.cost.hardware import shared_cpu
from copus_ext.core.cost.memory_model import MemoryModel
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.errors import UserError
from copus_ext.core.files import write_whole
from copus_ext.core.noise.noise_scale import StepEstimate
from copus_ext.core.noise.noise_tracker import MeasuredStep, NoiseTracker
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.knowledge import Knowledge
from copus_ext.core.planner.switch_cost import first_switch_cost
from copus_ext.run.config import check_estimator

FLAGS: dict[str, Any] = {
    "copus_gns_estimator": "auto",
    "transformer_impl": "transformer_engine",
    "optimizer": "adam",
    "use_precision_aware_optimizer": False,
    "optimizer_cpu_offload": False,
}


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        ({"copus_gns_estimator": "layernorm"}, "layernorm needs norms that stand by themselves"),
        ({"copus_gns_estimator": "adam", "optimizer": "lion"}, "adam needs --optimizer adam, not lion"),
        ({"copus_gns_estimator": "adam", "use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer"),
        ({"copus_gns_estimator": "adam", "optimizer_cpu_offload": True}, "--optimizer-cpu-offload"),
    ],
)
def test_an_estimator_that_cannot_read_this_job_is_refused(flags: dict[str, Any], refusal: str) -> None:
    with pytest.raises(UserError, match="--copus-gns-estimator") as error:
        check_estimator(argparse.Namespace(**FLAGS | flags))
    assert refusal in str(error.value)


@pytest.mark.parametrize("flags", [{}, {"copus_gns_estimator": "adam"}, {"use_precision_aware_optimizer": True}])
def test_one_that_can_is_not(flags: dict[str, Any]) -> None:
    check_estimator(argparse.Namespace(**FLAGS | flags))


def test_a_plain_run_goes_on_with_the_noise_scale_that_its_checkpoint_knows(tmp_path: Path) -> None:
    from copus_ext.run.noise_logger import STATE_FILE, _carried_on

    fresh = NoiseTracker.start("sketch", 1e6)
    saved = fresh.update(MeasuredStep(7, StepEstimate(2.0, 30.0), None, 256, 8, 1e-4))
    write_whole(tmp_path / "iter_0000007" / STATE_FILE, json.dumps(saved.to_json()))
    assert _carried_on(fresh, str(tmp_path), 7) == saved
    assert _carried_on(fresh, str(tmp_path), 8) is fresh, "nothing stands there"
    other = NoiseTracker.start("adam", 1e6)
    assert _carried_on(other, str(tmp_path), 7) is other, "another quantity"


def test_a_plain_run_goes_on_with_what_a_copus_run_knew(tmp_path: Path) -> None:
    from copus_ext.run.knowledge import save_knowledge
    from copus_ext.run.noise_logger import _carried_on

    model = ModelShape(layers=2, hidden=64, heads=8, kv_heads=8, ffn=256, vocab=128, seq=32)
    hardware = shared_cpu(2, 2, 1e9)
    saved = NoiseTracker.start("auto", 1e6).update(MeasuredStep(7, StepEstimate(2.0, 30.0), None, 256, 8, 1e-4))
    throughput, memory = ThroughputModel(model, hardware), MemoryModel(model, hardware.memory_bytes)
    cost, plan = first_switch_cost(model, hardware, 2), Plan(Layout(dp=2), 1, 8)
    save_knowledge(Knowledge(plan, Candidates(()), saved, throughput, memory, cost), str(tmp_path), 7)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert _carried_on(NoiseTracker.start("sketch", 1e6), str(tmp_path), 7) == saved
