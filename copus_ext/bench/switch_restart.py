"""What a restart costs: a checkpoint on disk, and ``torchrun`` of plain pre-training in another layout from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from copus_ext.bench.switch_setting import TRAINING, VOCABULARY, Checkpoint, Model, base_plan
from copus_ext.bench.switch_summary import Restarted
from copus_ext.core.plan import Layout, parse_plan

_STEP_LINE = re.compile(r" iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+)")
_PROGRAM = Path(__file__).parents[2] / "pretrain_gpt_copus.py"


class RestartFailed(RuntimeError):
    """The new processes ended without a step."""


def restart(model: Model, checkpoint: Checkpoint, ranks: int) -> Restarted:
    """Start anew from ``checkpoint`` and wait for the first step; its own time, as upstream logs it, is taken off.

    Raises:
        RestartFailed: there was none.
    """
    layout = parse_plan(checkpoint.new, base_plan(ranks)).layout
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += [str(_PROGRAM), *_flags(model, layout, checkpoint)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=_PROGRAM.parent
    ) as process:
        assert process.stdout is not None
        seconds = _until_step(process.stdout, checkpoint.iteration + 1, start)
        for _ in process.stdout:  # it ends by itself after this step, and must not wait for a reader
            pass
    return Restarted(checkpoint.kind, checkpoint.old, checkpoint.new, checkpoint.save_s, seconds)


def _until_step(lines: IO[str], iteration: int, start: float) -> float:
    last: list[str] = []
    for line in lines:
        found = _STEP_LINE.search(line)
        if found and int(found[1]) == iteration:
            return time.perf_counter() - start - float(found[2]) / 1e3
        last = [*last[-19:], line]
    raise RestartFailed("".join(last))


def _flags(model: Model, layout: Layout, checkpoint: Checkpoint) -> list[str]:
    """Of the program: one step in ``layout``, from the checkpoint on."""
    words = (
        f"{model.flags} {TRAINING} --no-copus --mock-data --split 100,0,0 "
        f"--tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1} "
        f"--tensor-model-parallel-size {layout.tp} --pipeline-model-parallel-size {layout.pp} "
        f"--load {checkpoint.folder} --exit-interval {checkpoint.iteration + 1}"
    )
    return words.split()
