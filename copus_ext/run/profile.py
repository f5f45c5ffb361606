"""A job that measures plans: it goes from one to the next in place, and takes a few steps under each.

What it trains is thrown away. Steps are whole steps of the run that the flags describe, the noise scale measured as
usual, and they are timed by the clock of a run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from copus_ext.adapters.agreement import largest
from copus_ext.adapters.arguments import first_line
from copus_ext.adapters.measure import peak_memory
from copus_ext.core.cost.throughput_table import Row, ThroughputTable, append_row, read_table, spread, visits
from copus_ext.core.errors import UserError
from copus_ext.core.plan import Plan, parse_plan
from copus_ext.core.report.summary import format_bytes
from copus_ext.run.config import CopusConfig
from copus_ext.run.controller import Controller
from copus_ext.run.driver import Driver, measured_subject
from copus_ext.run.host import Iterators
from copus_ext.run.progress import NEVER
from copus_ext.run.switch import LEARNING_RATES
from copus_ext.run.telemetry import Telemetry
from megatron.patches.training_hooks import StepResult

_FLAG = "--profile-out"
_MOST_TRIES = 40  # while fp16 looks for its loss scale, a few tens of steps are skipped
# Where samples begin anew once they are used up: what is trained on does not matter. 0 means "unknown" to upstream.
_SECOND_SAMPLE = 1


def add_profile_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group ``profile`` to a parser."""
    group = parser.add_argument_group("profile")
    group.add_argument(_FLAG, type=Path, metavar="FILE", help="the table (default: profile.csv in --copus-dir)")
    group.add_argument(
        "--profile-plans",
        metavar="PLANS",
        help='plans to measure, like "dp4,mbs1,gbs8; tp2,pp2,mbs2,gbs8" (default: all that a run with this '
        "--copus-space may choose from)",
    )
    numbers = (
        ("steps", 8, "steps that are measured at every visit to a plan"),
        ("warmup", 2, "first steps of a visit, which are left out"),
        ("laps", 1, "visits to every plan, each lap going once round all plans"),
    )
    for name, default, meaning in numbers:
        group.add_argument(
            f"--profile-{name}", type=int, default=default, metavar="N", help=f"{meaning} (default: {default})"
        )
    return parser


@dataclass(frozen=True)
class ProfileSettings:
    """What the flags say, checked. ``plans`` is empty for those of ``--copus-space``."""

    path: Path
    plans: tuple[Plan, ...]
    steps: int
    warmup: int
    laps: int

    def samples(self, plan: Plan) -> int:
        """Sequences that a visit to ``plan`` takes."""
        return (self.warmup + self.steps) * plan.global_batch


def settings_from(flags: argparse.Namespace, raw: argparse.Namespace, base: Plan) -> ProfileSettings:
    """Check the flags.

    Args:
        flags: of :func:`add_profile_arguments`.
        raw: upstream's arguments before validation, with the copus group.
        base: the plan of upstream's flags.

    Raises:
        UserError: something is wrong; the message names the flag and says what to do.
    """
    if raw.no_copus:
        raise UserError("--no-copus: a profile switches between plans; leave it out")
    if raw.copus_policy != "copus":
        raise UserError(f"--copus-policy {raw.copus_policy}: a profile measures plans of --copus-space; leave it out")
    for name, least in (("steps", 1), ("warmup", 0), ("laps", 1)):
        if (given := getattr(flags, f"profile_{name}")) < least:
            raise UserError(f"--profile-{name} {given} is too small; give at least {least}")
    path = flags.profile_out or Path(raw.copus_dir) / "profile.csv"
    if path.exists():
        read_table(path, _FLAG)  # what is wrong with it is better told now
    plans = _named_plans(flags.profile_plans, base)
    return ProfileSettings(path, plans, flags.profile_steps, flags.profile_warmup, flags.profile_laps)


def _named_plans(text: str | None, base: Plan) -> tuple[Plan, ...]:
    if text is None:
        return ()
    words = [word for word in map(str.strip, text.split(";")) if word]
    if not words:
        raise UserError("--profile-plans names no plan; write them like dp4,mbs1,gbs8; tp2,pp2,mbs2,gbs8")
    try:
        return tuple(parse_plan(word, base) for word in words)
    except ValueError as error:
        raise UserError(f"--profile-plans: {error}") from None


def keep_to_profile(raw: argparse.Namespace) -> None:
    """Switch off what a run does beside its steps. Nothing is loaded or saved, and a rate of 0 leaves the weights.

    So no plan is measured at other weights than the next, and no loss can come to nothing on the way.
    """
    raw.save = raw.save_interval = raw.load = raw.pretrained_checkpoint = None
    raw.tensorboard_dir = raw.wandb_project = raw.exit_interval = None
    raw.eval_interval = NEVER
    for name in LEARNING_RATES:
        if getattr(raw, name) is not None:
            setattr(raw, name, 0.0)


class _StepTimes(Controller):
    """Keeps what every step took, and decides nothing."""

    def __init__(self, host: Driver, continues_a_run: bool) -> None:
        super().__init__(host, continues_a_run=continues_a_run, deciding=False)
        self.taken: list[StepResult] = []

    def on_step(self, step: StepResult) -> None:
        """Learn from the step as in a run."""
        super().on_step(step)
        self.taken.append(step)


class _Unheard(Telemetry):
    """Logs as a run does, and leaves the terminal to the profile."""

    def say(self, text: str) -> None:
        """Nothing."""


class ProfiledRun(Driver):
    """Measures plans one after the other. Building and running it is collective over all ranks.

    The last rank, whose clock counts in a run, writes the table.
    """

    chooses = False

    def __init__(self, raw: argparse.Namespace, config: CopusConfig, settings: ProfileSettings) -> None:
        """Bring the job up under the plan of the flags; ``raw`` has been through :func:`keep_to_profile`.

        Raises:
            UserError: the table is of another model or machine, or there are too few samples.
        """
        self._settings, self._directory = settings, config.directory / "profile"
        self._watched: _StepTimes
        self._new: list[Row] = []
        self._seconds = self._switching_s = 0.0
        super().__init__(raw, replace(config, directory=self._directory))
        self.telemetry.close()
        self.telemetry = _Unheard(self._directory, self.telemetry.leads, None, self.knowledge)
        self._subject = measured_subject(raw, self.job.args)
        self._read().check(self._subject, f"{_FLAG} {settings.path}")
        self._plans = settings.plans or self._plans_of_space()
        self._check_samples()

    def _check_samples(self) -> None:
        largest = max(self._plans, key=lambda plan: plan.global_batch)
        samples, needed = self.job.args.train_samples, self._settings.samples(largest) + _SECOND_SAMPLE
        if samples < needed:
            steps = self._settings.warmup + self._settings.steps
            raise UserError(
                f"--train-samples {samples} are too few for {steps} steps of {largest}; give at least {needed}"
            )

    def _plans_of_space(self) -> tuple[Plan, ...]:
        """What a run with these flags may choose from."""
        candidates, objections = self.knowledge.candidates, self.knowledge.objections()
        plans = tuple(plan for plan in candidates if plan not in objections)
        if not plans:
            raise UserError("--copus-space: no plan of it can be measured; widen it, or name some in --profile-plans")
        if left_out := [plan for plan in candidates if plan in objections]:
            why = f"{left_out[0]}: {objections[left_out[0]]}"
            self._say(f"{len(left_out)} of {len(candidates)} plans are left out, as in a run; {why}")
        return plans

    # -- measuring

    def _train(self) -> None:
        start = time.perf_counter()
        todo = self._agreed_visits()
        plans = len({plan for plan, _ in todo})
        self._say(f"{len(todo)} visits to {plans} plans are left to measure for {self._settings.path}")
        failed: set[Plan] = set()
        for number, (plan, lap) in enumerate(todo, start=1):
            if plan in failed:
                continue
            row = self._visit(plan, lap)
            if row.failure:
                failed.add(plan)
            self._tell(row, f"{number:{len(str(len(todo)))}d}/{len(todo)} lap {lap}/{self._settings.laps}")
        self._seconds = time.perf_counter() - start

    def _agreed_visits(self) -> list[tuple[Plan, int]]:
        """What is left to do, as the rank that writes the table sees it: others may not have the file."""
        found: list[Any] = [None]
        if self.telemetry.leads:
            found = [visits(self._plans, self._settings.laps, self.job.plan.layout, self._read())]
        dist.broadcast_object_list(found, src=self.job.args.world_size - 1)
        return list(found[0])

    def _read(self) -> ThroughputTable:
        path = self._settings.path
        return read_table(path, _FLAG) if path.exists() else ThroughputTable(None, ())

    def _visit(self, plan: Plan, lap: int) -> Row:
        """Go to ``plan`` and measure it; where that fails, the row says why, and the job is as it was."""
        if refusal := self.refusal_of(plan):
            return Row(plan, lap, failure=refusal)
        args = self.job.args
        if args.train_samples - args.consumed_train_samples < self._settings.samples(plan):
            args.consumed_train_samples = _SECOND_SAMPLE
        before = time.perf_counter()
        iterators = self.iterators() if plan == self.job.plan else self.switch(plan)
        self._switching_s += time.perf_counter() - before
        if iterators is None:
            return Row(plan, lap, failure=self.knowledge.rejected[plan])
        return self._measured(plan, lap, iterators)

    def _measured(self, plan: Plan, lap: int, iterators: Iterators) -> Row:
        """Steps under the plan in force. A step that finds no memory ends the job, and its row says so before."""
        try:
            times = self._step_times(iterators)
        except torch.OutOfMemoryError as error:
            append_row(self._settings.path, self._subject, Row(plan, lap, failure=f"in a step: {first_line(error)}"))
            raise
        if not times:
            return Row(plan, lap, failure="the loss scale was not found in time")
        peak = peak_memory()  # since the last segment began; segments of one plan take the same
        return Row(plan, lap, tuple(times), None if peak is None else largest(peak))

    def _step_times(self, iterators: Iterators) -> list[float]:
        """Seconds of the steps behind the first ones. Steps that fp16 skips do less than others, and do not count."""
        wanted, taken = self._settings.warmup + self._settings.steps, list[StepResult]()
        for _ in range(_MOST_TRIES):
            args, missing = self.job.args, wanted - len(taken)
            until = args.consumed_train_samples + missing * args.global_batch_size
            self.segment(iterators, until=until)
            taken += [step for step in self._watched.taken if not step.skipped]
            if len(taken) == wanted:
                break
        return [step.step_time_s for step in taken[self._settings.warmup :]]

    def _controller(self, continues_a_run: bool, deciding: bool) -> Controller:
        self._watched = _StepTimes(self, continues_a_run)
        return self._watched

    # -- telling

    def _say(self, text: str) -> None:
        if self.telemetry.leads:
            print(f" [profile] {text}", flush=True)

    def _tell(self, row: Row, place: str) -> None:
        """Write the row, and a line for whoever watches."""
        self._new.append(row)
        if self.telemetry.leads:
            append_row(self._settings.path, self._subject, row)
        if row.failure:
            self._say(f"{place} | {row.plan} | left out: {row.failure}")
            return
        speed = row.plan.global_batch / row.step_time_s
        memory = "" if row.peak_memory_bytes is None else f" | peak {format_bytes(row.peak_memory_bytes)}"
        self._say(
            f"{place} | {row.plan} | {row.step_time_s:.4g} s a step, sd {row.step_time_sd_s:.2g} "
            f"({len(row.step_times_s)} steps) | {speed:.4g} sequences/s{memory}"
        )

    def _report(self) -> None:
        if not self.telemetry.leads:
            return
        table = self._read()
        speeds = {plan: plan.global_batch / median(times) for plan, times in table.step_times().items()}
        noise = spread(table)
        fastest = max(speeds, key=speeds.__getitem__, default=None)
        summary = {
            "table": str(self._settings.path),
            "visits": len(self._new),
            "measured_plans": len(speeds),
            "failed_plans": len(table.failed()),
            "seconds": round(self._seconds, 3),
            "switching_s": round(self._switching_s, 3),
            "fastest": None if fastest is None else str(fastest),
            "sequences_per_s": None if fastest is None else round(speeds[fastest], 3),
            "sd_within_visits": _finite(noise.within_visits),
            "sd_between_laps": _finite(noise.between_laps),
        }
        print(json.dumps(summary), flush=True)


def _finite(share: float) -> float | None:
    return round(share, 4) if math.isfinite(share) else None
