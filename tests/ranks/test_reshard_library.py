"""The reshard in somebody's own loop: the example under ``examples/``, as it is."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.ranks.harness import run_ranks

STEPS, LAYOUTS = 2, "tp2,pp2 pp2,dp2,zero1 dp4"


def _little_text(_: str) -> str:
    """A folder of some text: to read all of the standard library takes longer than to train here."""
    return str(Path(asyncio.__file__).parent)


def trained() -> Any:
    """Losses of the example's loop with its twin's, its lines, and how many jobs it built."""
    from copus_ext.bench import workbench
    from examples import reshard_in_your_loop as example

    lines: list[str] = []
    words = ["--steps", str(STEPS), "--layouts", LAYOUTS, "--compare"]
    with (
        mock.patch.object(workbench, "sysconfig", SimpleNamespace(get_path=_little_text)),
        mock.patch.object(sys, "argv", ["reshard_in_your_loop.py", *words]),
        mock.patch.object(example, "build_job", wraps=example.build_job) as build,
    ):
        losses = example.train(example.parse(), lines.append)
    return losses, lines, build.call_count


def test_the_example_trains_on_as_a_twin_that_never_moves() -> None:
    losses, lines, built = run_ranks(4, trained)[-1]
    assert [loss.here for loss in losses] == pytest.approx([loss.twin for loss in losses], rel=1e-5)
    assert len(losses) == STEPS * (1 + len(LAYOUTS.split()))
    assert losses[-1].here < losses[0].here - 0.5
    moves = [line for line in lines if line.startswith("moved to")]
    assert len(moves) == len(LAYOUTS.split())
    assert re.match(r"moved to dp1,tp2,pp2,mbs2,gbs16: build \d+ ms, plan .*, move .*, verify .*, sync ", moves[0])
    for line in moves:
        sent, least = re.findall(r"\| (.*) sent, (.*) had to be", line)[0]
        assert sent == least
    assert built == 4, "the twin, and three layouts, of which one is gone back to"
