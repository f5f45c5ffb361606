"""A profile on two ranks, started again, and a run that begins with what it measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from copus_ext.core.cost.throughput_table import read_table
from copus_ext.core.cost.visits import Visits
from copus_ext.core.errors import UserError
from copus_ext.core.plan import Layout, Plan
from tests.end_to_end.launch import MOCK, MODEL, TRAINING, Outcome, events_of, launch, run_main
from tests.ranks.harness import run_ranks

RUN = MODEL + TRAINING + MOCK + "--micro-batch-size 1 --global-batch-size 8 --train-samples 48 "
PLANS = "dp2; dp1,pp2,vpp4; dp2,mbs2; pp2,gbs8; pp2,gbs16"
STEPS = ("--profile-steps=2", "--profile-warmup=0", "--profile-laps=2")


def profile(words: list[str]) -> Outcome:
    """The tool's ``main()`` on this rank."""
    import profile_throughput
    from copus_ext.run import start

    # What launch.run_main starts is the other program's main(), in the same surroundings.
    with mock.patch.object(start, "main", profile_throughput.main):
        return run_main(words)


def finished(outcomes: list[Outcome]) -> None:
    assert [o.status for o in outcomes] == [0] * len(outcomes), outcomes[0].err


def measured(directory: Path) -> dict[str, Any]:
    """The summary of a profile."""
    outcomes = run_ranks(2, profile, [*RUN.split(), f"--copus-dir={directory}", f"--profile-plans={PLANS}", *STEPS])
    finished(outcomes)
    summary: dict[str, Any] = json.loads(outcomes[1].out.splitlines()[-1])
    return summary


def test_plans_are_measured_once_and_known_to_a_run_that_starts(tmp_path: Path) -> None:
    """160 sequences are taken of 48: samples begin anew."""
    summary = measured(tmp_path)
    path = tmp_path / "profile.csv"
    assert (summary["visits"], summary["measured_plans"], summary["failed_plans"]) == (9, 4, 1)
    table = read_table(path, "--profile-out")
    own, wide, pipe, most = "dp2,mbs1,gbs8", "dp2,mbs2,gbs8", "dp1,pp2,mbs1,gbs8", "dp1,pp2,mbs1,gbs16"
    lap = [own, wide, "dp1,pp2,vpp4,mbs1,gbs8", pipe, most]
    assert [str(row.plan) for row in table.rows] == [*lap, own, wide, pipe, most], "each layout in one go, twice"
    assert [row.failure != "" for row in table.rows] == [False, False, True] + 6 * [False]
    assert "4 layers are not divisible" in table.rows[2].failure
    assert {len(row.step_times_s) for row in table.rows if not row.failure} == {2}
    switches = events_of(tmp_path / "profile", "switch")
    assert [event["to"] for event in switches] == [wide, pipe, most, own, wide, pipe, most]
    steps = events_of(tmp_path / "profile", "step")
    assert len(steps) == 16
    assert {step["learning_rate"] for step in steps} == {0.0}
    assert not list(tmp_path.rglob("iter_*")), "no checkpoint"

    before = path.read_bytes()
    assert measured(tmp_path)["visits"] == 0
    assert path.read_bytes() == before, "nothing was left to do"

    run, saved = tmp_path / "run", tmp_path / "saved"
    keep = f"--save {saved} --save-interval 1 --ckpt-format torch_dist --train-samples 16 --copus-interval 1 "
    finished(launch(RUN + keep + f"--copus-throughput-table {path} --copus-dir {run}", "--copus-space=gbs=8", ranks=2))
    state = json.loads((saved / "iter_0000001" / "copus_state.json").read_text())
    known = Visits.from_json(state["throughput"]["seen"])
    assert known.steps == {plan: len(times) for plan, times in table.step_times().items()}
    assert known.next_s is not None, "a run whose own first steps are not counted: all of it was before"
    assert events_of(run, "decision")

    other = launch(RUN + f"--seq-length 16 --copus-throughput-table {path} --copus-dir {run}", ranks=2)
    assert [outcome.status for outcome in other] == [2, 2]
    assert f"--copus-throughput-table {path}: was measured with seq 32, not 16" in other[0].err
    assert [outcome.err.count("\n") for outcome in other] == [1, 0]


def without_memory(words: list[str]) -> Outcome:
    """The tool's ``main()``, with rank 0 out of memory in the first step of a larger micro-batch."""
    import torch

    from copus_ext.run.profile import ProfiledRun

    segment = ProfiledRun.segment

    def limited(run: Any, *args: Any, **kwargs: Any) -> Any:
        if run.job.plan.micro_batch > 1 and run.job.args.rank == 0:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 2 GiB")
        return segment(run, *args, **kwargs)

    with mock.patch.object(ProfiledRun, "segment", limited):
        return profile(words)


def test_a_step_that_finds_no_memory_ends_the_job_and_is_not_tried_again(tmp_path: Path) -> None:
    words = [*RUN.split(), f"--copus-dir={tmp_path}", "--profile-plans=dp2,mbs1; dp2,mbs2", *STEPS]
    with pytest.raises(AssertionError, match="tried to allocate"):
        run_ranks(2, without_memory, words)
    table = read_table(tmp_path / "profile.csv", "--profile-out")
    assert [row.failure for row in table.rows] == ["", "in a step: out of memory: tried to allocate 2 GiB"]


BAD_FLAGS = {
    "--profile-steps 0": "--profile-steps 0 is too small; give at least 1",
    "--profile-warmup -1": "--profile-warmup -1 is too small; give at least 0",
    "--profile-plans dp3": "--profile-plans: plan 'dp3' takes 3 ranks, and there are 2",
    "--profile-plans ;": "--profile-plans names no plan; write them like dp4,mbs1,gbs8; tp2,pp2,mbs2,gbs8",
}


def refusals(directory: str) -> dict[str, str]:
    """What is said to each of the bad flags."""
    from copus_ext.run.profile import add_profile_arguments, settings_from

    raw = argparse.Namespace(no_copus=False, copus_policy="copus", copus_dir=directory)
    said = {}
    for words in BAD_FLAGS:
        flags = add_profile_arguments(argparse.ArgumentParser()).parse_args(words.split())
        with pytest.raises(UserError) as refusal:
            settings_from(flags, raw, Plan(Layout(dp=2), 1, 8))
        said[words] = str(refusal.value)
    return said


def test_bad_flags_are_told_before_anything_is_built(tmp_path: Path) -> None:
    assert run_ranks(1, refusals, str(tmp_path)) == [BAD_FLAGS]
    words = [*RUN.split(), f"--copus-dir={tmp_path}", "--copus-policy=static"]
    refused = run_ranks(2, profile, words)
    assert [outcome.status for outcome in refused] == [2, 2]
    assert refused[0].err.startswith("profile_throughput.py: --copus-policy static: ")
