"""A run that is branched: from one snapshot, in one process, the same samples at several batch sizes."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from copus_ext.adapters.snapshot import Snapshot
from copus_ext.core.efficiency.critical_batch import Interval
from copus_ext.core.efficiency.critical_batch_result import BranchedPoint, Measurement, measure
from copus_ext.core.efficiency.loss_curves import BranchCurve
from copus_ext.core.errors import UserError
from copus_ext.core.plan import Plan
from copus_ext.core.planner.policy import PolicySettings
from copus_ext.core.planner.registry import make_policy
from copus_ext.core.report.critical_batch import format_measurements, write_results
from copus_ext.run.branch_flags import BranchSettings, check_room
from copus_ext.run.branching import Branches
from copus_ext.run.config import CopusConfig
from copus_ext.run.driver import Driver
from copus_ext.run.host import Iterators


class BranchedRun(Driver):
    """Trains the run of the flags, and branches it on the way. Building and running it is collective over all ranks.

    The run's own log goes to ``run/events.jsonl`` under ``--copus-dir``, a branch's to ``branches/<samples>-gbs<batch>/
    events.jsonl``, the results beside them.
    """

    chooses = False

    def __init__(self, raw: argparse.Namespace, config: CopusConfig, settings: BranchSettings) -> None:
        """Bring the job up; ``raw`` has been through :func:`copus_ext.run.branch_flags.keep_to_branches`."""
        self._settings, self._directory = settings, config.directory
        self._branches: Branches
        self.measurements: list[Measurement] = []  # on the leading rank, which has the losses
        super().__init__(raw, replace(config, directory=self._directory / "run"))
        # The flags' policy has decided how the vocabulary is padded, as in the run itself. From here on plans are kept.
        static = PolicySettings("static")
        self.config = replace(self.config, policy=make_policy(static, config.base), settings=static)

    def _check_schedule(self) -> None:
        super()._check_schedule()
        for plan in self._settings.plans:
            if refusal := self.refusal_of(plan):
                raise UserError(f"--branch-multiples: plan {plan} cannot be: {refusal}")

    def _train(self) -> None:
        self._check_points()
        self._branches = Branches(self, self.job.args.eval_iters)
        iterators = self.iterators()
        points = self._settings.points or (self.job.args.consumed_train_samples,)
        for point, following in zip_longest(points, points[1:]):
            self._branches.train_to(iterators, point)
            snapshot = Snapshot.take(self.job)
            iterators = self._branch_all(snapshot)
            if following is not None and following < self.job.args.consumed_train_samples:
                self._branches.go_back(snapshot)
                iterators = self.iterators()

    def _check_points(self) -> None:
        """What only a loaded checkpoint tells: where the run stands."""
        start, batch = self.job.args.consumed_train_samples, self.job.plan.global_batch
        for point in self._settings.points or (start,):
            if point < start or (point - start) % batch:
                raise UserError(f"--branch-at {point}: steps of {batch} from {start} consumed samples do not end there")
            check_room(point, self._settings.samples, self.job.args.train_samples)

    # -- branches

    def _branch_all(self, snapshot: Snapshot) -> Iterators:
        """All branches of a snapshot, the run's own batch last; what to read on with from the end of that one."""
        settings, start = self._settings, self.job.args.consumed_train_samples
        self.telemetry.say(f"branching at {start} samples: {', '.join(map(str, settings.plans))}")
        first = self._branches.losses()
        own_last = sorted(settings.plans, key=lambda plan: plan == settings.base)
        curves, noise = [], {}
        for plan in own_last:
            self._branches.go_back(snapshot)
            folder = self._directory / "branches" / f"{start}-gbs{plan.global_batch}"
            with self._branches.logged_apart(folder):
                losses, iterators = self._branches.train(
                    plan, settings.samples, settings.evaluations, partial(self._progress, plan, start)
                )
                noise[plan.global_batch] = self._noise_scale()
            samples = np.arange(settings.evaluations + 1, dtype=np.float64) * settings.spacing
            curves.append(BranchCurve(plan.global_batch, samples, np.array([first, *losses], dtype=np.float64)))
        if self.telemetry.leads:
            self._conclude(BranchedPoint(start, settings.base.global_batch, tuple(curves), noise))
        return iterators

    def _progress(self, plan: Plan, start: int, done: int, losses: list[float]) -> None:
        loss = float(np.mean(losses))
        self.telemetry.event("eval", loss=loss, blocks=losses)
        if self.telemetry.leads:
            of = f"{start} + {done:5d} of {self._settings.samples}"
            print(f" [branch] {of} | {plan} | validation {loss:.4f}", flush=True)

    def _noise_scale(self) -> Interval:
        estimate = self.knowledge.noise.estimate()
        return Interval(*(math.nan,) * 3 if estimate is None else estimate[:3])

    # -- results

    def _conclude(self, point: BranchedPoint) -> None:
        """Write what is known so far, so that a run that is cut short leaves its whole points."""
        self.measurements.append(measure(point, self._settings.settle, self._settings.tolerance))
        write_results(self._directory, self.measurements, self._conditions())

    def _conditions(self) -> dict[str, Any]:
        """What the results hold for."""
        args, settings = self.job.args, self._settings
        names = ("seq_length", "lr", "lr_decay_style", "lr_warmup_samples", "train_samples", "optimizer", "seed")
        return {
            "base": str(settings.base),
            "branches": [str(plan) for plan in settings.plans],
            "lr_rule": self.config.lr_rule,
            "branch_samples": settings.samples,
            "evaluations": settings.evaluations,
            "settle": settings.settle,
            "tolerance": settings.tolerance,
            "validation_blocks": args.eval_iters,
            "validation_block_sequences": args.eval_global_batch_size,
            **{name: getattr(args, name) for name in names},
        }

    def _report(self) -> None:
        if self.telemetry.leads:
            print(format_measurements(self.measurements), flush=True)
            print(f"  results     {Path(self._directory) / 'critical_batch.json'} and critical_batch.svg", flush=True)
