"""Bad input ends with status 2 and one line that names the flag, before anything is built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.launch import BATCHES, MOCK, MODEL, TRAINING, Outcome, run_main
from tests.ranks.harness import run_ranks

ROOT = Path(__file__).parents[2]
RUN = MODEL + TRAINING + BATCHES
PLAIN = "--no-copus --log-gradient-noise-scale "
CASES = {
    "unknown policy": (MOCK + "--copus-policy best", (), "--copus-policy best"),
    "schedule with an impossible plan": (
        MOCK + "--copus-policy schedule",
        ("--copus-schedule", "0:dp4 80:tp3"),
        "--copus-schedule",
    ),
    "schedule that steps would not meet": (
        MOCK + "--copus-policy schedule",
        ("--copus-schedule", "0:dp4 81:pp4"),
        "--copus-schedule",
    ),
    "schedule with a plan the model forbids": (
        MOCK + "--copus-policy schedule",
        ("--copus-schedule", "0:dp4 80:pp4,vpp2"),
        "--copus-schedule",
    ),
    "batch not divisible": (MOCK + "--global-batch-size 6", (), "--global-batch-size"),
    "no data at that prefix": (
        "--tokenizer-type NullTokenizer --vocab-size 126 --data-path /no/such",
        (),
        "--data-path",
    ),
    "no data at all": ("--tokenizer-type NullTokenizer --vocab-size 126", (), "--data-path"),
    "steps instead of samples": (MOCK + "--train-iters 20", (), "--train-iters"),
    "space that is not understood": (MOCK + "--copus-space gbs=x", (), "--copus-space"),
    "space that leaves nothing to choose from": (
        MOCK,
        ("--copus-space", "tp=3 gbs=8"),
        "--copus-space leaves nothing to choose from but dp4,mbs1,gbs8",
    ),
    "a share above the whole": (MOCK + "--copus-probe-budget 2", (), "--copus-probe-budget 2"),
    "warm-up until after the end": (MOCK + "--lr-warmup-samples 100000", (), "--lr-warmup-samples 100000"),
    "misspelt flag": (MOCK + "--copus-spice gbs=4..8", (), "did you mean --copus-space?"),
    "checkpoints at no interval": (MOCK + "--save /tmp/nowhere", (), "--save-interval"),
    "less than a step": (MOCK + "--train-samples 4", (), "--train-samples"),
    "no such tokenizer": (
        "--mock-data --split 1,0,0 --tokenizer-type HuggingFaceTokenizer --tokenizer-model /no/such",
        (),
        "--tokenizer-type",
    ),
    "plain Megatron, batch not divisible": (MOCK + "--no-copus --global-batch-size 6", (), "--global-batch-size"),
    "experts with biases on the CPU": (MOCK + "--num-experts 4", (), "--disable-bias-linear"),
    "a scheduled window over context": (
        MOCK + "--window-size 8,0 --copus-policy schedule",
        ("--copus-schedule", "0:dp4 16:cp2,dp2"),
        "--window-size",
    ),
    "a window over context": (MOCK + "--context-parallel-size 2 --window-size 8,0", (), "--window-size"),
    "a job of another kind": (MOCK + "--sft", (), "--sft"),
    "a flag that ties a job to its layout": (MOCK + "--use-megatron-fsdp", (), "--use-megatron-fsdp"),
    "samples dealt by layout": (MOCK + "--dataloader-type cyclic", (), "--dataloader-type"),
    "unknown estimator": (MOCK + "--copus-gns-estimator best", (), "--copus-gns-estimator best"),
    "second moments of another optimizer": (
        MOCK + "--copus-gns-estimator adam --optimizer sgd",
        (),
        "--copus-gns-estimator adam",
    ),
    "groups of one data-parallel rank": (
        MOCK + "--copus-gns-estimator dp-groups --pipeline-model-parallel-size 4",
        (),
        "--copus-gns-estimator dp-groups",
    ),
    "a schedule without a plan that can be measured": (
        MOCK + "--copus-gns-estimator dp-groups --copus-policy schedule",
        ("--copus-schedule", "0:tp4 80:pp4"),
        "--copus-gns-estimator dp-groups",
    ),
    "plain Megatron, unknown estimator": (
        MOCK + PLAIN + "--copus-gns-estimator best",
        (),
        "--copus-gns-estimator best",
    ),
    "plain Megatron, second moments of another optimizer": (
        MOCK + PLAIN + "--copus-gns-estimator adam --optimizer sgd",
        (),
        "--copus-gns-estimator adam",
    ),
    "plain Megatron, groups of one data-parallel rank": (
        MOCK + PLAIN + "--copus-gns-estimator dp-groups --tensor-model-parallel-size 4",
        (),
        "--copus-gns-estimator dp-groups",
    ),
    "plain Megatron, one micro-batch a step": (
        MOCK + PLAIN + "--pipeline-model-parallel-size 4 --micro-batch-size 8",
        (),
        "--log-gradient-noise-scale",
    ),
    "plain Megatron, norm layers that can't be corrected": (
        MOCK + PLAIN + "--copus-gns-estimator layernorm --pipeline-model-parallel-size 4 --micro-batch-size 8",
        (),
        "--copus-gns-estimator layernorm",
    ),
    "plain Megatron, gradients that nobody sees": (
        MOCK + PLAIN + "--cuda-graph-impl local",
        (),
        "--cuda-graph-impl local",
    ),
    "plain Megatron, a half-life of nothing": (
        MOCK + PLAIN + "--copus-noise-half-life-tokens 0",
        (),
        "--copus-noise-half-life-tokens",
    ),
    "unknown rule for the learning rate": (MOCK + "--copus-lr-rule cube", (), "--copus-lr-rule"),
    "unknown time to rehearse": (MOCK + "--copus-rehearse sometimes", (), "--copus-rehearse"),
    "unknown hardware": (MOCK + "--copus-hardware abacus", (), "--copus-hardware"),
    "no table of step times": (MOCK + "--copus-throughput-table none.csv", (), "--copus-throughput-table"),
}


def refusals() -> list[Outcome]:
    """Every case on every rank; nothing of a case outlives it, since it is refused before anything is built."""
    outcomes: list[Outcome] = []
    for flags, words, _ in CASES.values():
        outcomes.append(run_main([*(RUN + flags).split(), *words]))
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    by_rank = run_ranks(4, refusals)
    return {name: [ranks[i] for ranks in by_rank] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_in_one_line_by_one_rank(case: str, outcomes: dict[str, list[Outcome]]) -> None:
    ranks, flag = outcomes[case], CASES[case][2]
    assert [outcome.status for outcome in ranks] == [2] * 4
    assert flag in ranks[0].err
    assert ranks[0].err.count("\n") == 1, ranks[0].err
    assert all(outcome.err == "" for outcome in ranks[1:])


def test_a_missing_file_is_named_with_its_remedy(outcomes: dict[str, list[Outcome]]) -> None:
    assert "/no/such.bin" in outcomes["no data at that prefix"][0].err
    assert Path("tools/preprocess_data.py").name in outcomes["no data at that prefix"][0].err


def test_torchrun_shows_the_line_once() -> None:
    """The launcher kills all ranks when the first one ends, so the others have to let rank 0 speak."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "pretrain_gpt_copus.py"]
    flags = [*(RUN + MOCK).split(), "--copus-policy", "best"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode != 0
    assert done.stderr.count("pretrain_gpt_copus.py: --copus-policy best") == 1
    assert "Traceback (most recent call last)" not in done.stderr.split("pretrain_gpt_copus.py: ")[0]
