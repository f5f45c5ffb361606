"""The noise scale of plain Megatron: ``--no-copus --log-gradient-noise-scale`` measures and changes nothing."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from copus_ext.core.events import read_events
from copus_ext.core.report.page import report_run
from tests.end_to_end.launch import MOCK, MODEL, TRAINING, Outcome, events_of, launch, losses_of, run_main
from tests.ranks.harness import run_ranks

# Batches grow from 4 to 8 after 512 tokens, or 16 sequences; evaluation and a checkpoint fall between reductions.
RUN = (
    MODEL + TRAINING + MOCK + "--no-copus --micro-batch-size 1 --train-samples 96 --clip-grad 0.5 "
    "--eval-interval 6 --save-interval 9 --ckpt-format torch "
)
BATCHES = ("--step-batch-size-schedule", "0:4 512:8")
STEPS = 14  # 4 of 4 sequences, 10 of 8
CURVES = {
    "noise-scale": "value",
    "noise-scale-low": "low",
    "noise-scale-high": "high",
    "gradient-covariance-trace": "S",
    "gradient-square-norm": "N",
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose noise scale was measured, and what it printed."""
    directory = tmp_path_factory.mktemp("logged")
    words = (*BATCHES, f"--save={directory / 'checkpoints'}", f"--copus-dir={directory}")
    flags = f"--log-gradient-noise-scale --wandb-project p --wandb-exp-name e --wandb-save-dir {directory / 'wandb'}"
    outcomes = run_ranks(2, run_with_wandb, [*(RUN + flags).split(), *words])
    assert [o.status for o in outcomes] == [0, 0], outcomes[0].err
    return directory, outcomes[-1].out


def run_with_wandb(words: list[str]) -> Outcome:
    """The entry point with a stand-in for W&B, which writes down what it is told and wants nothing behind finish()."""
    board = mock.MagicMock()
    file = Path(words[words.index("--wandb-save-dir") + 1]) / "logged.jsonl"

    def log(values: dict[str, Any], step: int) -> None:
        assert not board.finish.called
        with file.open("a") as lines:
            lines.write(json.dumps([step, {name: float(value) for name, value in values.items()}]) + "\n")

    board.log.side_effect = log
    with mock.patch.dict(sys.modules, {"wandb": board}):
        return run_main(words)


def test_measuring_changes_neither_losses_nor_weights(logged: tuple[Path, str], tmp_path: Path) -> None:
    directory, printed = logged
    outcomes = launch(RUN, *BATCHES, f"--save={tmp_path / 'checkpoints'}", f"--copus-dir={tmp_path}", ranks=2)
    assert [o.status for o in outcomes] == [0, 0], outcomes[0].err
    assert logged_losses(printed) == logged_losses(outcomes[-1].out)
    assert len(logged_losses(printed)) == STEPS
    weights, untouched = (last_weights(run / "checkpoints") for run in (directory, tmp_path))
    assert weights.keys() == untouched.keys()
    assert all(torch.equal(weights[name], untouched[name]) for name in weights)
    assert not (tmp_path / "events.jsonl").exists(), "nobody asked for it"


def logged_losses(printed: str) -> list[str]:
    """What upstream's log says of the loss, digit by digit."""
    return re.findall(r"lm loss: ([0-9.E+-]+)", printed)


def last_weights(checkpoints: Path) -> dict[str, Any]:
    path = checkpoints / f"iter_{STEPS:07d}" / "mp_rank_00" / "model_optim_rng.pt"
    model = torch.load(path, weights_only=False)["model"]
    return {name: value for name, value in model.items() if isinstance(value, torch.Tensor)}


def test_every_step_is_measured_once_whatever_its_batch(logged: tuple[Path, str]) -> None:
    directory, _ = logged
    events = read_events(directory / "events.jsonl")
    noise = [e for e in events if e["event"] == "noise_scale"]
    assert [number for e in noise for number, *_ in e["steps"]] == list(range(1, STEPS + 1))
    assert {e["estimator"] for e in noise} == {"sketch"}
    # Every fourth step of a batch size, before a checkpoint (upstream writes one where the batch grows), at the end.
    assert [e["iteration"] for e in noise] == [4, 8, 9, 13, 14]
    assert all(e["iteration"] == e["steps"][-1][0] for e in noise)
    assert 0 < noise[-1]["low"] < noise[-1]["value"] < noise[-1]["high"]
    plans = [e["plan"] for e in events if e["event"] == "step"]
    assert plans == ["dp2,mbs1,gbs4"] * 4 + ["dp2,mbs1,gbs8"] * 10
    assert [e["iteration"] for e in events if e["event"] == "step"] == list(range(1, STEPS + 1))


def test_tensorboard_has_what_the_events_have(logged: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    directory, _ = logged
    board = event_accumulator.EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    noise = events_of(directory, "noise_scale")
    for name, field in CURVES.items():
        known = [(e["iteration"], e["consumed_samples"], e[field]) for e in noise if e[field] is not None]
        by_step = {s.step: s.value for s in board.Scalars(name)}
        by_samples = {s.step: s.value for s in board.Scalars(f"{name} vs samples")}
        assert len(by_step) == len(noise), name
        for iteration, samples, value in known:
            assert by_step[iteration] == by_samples[samples] == pytest.approx(value, rel=1e-6), name


def test_weights_and_biases_is_told_the_same(logged: tuple[Path, str]) -> None:
    directory, _ = logged
    told = [json.loads(line) for line in (directory / "wandb" / "logged.jsonl").read_text().splitlines()]
    curves = {step: values for step, values in told if "noise-scale" in values}
    noise = events_of(directory, "noise_scale")
    assert list(curves) == [e["iteration"] for e in noise]
    for event in noise:
        assert curves[event["iteration"]].keys() == CURVES.keys()
        assert curves[event["iteration"]]["gradient-covariance-trace"] == pytest.approx(event["S"])


def test_a_report_can_be_made_of_it(logged: tuple[Path, str]) -> None:
    directory, printed = logged
    summary = report_run(directory)
    assert f"Run finished: {STEPS} steps, 96 sequences" in summary
    assert re.search(rf"noise scale +\S+ \[.*\] at step 4 -> .* at step {STEPS}", summary)
    assert "Global batch size and noise scale" in (directory / "report.html").read_text()
    assert len(losses_of(directory)) == STEPS
    evaluations = [e["loss"] for e in events_of(directory, "eval")]
    on_validation = re.findall(r"on validation set \| lm loss value: ([0-9.E+-]+)", printed)
    on_the_way = re.findall(r"loss at iteration \d+ \| lm loss value: ([0-9.E+-]+)", printed)
    assert evaluations == pytest.approx([float(loss) for loss in [*on_the_way, *on_validation]], rel=1e-6)
