"""Whole runs of the entry point on four ranks: what a user would start, and what comes out."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from unittest import mock

import pytest

from copus_ext.core.events import read_events
from copus_ext.core.planner.replay import replay
from tests.end_to_end.launch import (
    BATCHES,
    HARDWARE,
    MOCK,
    MODEL,
    TRAINING,
    Outcome,
    events_of,
    launch,
    losses_of,
    run_main,
)
from tests.ranks.harness import run_ranks

RUN = MODEL + TRAINING + MOCK + BATCHES
CONTRACT = {
    "run_start": {"world_size", "plan", "policy", "train_samples"},
    "step": {"loss", "plan", "step_time_s", "tokens"},
    "noise_scale": {"value", "low", "high", "N", "S", "n_eff"},
    "decision": {"chosen", "current", "reason", "candidates"},
    "switch": {"from", "to", "seconds", "bytes_moved", "exact"},
    "switch_check": {"plan"},
    "prepare": {"plan", "seconds"},
    "eval": {"loss"},
    "run_end": {"status"},
}


def finished(outcomes: list[Outcome]) -> None:
    """Every rank ended well."""
    assert [o.status for o in outcomes] == [0] * len(outcomes), outcomes[0].err


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stays in its layout."""
    directory = tmp_path_factory.mktemp("still")
    finished(launch(RUN, f"--copus-dir={directory}", "--copus-policy=static"))
    return directory


def test_switching_layouts_changes_no_loss(tmp_path: Path, still: Path) -> None:
    """Five layouts in one run, against one layout, and against upstream's own pretrain() with COPUS off."""
    schedule = "0:dp4 32:tp2,pp2 64:pp4 96:cp2,tp2 128:dp2,pp2,vpp2"
    switching = tmp_path / "switching"
    finished(launch(RUN, f"--copus-dir={switching}", "--copus-policy=schedule", "--copus-schedule", schedule))
    assert losses_of(switching) == pytest.approx(losses_of(still), rel=1e-5)
    switches = events_of(switching, "switch")
    layouts = [s["to"].removesuffix(",mbs1,gbs8") for s in switches]
    assert layouts == ["dp1,tp2,pp2", "dp1,pp4", "dp1,tp2,cp2", "dp2,pp2,vpp2"]
    assert all(s["exact"] and s["bytes_moved"] == s["bytes_minimum"] for s in switches)

    plain = launch(RUN + "--no-copus")
    finished(plain)
    logged = [float(loss) for loss in re.findall(r"lm loss: ([0-9.E+-]+)", plain[-1].out)]
    # The first step's sum is not reset by upstream, so its second line averages two steps.
    assert [logged[0], *logged[2:]] == pytest.approx([losses_of(still)[0], *losses_of(still)[2:]], rel=1e-5)


def test_changing_batches_and_layouts_equals_changing_batches_alone(tmp_path: Path) -> None:
    batches = "0:dp4,gbs8 80:dp4,gbs16,mbs2 144:dp4,gbs8"
    both = "0:dp4,gbs8 80:tp2,pp2,gbs16,mbs4 144:pp4,gbs8"
    for name, schedule in (("batches", batches), ("both", both)):
        directory = f"--copus-dir={tmp_path / name}"
        finished(launch(RUN, directory, "--copus-policy=schedule", "--copus-schedule", schedule))
    assert losses_of(tmp_path / "both") == pytest.approx(losses_of(tmp_path / "batches"), rel=1e-5)
    steps = events_of(tmp_path / "both", "step")
    assert [s["consumed_samples"] for s in steps] == [*range(8, 81, 8), *range(96, 145, 16), 152, 160]
    rates = [s["learning_rate"] for s in steps]
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * s["consumed_samples"] / 160)) / 2 for s in steps]
    factors = [2**0.5 if s["plan"].endswith("gbs16") else 1.0 for s in steps]
    assert rates == pytest.approx([c * f for c, f in zip(cosine, factors, strict=True)]), "sqrt rule on a cosine"


def test_overlap_and_evaluation_on_the_way_change_no_loss(tmp_path: Path) -> None:
    """Batch-only switches keep the job, whose hooks train() takes away; evaluations go on as batches shrink."""
    plans = "0:dp4,gbs16 32:dp4,gbs8 64:dp2,pp2,vpp2,mbs2,gbs8 96:dp4,gbs4 128:dp4,gbs16"
    schedule = ("--copus-policy=schedule", "--copus-schedule", plans)
    plain, overlapped = tmp_path / "plain", tmp_path / "overlapped"
    finished(launch(RUN + "--eval-interval 2", f"--copus-dir={plain}", *schedule))
    flags = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --eval-interval 2"
    finished(launch(RUN + flags, f"--copus-dir={overlapped}", *schedule))
    assert losses_of(overlapped) == pytest.approx(losses_of(plain), rel=1e-5)
    validations = [[e["loss"] for e in events_of(run, "eval")] for run in (overlapped, plain)]
    assert validations[0] == pytest.approx(validations[1], rel=1e-5)
    assert len(validations[0]) == len(losses_of(plain)) // 2 + 1


def test_copus_moves_a_run_and_tells_why(tmp_path: Path) -> None:
    """One sequence at a time is slow wherever it runs, so larger micro-batches win. In the format of docs/events.md."""
    flags = "--copus-interval 5 --copus-dwell-steps 5 --train-samples 1280 --global-batch-size 32"
    run = RUN.replace(HARDWARE, "") + flags
    finished(launch(run, f"--copus-dir={tmp_path}", "--copus-space", "tp=1 pp=1,2 mbs=1,8 gbs=16..64"))
    events = read_events(tmp_path / "events.jsonl")
    for event in events:
        assert {"time_s", "iteration", "consumed_samples"} | CONTRACT[event["event"]] <= set(event)
    assert events[-1]["status"] == "finished"
    assert events[-1]["consumed_samples"] <= 1280 < events[-1]["consumed_samples"] + 64
    decisions = [e for e in events if e["event"] == "decision"]
    assert decisions
    scored = [c for d in decisions for c in d["candidates"] if c["feasible"]]
    assert all({"plan", "throughput", "efficiency", "goodput", "feasible"} <= set(c) for c in scored)
    moved = [d for d in decisions if d["chosen"] != d["current"]]
    switches = [e for e in events if e["event"] == "switch"]
    assert any("mbs8" in s["to"] for s in switches)
    assert [(d["current"], d["chosen"]) for d in moved] == [(s["from"], s["to"]) for s in switches]
    assert (tmp_path / "report.html").exists()
    assert [each.differences for each in replay(events)] == [()] * len(decisions)


# Rates that a factor of sqrt(2) and back does not give back to the last bit.
RESUMED = ("--lr=1e-4", "--min-lr=1e-5", "--copus-policy=schedule", "--copus-schedule")
PLANS = "0:dp4 24:dp4,gbs16 56:tp2,pp2,gbs16,mbs2 120:pp4,gbs8"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not stopped."""
    directory = tmp_path_factory.mktemp("whole")
    finished(launch(RUN, f"--copus-dir={directory}", *RESUMED, PLANS))
    return directory


@pytest.mark.parametrize("stop_at", [5, 7], ids=["on a scheduled change", "between two"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, whole: Path, stop_at: int) -> None:
    parts, saved, schedule = tmp_path / "parts", tmp_path / "checkpoints", (*RESUMED, PLANS)
    keep = f"--save {saved} --load {saved} --save-interval 1000 --ckpt-format torch_dist "
    run = RUN if stop_at == 5 else RUN.replace(HARDWARE, "")  # measured when it starts, and not again
    finished(launch(run + keep + f"--exit-interval {stop_at}", f"--copus-dir={parts}", *schedule))
    assert len(losses_of(parts)) == stop_at
    fewer = launch(run + keep, f"--copus-dir={parts}", *schedule, ranks=2)
    assert [o.status for o in fewer] == [2, 2]
    finished(launch(run + keep, f"--copus-dir={parts}", *schedule))
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-5)
    steps = [events_of(run, "step") for run in (parts, whole)]
    assert [s["plan"] for s in steps[0]] == [s["plan"] for s in steps[1]]
    assert events_of(parts, "run_start")[-1]["resumed_from"] == stop_at
    state = json.loads((saved / f"iter_{stop_at:07d}" / "copus_state.json").read_text())
    assert state["noise"]["smoothed"]["steps"] == stop_at
    again = list(replay(read_events(parts / "events.jsonl")))
    assert again
    assert [each.differences for each in again] == [()] * len(again), "decisions of both attempts"
    last = len(steps[0])
    assert (saved / f"iter_{last:07d}" / "copus_state.json").exists()
    assert events_of(parts, "eval")[-1]["iteration"] == last


def test_a_switch_that_one_rank_cannot_prepare_is_given_up_by_all(tmp_path: Path, still: Path) -> None:
    schedule = ("--copus-policy=schedule", "--copus-schedule", "0:dp4 80:pp4")
    faulty = tmp_path / "faulty"
    finished(run_ranks(4, run_with_failing_build, [*RUN.split(), f"--copus-dir={faulty}", *schedule]))
    assert losses_of(faulty) == pytest.approx(losses_of(still), rel=1e-6)
    faults = events_of(faulty, "fault")
    assert len(faults) == 1
    assert "rank 2: no room for this model" in faults[0]["message"]
    assert {step["plan"] for step in events_of(faulty, "step")} == {"dp4,mbs1,gbs8"}


def test_a_schedule_that_slipped_is_followed_as_soon_as_steps_allow(tmp_path: Path) -> None:
    """The step of 8 that should have led from 96 to 104 is given up, and steps of 16 never end at 104."""
    schedule = ("--copus-policy=schedule", "--copus-schedule", "0:dp4,gbs16 96:pp4,gbs8 104:dp4,mbs2,gbs8")
    finished(run_ranks(4, run_with_failing_build, [*RUN.split(), f"--copus-dir={tmp_path}", *schedule]))
    plans = [(s["plan"], s["consumed_samples"]) for s in events_of(tmp_path, "step")]
    assert plans[6:] == [("dp4,mbs1,gbs16", 112), *(("dp4,mbs2,gbs8", samples) for samples in range(120, 161, 8))]


def run_with_failing_build(words: list[str]) -> Outcome:
    """Rank 2 runs out of memory whenever it builds a pipelined job."""
    import os

    from copus_ext.run import switch

    build = switch.build_job

    def build_or_fail(plan, *args, **kwargs):  # type: ignore[no-untyped-def]
        if os.environ["RANK"] == "2" and plan.layout.pp > 1:
            raise RuntimeError("no room for this model")
        return build(plan, *args, **kwargs)

    with mock.patch.object(switch, "build_job", build_or_fail):
        return run_main(words)
