"""Between the training loop and the policy: records every step, asks the policy, and has all ranks agree."""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

import torch.distributed as dist

from copus_ext.adapters.agreement import largest
from copus_ext.adapters.job import Job
from copus_ext.adapters.measure import forget_peak_memory, peak_memory
from copus_ext.adapters.noise.gradient_noise import GradientNoise
from copus_ext.core.noise.grouping import StepShape, why_unmeasurable_in_a_run
from copus_ext.core.noise.noise_tracker import MeasuredStep
from copus_ext.core.plan import Plan
from copus_ext.core.planner.deciding import decide
from copus_ext.core.planner.decision import Probe
from copus_ext.core.planner.knowledge import Knowledge
from copus_ext.run.config import CopusConfig
from copus_ext.run.host import Host
from copus_ext.run.knowledge import save_knowledge
from copus_ext.run.noise_meter import GradientMeter, NoiseMeter, NoMeter
from copus_ext.run.progress import steps_until
from megatron.patches.training_hooks import Observer, StepResult

_NOTEWORTHY = 1.01  # growth of a plan's peak memory that is worth an event


class Controller(Observer):
    """Watches one job. Once ``wanted`` or ``probe`` is set, a plan or a branch, ``train()`` is told to end.

    Only the leading rank decides, as only it has the losses and one clock must judge; the others are told.
    """

    def __init__(self, host: Host, *, continues_a_run: bool, deciding: bool = True) -> None:
        """``deciding``: ask the policy where a decision is due."""
        self.continues_a_run = continues_a_run
        self.wanted: Plan | None = None
        self.probe: Probe | None = None
        self._host, self._job, self._telemetry = host, host.job, host.telemetry
        self._config, self._deciding = host.config, deciding
        self._noise: NoiseMeter = NoMeter()

    def __enter__(self) -> Controller:
        forget_peak_memory()
        self._noise = _meter_of(self._job, self._config)
        self._noise.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:  # else other ranks may not come to the same point
            self._take_in(self._noise.flush())
        self._noise.__exit__()

    @property
    def _args(self) -> argparse.Namespace:
        return self._job.args

    @property
    def _known(self) -> Knowledge:
        assert self._telemetry.knowledge is not None
        return self._telemetry.knowledge

    def on_step(self, step: StepResult) -> None:
        """Record the step, and decide where one is due."""
        self._args.curr_iteration = step.iteration
        self._telemetry.step(step, self._job.plan, self._args.seq_length, self._rate_share(step.learning_rate))
        self._take_in(self._noise.step(step.iteration, step.grad_norm, step.learning_rate))
        if self._deciding and self._decision_is_due(step.iteration):
            self._decide(step.iteration)

    def on_eval(self, losses: dict[str, Any]) -> None:
        """Log an evaluation."""
        values = [float(loss) for loss in losses.values()]
        self._telemetry.event("eval", loss=values[0] if values else None)

    def on_checkpoint(self, iteration: int) -> None:
        """Put what has been learned beside the checkpoint."""
        self._take_in(self._noise.flush())
        if self._telemetry.leads:
            save_knowledge(self._known, self._args.save, iteration)
        self._telemetry.event("checkpoint", path=str(self._args.save))

    def _rate_share(self, learning_rate: float | None) -> float:
        """The scheduled learning rate as a share of its peak; 1 until the warm-up is over."""
        scheduler = self._job.scheduler
        if learning_rate is None or scheduler.num_steps <= scheduler.lr_warmup_steps or not scheduler.max_lr:
            return 1.0
        return min(1.0, learning_rate / float(scheduler.max_lr))

    def _take_in(self, steps: list[MeasuredStep]) -> None:
        """Record steps that have been measured, and verdicts on the last switch that they complete."""
        if not steps:
            return
        tracker = self._known.noise
        for step in steps:
            tracker = tracker.update(step)
            if verdict := tracker.verdict():
                self._telemetry.switch_check(verdict, self._job.plan)
        self._telemetry.noise_scale(tracker.estimate(), self._noise.estimator, steps)

    def _take_in_memory(self) -> None:
        """Record what the plan takes of a device on its fullest rank, where devices tell. Collective over all ranks."""
        peak = peak_memory()
        if peak is None:
            return
        peak, plan, memory = largest(peak), self._job.plan, self._known.memory
        if peak > _NOTEWORTHY * dict(memory.peaks).get(plan, 0.0):
            self._telemetry.memory(plan, peak, memory.expected(plan))

    def _decision_is_due(self, iteration: int) -> bool:
        samples = self._args.consumed_train_samples
        if steps_until(self._args, self._args.train_samples) == 0:
            return False
        change = self._config.policy.next_change(samples - self._args.global_batch_size)
        return (change is not None and change <= samples) or iteration % self._config.interval == 0

    def _decide(self, iteration: int) -> None:
        self._take_in(self._noise.flush())
        self._take_in_memory()
        told: list[Any] = [None] * 4
        lead = dist.get_world_size() - 1
        if dist.get_rank() == lead:
            told = self._decision()
        dist.broadcast_object_list(told, src=lead)
        fields, self.wanted, upcoming, self.probe = told
        self._telemetry.decision(fields)
        self._host.follow_noise()  # before a switch, too: a checkpoint of this step has the rates of its state
        if self.wanted is not None or self.probe is not None:
            self._args.train_iters = iteration  # train() stops after this step's evaluation and checkpoint
        elif upcoming is not None:
            self._host.prepare(upcoming)

    def _decision(self) -> list[Any]:
        """The decision's event; the plan to switch to now, the one to be ready for, and the branch to make."""
        known, args = self._known, self._args
        situation = known.situation(args.curr_iteration, args.consumed_train_samples, args.train_samples)
        decision, refused = decide(self._config.policy, situation, self._host.refusal_of)
        noise = math.nan if situation.noise is None else situation.noise.value
        fields = {
            **decision.to_json(),
            "refused": [[plan.to_json(), why] for plan, why in refused.items()],
            "rate_noise_scale": noise if math.isfinite(noise) and noise > 0 else known.rate_noise_scale,
            "c": known.critical_ratio.interval(situation.consumed_samples),
        }
        upcoming = decision.upcoming
        ready = None if upcoming is None or self._host.refusal_of(upcoming) else upcoming
        return [fields, decision.chosen if decision.is_switch else None, ready, decision.probe]


def _meter_of(job: Job, config: CopusConfig) -> NoiseMeter:
    """What measures the steps of ``job``; nothing where its plan does not let them be measured."""
    if why_unmeasurable_in_a_run(StepShape.of(job.plan), config.noise_estimator):
        return NoMeter()
    collector = partial(GradientNoise.of_job, job, inner_products=config.policy.needs_inner_products)
    return GradientMeter(collector, config.noise_estimator, job.args.optimizer, job.args.seq_length)
