"""The whole measurement on two ranks: branches are exact continuations, live and from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.end_to_end.launch import MOCK, MODEL, TRAINING, Outcome, events_of, run_main
from tests.ranks.harness import run_ranks

RUN = MODEL + TRAINING + MOCK + "--micro-batch-size 2 --global-batch-size 8 --train-samples 96 --copus-policy static "
SHARED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
MEASURE = (
    "--eval-iters 8 --eval-global-batch-size 4 "
    "--branch-at 16,32 --branch-multiples 1/2,1,2 --branch-samples 32 --branch-evals 2 "
)


def measure(words: list[str]) -> Outcome:
    """The tool's ``main()`` on this rank."""
    import measure_critical_batch
    from copus_ext.run import start

    # What launch.run_main starts is the other program's main(), in the same surroundings.
    with mock.patch.object(start, "main", measure_critical_batch.main):
        return run_main(words)


def words(flags: str, directory: Path) -> list[str]:
    return [*flags.split(), f"--copus-dir={directory}"]


def steps(log: Path) -> dict[int, tuple[float, float]]:
    """Loss and learning rate by samples consumed."""
    return {s["consumed_samples"]: (s["loss"], s["learning_rate"]) for s in events_of(log, "step")}


def finished(outcomes: list[Outcome]) -> None:
    assert [o.status for o in outcomes] == [0] * len(outcomes), outcomes[0].err


def results(directory: Path) -> Any:
    return json.loads((directory / "critical_batch.json").read_text())


def test_branches_go_on_as_the_run_would_have(tmp_path: Path) -> None:
    """The second snapshot lies within the first's branches: the run went back there, and trained it again.

    Once from a checkpoint, against the run that was not branched; once live, with state and hooks that are shared out.
    """
    run, loaded, live, saved = (tmp_path / name for name in ("run", "loaded", "live", "checkpoints"))
    finished(run_ranks(2, run_main, words(RUN + f"--save {saved} --save-interval 2 --ckpt-format torch_dist", run)))
    load = f"--load {saved} --ckpt-step 2 --ckpt-format torch_dist "
    outcomes = run_ranks(2, measure, words(RUN + MEASURE + load, loaded))
    finished(outcomes)
    undisturbed = steps(run)
    for start in (16, 32):
        own = steps(loaded / "branches" / f"{start}-gbs8")
        assert own == {samples: undisturbed[samples] for samples in range(start + 8, start + 33, 8)}, "bit for bit"
        larger = steps(loaded / "branches" / f"{start}-gbs16")
        assert sorted(larger) == [start + 16, start + 32]
        # The rate of a step is told after it, for the next one.
        assert larger[start + 16][1] == pytest.approx(2**0.5 * undisturbed[start + 16][1]), "at the same place"
    assert steps(loaded / "run") == {samples: undisturbed[samples] for samples in (24, 32)}
    assert "Branches at 32 samples" in outcomes[1].out
    assert (loaded / "critical_batch.svg").exists()

    first, second = results(loaded)["points"]
    assert (first["samples"], second["samples"]) == (16, 32)
    assert [branch["batch"] for branch in first["branches"]] == [4, 8, 16]
    assert all(len(losses) == 8 for branch in first["branches"] for losses in branch["block_losses"])
    assert len({tuple(branch["block_losses"][0]) for branch in first["branches"]}) == 1, "one snapshot"
    assert second["branches"][0]["loss"][0] == first["branches"][1]["loss"][1], "the same sequences every time"

    finished(run_ranks(2, measure, words(RUN + MEASURE + SHARED, live)))
    for mine, theirs in zip(results(live)["points"], (first, second), strict=True):
        for branch, other in zip(mine["branches"], theirs["branches"], strict=True):
            assert branch["loss"] == pytest.approx(other["loss"], rel=1e-5)

    refused = run_ranks(2, measure, words(RUN + MEASURE + load + "--branch-at 20", loaded))
    assert [outcome.status for outcome in refused] == [2, 2]
    assert refused[0].err.startswith("measure_critical_batch.py: --branch-at 20")
    assert [outcome.err.count("\n") for outcome in refused] == [1, 0]
