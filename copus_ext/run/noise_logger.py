"""The gradient noise scale of upstream's own ``pretrain()``: watches its steps, changes nothing, and tells."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args

from copus_ext.adapters.arguments import model_shape
from copus_ext.adapters.noise.gradient_noise import GradientNoise
from copus_ext.core.errors import UserError
from copus_ext.core.files import write_whole
from copus_ext.core.noise.grouping import StepShape, why_unmeasurable_in_a_run
from copus_ext.core.noise.noise_tracker import MeasuredStep, NoiseTracker
from copus_ext.core.plan import Plan
from copus_ext.run.config import half_life_tokens
from copus_ext.run.knowledge import load_knowledge
from copus_ext.run.noise_meter import GradientMeter, NoiseMeter, NoMeter
from copus_ext.run.telemetry import Telemetry
from megatron.patches.training_hooks import Observer, StepResult, observing

STATE_FILE = "noise_scale.json"  # beside a checkpoint


class NoiseLogger(Observer):
    """Measures upstream's steps as they come. The batch may ramp up: each size has collectors of its own."""

    def __init__(self, raw: argparse.Namespace, plan: Plan) -> None:
        """``plan``: with the largest batch of the run."""
        self._plan, self._estimator = plan, raw.copus_gns_estimator
        self._tracker = NoiseTracker.start(raw.copus_gns_estimator, half_life_tokens(raw, plan.global_batch))
        self._directory = Path(raw.copus_dir)
        self._telemetry: Telemetry | None = None  # upstream has no ranks, arguments and checkpoint yet
        self._meter: NoiseMeter | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[NoiseLogger]:
        """Observe until the block ends."""
        status = "failed"
        try:
            with observing(self):
                yield self
            status = "finished"
        except SystemExit as stop:  # upstream's way to end at --exit-interval, --exit-duration-in-mins or a signal
            status = "stopped" if not stop.code else "failed"
            raise
        finally:
            if self._meter is not None:
                self._meter.__exit__()
            if self._telemetry is not None:
                self._telemetry.event("run_end", status=status)
                self._telemetry.close()

    def before_step(self, model: Sequence[Any], optimizer: Any) -> None:
        """Have collectors for a step of this size."""
        plan = self._plan.with_batch(get_num_microbatches() * self._plan.micro_batch * self._plan.layout.dp)
        if self._meter is not None and plan == self._plan:
            return
        if self._telemetry is None:
            self._telemetry = self._start_log(plan)
        if self._meter is not None:
            self._flush()
            self._meter.__exit__()
            self._meter = None  # what it kept is free before the next one keeps something
        self._plan, self._meter = plan, self._make_meter(plan, model, optimizer)
        self._meter.__enter__()

    def on_step(self, step: StepResult) -> None:
        """Measure the step."""
        assert self._telemetry is not None
        assert self._meter is not None
        args = get_args()
        args.curr_iteration = step.iteration  # upstream's still counts the step as under way
        self._telemetry.step(step, self._plan, args.seq_length)
        self._take_in(self._meter.step(step.iteration, step.grad_norm, step.learning_rate))
        if step.iteration >= args.train_iters:
            self._flush()  # now: upstream closes W&B behind its last evaluation

    def on_eval(self, losses: dict[str, Any]) -> None:
        """Log an evaluation."""
        values = [float(loss) for loss in losses.values()]
        if self._telemetry is not None:
            self._telemetry.event("eval", loss=values[0] if values else None)

    def on_checkpoint(self, iteration: int) -> None:
        """Put what is known of the noise scale beside the checkpoint."""
        if self._telemetry is None:
            return
        self._flush()
        save = get_args().save
        if self._telemetry.leads:
            write_whole(_state_of(save, iteration), json.dumps(self._tracker.to_json()))
        self._telemetry.event("checkpoint", path=str(save))

    def _start_log(self, plan: Plan) -> Telemetry:
        """Open the log, and go on from what stands beside the checkpoint that was loaded."""
        args = get_args()
        if args.iteration:
            self._tracker = _carried_on(self._tracker, args.load, args.iteration)
        telemetry = Telemetry(self._directory, args.rank == args.world_size - 1, args.iteration or None)
        telemetry.event(
            "run_start",
            world_size=args.world_size,
            plan=str(plan),
            policy="none",
            train_samples=args.train_samples or args.train_iters * args.global_batch_size,
            model=asdict(model_shape(args)),
            candidates=[],
            directory=str(self._directory),
        )
        return telemetry

    def _make_meter(self, plan: Plan, model: Sequence[Any], optimizer: Any) -> NoiseMeter:
        """Nothing for steps at the start of a ramp that are too small to be measured."""
        if why_unmeasurable_in_a_run(StepShape.of(plan), self._estimator):
            return NoMeter()
        args = get_args()
        collector_of = partial(
            GradientNoise,
            model,
            optimizer,
            ProcessGroupCollection.use_mpu_process_groups(),
            micro_batch_size=plan.micro_batch,
            num_microbatches=plan.num_microbatches,
            first_step=args.curr_iteration,
        )
        try:
            return GradientMeter(
                lambda name: collector_of(estimator=name), self._estimator, args.optimizer, args.seq_length
            )
        except ValueError as error:  # of the model or its groups, which are not known before
            raise UserError(f"--log-gradient-noise-scale: {error}") from error

    def _flush(self) -> None:
        if self._meter is not None:
            self._take_in(self._meter.flush())

    def _take_in(self, steps: list[MeasuredStep]) -> None:
        for step in steps:
            self._tracker = self._tracker.update(step)
        if steps and self._telemetry is not None and self._meter is not None:
            self._telemetry.noise_scale(self._tracker.estimate(), self._meter.estimator, steps)


def _state_of(checkpoints: str, iteration: int) -> Path:
    return Path(checkpoints) / f"iter_{iteration:07d}" / STATE_FILE


def _carried_on(tracker: NoiseTracker, checkpoints: str, iteration: int) -> NoiseTracker:
    """With what a plain run has saved beside a checkpoint, or else a COPUS run."""
    path = _state_of(checkpoints, iteration)
    if path.exists():
        return tracker.carried_on(NoiseTracker.from_json(json.loads(path.read_text())))
    state = load_knowledge(checkpoints, iteration)
    return tracker.carried_on(state.noise) if state else tracker
