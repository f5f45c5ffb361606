"""A running job taken from layout to layout in a loop of your own: the reshard as a library, without the planner.

    torchrun --nproc-per-node 4 examples/reshard_in_your_loop.py --layouts "tp2,pp2 pp4 dp4" --compare
    torchrun --nproc-per-node 4 examples/reshard_in_your_loop.py FLAGS --load CHECKPOINT --layouts "tp2,pp2"

FLAGS are those of ``pretrain_gpt.py``: they say what the model is and in which layout it starts. Without
``--num-layers`` it is a small GPT. All models learn the bytes of Python's own library here, whatever the checkpoint
learned. ``--compare`` trains a twin beside it that never moves; without dropout their losses differ by rounding alone.
The lines that move are marked "reshard:".
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from copus_ext.run.start import prepare_environment, set_cpu_flags

prepare_environment()  # before torch and Megatron are imported

import torch.distributed as dist
from megatron.training import training
from megatron.training.arguments import parse_args
from megatron.training.global_vars import set_global_variables

from copus_ext.adapters.arguments import arguments_for, plan_of
from copus_ext.adapters.carry import RngState, carry_scheduler  # reshard:
from copus_ext.adapters.job import Job, build_job
from copus_ext.adapters.layouts import LayoutGroups  # reshard:
from copus_ext.adapters.phases import Phases
from copus_ext.adapters.reshard import PlanCache, ReshardReport, reshard  # reshard:
from copus_ext.bench.workbench import Text, take_step
from copus_ext.core.plan import Plan, parse_plan
from copus_ext.core.report.summary import format_bytes
from copus_ext.run.progress import carry_progress
from copus_ext.run.switch import put_in_charge
from copus_ext.run.telemetry import quiet
from megatron.patches import apply_all

SMALL_GPT = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 --tokenizer-type NullTokenizer "
    "--vocab-size 255 --mock-data --micro-batch-size 2 --global-batch-size 16 --train-samples 100000 --lr 1e-3"
)


class Jobs:
    """Upstream, brought up once, and one model's jobs in it. Everything is collective over all ranks."""

    def __init__(self, raw: argparse.Namespace) -> None:
        """``raw``: upstream's arguments before validation."""
        self.raw, self.first = raw, plan_of(raw)
        self.layouts = LayoutGroups()  # reshard: before upstream makes any group
        self.plans, self.left = PlanCache(), dict[Plan, Job]()  # reshard: so that going back plans and builds nothing
        args = arguments_for(raw, self.first)
        raw.padded_vocab_size = args.padded_vocab_size  # reshard: the same in every layout
        set_global_variables(args)
        training.initialize_megatron()
        self.layouts.adopt(self.first.layout)
        self.text = Text(raw.seq_length)

    def build(self, plan: Plan, *, hollow: bool = False) -> Job:
        """A job for ``plan`` in its own process groups: with initial weights, with the checkpoint's, or with none."""
        args = arguments_for(self.raw, plan)
        if hollow:
            args.load = args.pretrained_checkpoint = None
        return build_job(plan, args, self.layouts.activate(plan.layout, args), initialise_weights=not hollow)

    def move(self, job: Job, plan: Plan) -> tuple[Job, dict[str, float], ReshardReport]:
        """The job to go on with, seconds by phase, and what was moved. ``job`` is hollow behind it."""
        phases, random = Phases(), RngState.capture()
        with phases("build"):
            new = self.left.pop(plan, None) or self.build(plan, hollow=True)
        put_in_charge(new, self.layouts)
        report = reshard(job, new, plans=self.plans)  # reshard: weights, optimizer state, loss scale
        carry_scheduler(job, new)  # reshard: learning rate
        carry_progress(job.args, new.args)
        random.restore_for(new, new.args.iteration)  # reshard: dropout
        self.left[job.plan] = job
        return new, phases.seconds | report.seconds, report

    def step(self, job: Job) -> float | None:
        """One step on the next sequences, which are the same in every layout; the loss, on the last rank."""
        put_in_charge(job, self.layouts)
        args, size, dp = job.args, job.plan.micro_batch, job.groups.dp
        samples = range(args.consumed_train_samples, args.consumed_train_samples + job.plan.global_batch)
        starts = range(dp.rank() * size, len(samples), dp.size() * size)
        taken = take_step(job, [self.text.micro_batch(samples[start : start + size]) for start in starts])
        args.iteration += 1
        args.consumed_train_samples += job.plan.global_batch
        return taken.loss


class Loss(NamedTuple):
    """Of one step. Known on the last rank; the twin's where there is one."""

    here: float | None
    twin: float | None


def train(raw: argparse.Namespace, say: Callable[[str], object] = print) -> list[Loss]:
    """Train in the layout of the flags, then in one after the other of ``--layouts``."""
    jobs = Jobs(raw)
    random = RngState.capture()
    job = jobs.build(jobs.first)
    random.restore()  # the same initial weights again
    twin = jobs.build(jobs.first) if raw.compare else None
    losses = []
    for plan in (jobs.first, *(parse_plan(words, jobs.first) for words in raw.layouts.split())):
        if plan != job.plan:
            job, seconds, report = jobs.move(job, plan)
            say(describe(plan, seconds, report))
        for _ in range(raw.steps):
            losses.append(Loss(jobs.step(job), jobs.step(twin) if twin else None))
            say(f"step {job.args.iteration:4d} | {plan} | " + " | ".join(described(losses[-1])))
    return losses


def described(loss: Loss) -> list[str]:
    """With the relative difference, where there is a twin."""
    if loss.here is None or loss.twin is None:
        return ["loss unknown here" if loss.here is None else f"loss {loss.here:.6f}"]
    return [f"loss {loss.here:.6f}", f"twin {loss.twin:.6f}", f"off by {abs(loss.here / loss.twin - 1):.1e}"]


def describe(plan: Plan, seconds: dict[str, float], report: ReshardReport) -> str:
    """One line for a move. Times and memory are those of the rank that says it."""
    times = ", ".join(f"{name} {spent * 1e3:.0f} ms" for name, spent in seconds.items())
    moved, least, extra, state = map(
        format_bytes, (report.bytes_moved, report.bytes_minimum, report.peak_extra_bytes, report.state_bytes)
    )
    return f"moved to {plan}: {times} | {moved} sent, {least} had to be | {extra} held beyond a job's {state}"


def parse() -> argparse.Namespace:
    """Upstream's flags, for the small GPT where no model is named, and three more."""

    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        layouts = "plans to move to, one after the other (default: %(default)s, for 4 ranks)"
        parser.add_argument("--layouts", default="tp2,pp2 pp4 dp4", help=layouts)
        parser.add_argument("--steps", type=int, default=5, help="in each layout")
        parser.add_argument("--compare", action="store_true", help="train a twin that never moves, too")
        return parser

    if "--num-layers" not in sys.argv:
        sys.argv[1:] = [*SMALL_GPT.split(), *sys.argv[1:]]
    raw = parse_args(add)
    set_cpu_flags(raw)
    return raw


def main() -> None:
    """Under torchrun."""
    apply_all()  # Megatron without an accelerator, and process groups that are made once
    raw = parse()
    say: Callable[[str], object] = lambda _: None  # noqa: E731
    if raw.rank == raw.world_size - 1:
        say = partial(print, file=sys.stdout, flush=True)
    with quiet():  # what upstream says of every model that it builds
        train(raw, say)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
