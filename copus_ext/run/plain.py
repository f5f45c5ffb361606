"""A plain run: upstream's own ``pretrain()``, with its gradient noise scale where that is asked for."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import validate_args
from megatron.training.global_vars import set_global_variables

from copus_ext.adapters.noise.gradient_noise import GradientNoise
from copus_ext.core.errors import UserError
from copus_ext.core.grouping import StepShape, why_unmeasurable
from copus_ext.core.noise_tracker import MeasuredStep, NoiseTracker
from copus_ext.core.plan import Plan
from copus_ext.run import gpt
from copus_ext.run.config import check_estimator, half_life_tokens
from copus_ext.run.noise_meter import GradientMeter, NoiseMeter, NoMeter
from copus_ext.run.telemetry import Telemetry
from megatron.patches.training_hooks import Observer, StepResult, observing


def run_plain(raw: argparse.Namespace, plan: Plan) -> None:
    """Train with nothing of ours but the patches, and the noise scale if it is asked for.

    Args:
        raw: upstream's arguments before validation, with the copus group.
        plan: what they say about batch and layout.

    Raises:
        UserError: the noise scale is asked for and can't be measured.
    """
    logger = _noise_logger(raw, plan)
    validate_args(raw)
    set_global_variables(raw)
    container = pretrain_cfg_container_from_args(raw, gpt_config_from_args(raw))
    with logger:
        pretrain(container, gpt.train_valid_test_datasets, ModelType.encoder_or_decoder, gpt.forward_step)


def _noise_logger(raw: argparse.Namespace, plan: Plan) -> contextlib.AbstractContextManager[object]:
    if not raw.log_gradient_noise_scale:
        return contextlib.nullcontext()
    check_estimator(raw)
    if reason := why_unmeasurable(StepShape.of(plan), raw.copus_gns_estimator):
        raise UserError(f"--log-gradient-noise-scale: {reason}")
    for name in ("use_torch_fsdp2", "use_megatron_fsdp"):
        if getattr(raw, name, False):
            raise UserError(
                f"--log-gradient-noise-scale needs Megatron's own DDP; leave out --{name.replace('_', '-')}"
            )
    return NoiseLogger(raw, plan).running()


class NoiseLogger(Observer):
    """Measures upstream's steps as they come. The batch may ramp up: each size has collectors of its own."""

    def __init__(self, raw: argparse.Namespace, plan: Plan) -> None:
        self._plan, self._estimator = plan, raw.copus_gns_estimator
        self._tracker = NoiseTracker.start(raw.copus_gns_estimator, half_life_tokens(raw, plan.global_batch))
        self._directory = Path(raw.copus_dir)
        self._telemetry: Telemetry | None = None
        self._meter: NoiseMeter = NoMeter()

    @contextlib.contextmanager
    def running(self) -> Iterator[NoiseLogger]:
        """Observe until the block ends."""
        status = "failed"
        try:
            with observing(self):
                yield self
            self._take_in(self._meter.flush())
            status = "finished"
        finally:
            self._meter.__exit__()
            if self._telemetry:
                self._telemetry.event("run_end", status=status)
                self._telemetry.close()

    def before_step(self, model: Sequence[Any], optimizer: Any) -> None:
        """Have collectors for a step of this size."""
        if self._telemetry is None:
            self._start_log()
        plan = self._plan.with_batch(get_num_microbatches() * self._plan.micro_batch * self._plan.layout.dp)
        if plan == self._plan and not isinstance(self._meter, NoMeter):
            return
        self._take_in(self._meter.flush())
        self._meter.__exit__()
        self._plan, self._meter = plan, self._make_meter(plan, model, optimizer)
        self._meter.__enter__()

    def on_step(self, step: StepResult) -> None:
        """Measure the step."""
        assert self._telemetry is not None
        self._telemetry.step(step, self._plan, get_args().seq_length)
        self._take_in(self._meter.step(step.iteration, step.grad_norm, step.learning_rate))

    def on_eval(self, losses: dict[str, Any]) -> None:
        """Log an evaluation."""
        values = [float(loss) for loss in losses.values()]
        if self._telemetry is not None:
            self._telemetry.event("eval", loss=values[0] if values else None)

    def _start_log(self) -> None:
        args = get_args()
        leads = args.rank == args.world_size - 1
        self._telemetry = Telemetry(self._directory, leads, args.iteration or None)
        self._telemetry.event("run_start", world_size=args.world_size, plan=str(self._plan), policy="none")

    def _make_meter(self, plan: Plan, model: Sequence[Any], optimizer: Any) -> NoiseMeter:
        if why_unmeasurable(StepShape.of(plan), self._estimator):
            return NoMeter()
        args = get_args()
        collector_of = partial(
            GradientNoise,
            model,
            optimizer,
            ProcessGroupCollection.use_mpu_process_groups(),
            micro_batch_size=plan.micro_batch,
            num_microbatches=plan.num_microbatches,
            first_step=args.iteration,
        )
        return GradientMeter(
            lambda name: collector_of(estimator=name), self._estimator, args.optimizer, args.seq_length
        )

    def _take_in(self, steps: list[MeasuredStep]) -> None:
        for step in steps:
            self._tracker = self._tracker.update(step)
        if steps and self._telemetry is not None:
            self._telemetry.noise_scale(self._tracker.estimate(), self._meter.estimator, steps)
