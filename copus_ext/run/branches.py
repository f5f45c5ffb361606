"""A run that is branched: from one snapshot, in one process, the same samples at several batch sizes."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.training import training

from copus_ext.adapters.snapshot import Snapshot
from copus_ext.core.critical_batch import Interval
from copus_ext.core.critical_batch_report import format_measurements, write_results
from copus_ext.core.critical_batch_result import BranchedPoint, Measurement, measure
from copus_ext.core.decision import Decision
from copus_ext.core.errors import UserError
from copus_ext.core.loss_curves import BranchCurve
from copus_ext.core.noise_scale import NoiseEstimate
from copus_ext.core.noise_tracker import NoiseTracker
from copus_ext.core.plan import Plan
from copus_ext.core.policy import make_policy
from copus_ext.run import gpt
from copus_ext.run.branch_flags import BranchSettings, check_room
from copus_ext.run.config import CopusConfig
from copus_ext.run.driver import Driver
from copus_ext.run.progress import steps_until
from copus_ext.run.switch import put_in_charge
from copus_ext.run.telemetry import Telemetry, quiet

Iterators = tuple[Any, Any, Any]


class BranchTelemetry(Telemetry):
    """Logs a branch, and leaves the terminal to the measurement."""

    def say(self, text: str) -> None:
        """Nothing."""

    def decision(self, decision: Decision, noise: NoiseEstimate | None) -> None:
        """Nothing: a branch keeps its plan."""


class BranchedRun(Driver):
    """Trains the run of the flags, and branches it on the way. Building and running it is collective over all ranks.

    The run's own log goes to ``run/events.jsonl`` under ``--copus-dir``, a branch's to ``branches/<samples>-gbs<batch>/
    events.jsonl``, the results beside them.
    """

    def __init__(self, raw: argparse.Namespace, config: CopusConfig, settings: BranchSettings) -> None:
        """Bring the job up; ``raw`` has been through :func:`copus_ext.run.branch_flags.keep_to_branches`."""
        self._settings, self._directory = settings, config.directory
        self._trained = False
        self._validation: list[list[Any]] = []
        self.measurements: list[Measurement] = []  # on the leading rank, which has the losses
        super().__init__(raw, replace(config, directory=self._directory / "run"))
        # The flags' policy has decided how the vocabulary is padded, as in the run itself. From here on plans are kept.
        self.config = replace(self.config, policy=make_policy("static"), policy_name="static")

    def _check_schedule(self) -> None:
        super()._check_schedule()
        for plan in self._settings.plans:
            if refusal := self._refusal_of(plan):
                raise UserError(f"--branch-multiples: plan {plan} cannot be: {refusal}")

    def _train(self) -> None:
        self._check_points()
        iterators = self._iterators()
        self._validation = self._validation_batches(iterators[1])
        points = self._settings.points or (self.job.args.consumed_train_samples,)
        for point, following in zip_longest(points, points[1:]):
            self._train_to(iterators, point)
            snapshot = Snapshot.take(self.job)
            iterators = self._branch_all(snapshot)
            if following is not None and following < self.job.args.consumed_train_samples:
                self._go_back(snapshot)
                iterators = self._iterators()

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
        first = self._validation_losses()
        own_last = sorted(settings.plans, key=lambda plan: plan == settings.base)
        curves, noise = [], {}
        for plan in own_last:
            self._go_back(snapshot)
            with self._logged_apart(plan, start):
                losses, iterators = self._branch(plan, start)
                noise[plan.global_batch] = self._noise_scale()
            samples = np.arange(settings.evaluations + 1, dtype=np.float64) * settings.spacing
            curves.append(BranchCurve(plan.global_batch, samples, np.array([first, *losses], dtype=np.float64)))
        if self.telemetry.leads:
            self._conclude(BranchedPoint(start, settings.base.global_batch, tuple(curves), noise))
        return iterators

    def _branch(self, plan: Plan, start: int) -> tuple[list[list[float]], Iterators]:
        """Train under ``plan`` from ``start`` samples; [evaluations][blocks] losses, and the iterators at the end."""
        iterators = self._iterators() if plan == self.job.plan else self._switch(plan)
        if iterators is None:
            raise RuntimeError(f"no branch under {plan}: {self.knowledge.rejected[plan]}")
        found = []
        for number in range(1, self._settings.evaluations + 1):
            done = number * self._settings.spacing
            self._train_to(iterators, start + done)
            found.append(self._validation_losses())
            loss = float(np.mean(found[-1]))
            self.telemetry.event("eval", loss=loss, blocks=found[-1])
            self._progress(f"{start} + {done:5d} of {self._settings.samples} | {plan} | validation {loss:.4f}")
        return found, iterators

    def _progress(self, text: str) -> None:
        if self.telemetry.leads:
            print(f" [branch] {text}", flush=True)

    def _go_back(self, snapshot: Snapshot) -> None:
        snapshot.restore(self.job)
        put_in_charge(self.job, self.layouts)

    @contextlib.contextmanager
    def _logged_apart(self, plan: Plan, start: int) -> Iterator[None]:
        """A log of its own, and a noise scale measured from here on in which every sequence counts alike."""
        telemetry, knowledge = self.telemetry, self.knowledge
        folder = self._directory / "branches" / f"{start}-gbs{plan.global_batch}"
        self.telemetry = BranchTelemetry(folder, telemetry.leads, None)
        noise = NoiseTracker.start(self.config.noise_estimator, half_life_tokens=math.inf)
        self.knowledge = replace(knowledge, noise=noise, rejected=dict(knowledge.rejected))
        try:
            self._log_start()
            yield
            self.telemetry.event("run_end", status="finished")
        finally:
            self.telemetry.close()
            self.telemetry, self.knowledge = telemetry, knowledge

    def _noise_scale(self) -> Interval:
        estimate = self.knowledge.noise.estimate()
        return Interval(*(math.nan,) * 3 if estimate is None else estimate[:3])

    # -- training and validation

    def _train_to(self, iterators: Iterators, samples: int) -> None:
        while steps_until(self.job.args, samples):
            self._segment(iterators, continues_a_run=self._trained, until=samples)
            self._trained = True

    def _iterators(self) -> Iterators:
        with quiet():
            return self.data.iterators(len(self.job.model))

    def _validation_batches(self, iterators: Any) -> list[list[Any]]:
        """This rank's validation micro-batches, for each model chunk, to be read again at every evaluation."""
        args = self.job.args
        if iterators is None or (isinstance(iterators, list) and None in iterators):
            raise UserError("there is no validation data to compare branches by; give --valid-data-path, or --split")
        per_block = args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)
        chunks = iterators if isinstance(iterators, list) else [iterators]
        return [[next(iterator) for _ in range(args.eval_iters * per_block)] for iterator in chunks]

    def _validation_losses(self) -> list[float]:
        """[blocks] losses on the validation sequences, always the same; ``nan`` on ranks without the last stage."""
        job, args = self.job, self.job.args
        self._take_hooks_off()
        again: list[Any] = [RerunDataIterator(iter(batches)) for batches in self._validation]
        consumed, found = args.consumed_valid_samples, []
        for _ in range(args.eval_iters):
            with quiet():
                losses, _, _ = training.evaluate(
                    gpt.forward_step, again if len(again) > 1 else again[0], job.model, None, job.config, eval_iters=1
                )
            if losses is None:  # upstream has found that --exit-duration-in-mins is over
                raise SystemExit(0)
            found.append(next((float(loss) for loss in losses.values()), math.nan))
        args.consumed_valid_samples = consumed
        return found

    def _take_hooks_off(self) -> None:
        """Parameters are whole between steps. Hooks that would wait for a gather are put back by ``job.ready()``."""
        for chunk in self.job.model:
            if getattr(chunk, "remove_forward_pre_hook_handles", None):
                chunk.disable_forward_pre_hook(param_sync=False)

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
