"""Run the entry point on several ranks of the fork server, as torchrun would, and give back what it printed."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests.ranks.harness import run_ranks

MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --seq-length 32 --max-position-embeddings 32 "
    "--position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 32 "
)
# Measured beforehand: that takes a second of every start.
HARDWARE = f"--copus-hardware {Path(__file__).parents[1] / 'data' / 'cpu_4_ranks.toml'} "
TRAINING = (
    f"{HARDWARE}--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --eval-interval 1000 --eval-iters 1 "
    "--log-interval 1 --seed 1234 "
)
MOCK = "--tokenizer-type NullTokenizer --vocab-size 126 --mock-data --split 90,5,5 "
BATCHES = "--micro-batch-size 1 --global-batch-size 8 --train-samples 160 "


class Outcome(NamedTuple):
    """How the program ended on one rank."""

    status: int
    out: str
    err: str


def launch(flags: str, *words: str, ranks: int = 4, timeout_s: float = 180.0) -> list[Outcome]:
    """``pretrain_gpt_copus.py flags words`` on ``ranks`` ranks; an outcome for each. Words may hold spaces."""
    return run_ranks(ranks, run_main, [*flags.split(), *words], timeout_s=timeout_s)


def run_main(words: list[str]) -> Outcome:
    """The entry point's ``main()`` on this rank."""
    from copus_ext.run import start

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["pretrain_gpt_copus.py", *words]),
        mock.patch.object(
            start, "time", mock.Mock(sleep=mock.Mock(side_effect=SystemExit(2)))
        ),  # the launcher kills who waits
    ):
        try:
            status = start.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Outcome(status, out.getvalue(), err.getvalue())


def events_of(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind that stand in a run's log, in order, superseded ones included."""
    lines = (directory / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses_of(directory: Path) -> list[float]:
    """The loss of every step in a run's log."""
    return [event["loss"] for event in events_of(directory, "step")]
