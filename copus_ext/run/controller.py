"""Between the training loop and the policy: learns from every step, asks the policy, and has all ranks agree."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist

from copus_ext.adapters.agreement import largest
from copus_ext.adapters.job import Job
from copus_ext.adapters.measure import forget_peak_memory, peak_memory
from copus_ext.adapters.noise.gradient_noise import GradientNoise
from copus_ext.core.decision import Decision, Situation
from copus_ext.core.grouping import StepShape, why_unmeasurable_in_a_run
from copus_ext.core.noise_scale import NoiseEstimate
from copus_ext.core.noise_tracker import MeasuredStep
from copus_ext.core.plan import Plan
from copus_ext.run.config import CopusConfig
from copus_ext.run.knowledge import Knowledge
from copus_ext.run.noise_meter import GradientMeter, NoiseMeter, NoMeter
from copus_ext.run.progress import steps_until
from copus_ext.run.telemetry import Telemetry
from megatron.patches.training_hooks import Observer, StepResult

_NOTEWORTHY = 1.01  # growth of a plan's peak memory that is worth an event
_UNSETTLED_STEPS = 2  # after a switch: their times say more about caches than about the plan


class Controller(Observer):
    """Watches one job. ``wanted`` is the plan to switch to; once it is set, ``train()`` is told to end.

    Only the leading rank decides, as only it has the losses and one clock must judge; the others are told.
    """

    def __init__(
        self,
        job: Job,
        config: CopusConfig,
        knowledge: Knowledge,
        telemetry: Telemetry,
        refusal_of: Callable[[Plan], str | None],
        prepare: Callable[[Plan], None],
        follow_noise: Callable[[], None],
        continues_a_run: bool,
    ) -> None:
        """``refusal_of``: why upstream can't run a plan. ``prepare``: have a switch to a plan ready; collective.

        ``follow_noise``: let learning rates be what they are by the noise scale that has become known.
        """
        self.continues_a_run = continues_a_run
        self.wanted: Plan | None = None
        self._job, self._config, self._knowledge, self._telemetry = job, config, knowledge, telemetry
        self._refusal_of, self._prepare, self._follow_noise = refusal_of, prepare, follow_noise
        self._steps = 0
        self._noise: NoiseMeter = NoMeter()

    def __enter__(self) -> Controller:
        forget_peak_memory()
        self._noise = _meter_of(self._job, self._config.noise_estimator)
        self._noise.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:  # else other ranks may not come to the same point
            self._take_in(self._noise.flush())
        self._noise.__exit__()

    @property
    def _args(self) -> argparse.Namespace:
        return self._job.args

    def on_step(self, step: StepResult) -> None:
        """Learn from the step, and decide where one is due."""
        self._args.curr_iteration = step.iteration
        self._steps += 1
        self._telemetry.step(step, self._job.plan, self._args.seq_length)
        self._learn(step)
        if self._decision_is_due(step.iteration):
            self._decide(step.iteration)

    def on_eval(self, losses: dict[str, Any]) -> None:
        """Log an evaluation."""
        values = [float(loss) for loss in losses.values()]
        self._telemetry.event("eval", loss=values[0] if values else None)

    def on_checkpoint(self, iteration: int) -> None:
        """Put what has been learned beside the checkpoint."""
        self._take_in(self._noise.flush())
        if self._telemetry.leads:
            self._knowledge.save(self._args.save, iteration, self._job.plan)
        self._telemetry.event("checkpoint", path=str(self._args.save))

    def _learn(self, step: StepResult) -> None:
        self._take_in(self._noise.step(step.iteration, step.grad_norm, step.learning_rate))
        if self._steps > _UNSETTLED_STEPS:
            self._knowledge.throughput = self._knowledge.throughput.observe(self._job.plan, step.step_time_s)

    def _take_in(self, steps: list[MeasuredStep]) -> None:
        """Update the noise scale by steps that have been measured."""
        for step in steps:
            self._knowledge.noise = self._knowledge.noise.update(step)
            if verdict := self._knowledge.noise.verdict():
                self._telemetry.switch_check(verdict, self._job.plan)
        if steps:
            self._telemetry.noise_scale(self._knowledge.noise.estimate(), self._noise.estimator, steps)

    def _take_in_memory(self) -> None:
        """Learn what the plan takes of a device on its fullest rank, where devices tell. Collective over all ranks."""
        peak = peak_memory()
        if peak is None:
            return
        peak, plan = largest(peak), self._job.plan
        before = dict(self._knowledge.memory.peaks).get(plan, 0.0)
        expected = self._knowledge.learn_memory(plan, peak)
        if peak > _NOTEWORTHY * before:
            self._telemetry.memory(plan, peak, expected)

    def _decision_is_due(self, iteration: int) -> bool:
        samples = self._args.consumed_train_samples
        if steps_until(self._args, self._args.train_samples) == 0:
            return False
        change = self._config.policy.next_change(samples - self._args.global_batch_size)
        return (change is not None and change <= samples) or iteration % self._config.interval == 0

    def _decide(self, iteration: int) -> None:
        self._take_in(self._noise.flush())
        self._take_in_memory()
        chosen: list[Plan | None] = [None, None]  # to switch to now; to be ready for
        scale = self._knowledge.rate_noise_scale
        lead = dist.get_world_size() - 1
        if dist.get_rank() == lead:
            situation = self._situation()
            decision = self._decision(situation)
            self._telemetry.decision(decision, situation.noise)
            chosen = [decision.chosen if decision.is_switch else None, self._allowed(decision.upcoming)]
            scale = _known(situation.noise, scale)
        told: list[Any] = [*chosen, scale]
        dist.broadcast_object_list(told, src=lead)
        wanted, upcoming, self._knowledge.rate_noise_scale = told
        self._follow_noise()  # before a switch, too: the rates in a checkpoint of this step must be those of its state
        if wanted is not None:
            self.wanted = wanted
            self._args.train_iters = iteration  # train() stops after this step's evaluation and checkpoint
        elif upcoming is not None:
            self._prepare(upcoming)

    def _decision(self, situation: Situation) -> Decision:
        """Ask the policy, until what it wants is not refused by upstream's validation."""
        decision = self._config.policy.decide(situation)
        while decision.is_switch and decision.chosen not in situation.rejected:
            refusal = self._refusal_of(decision.chosen)
            if refusal is None:
                return decision
            self._knowledge.rejected[decision.chosen] = refusal
            situation = replace(situation, rejected=self._knowledge.objections())
            decision = self._config.policy.decide(situation)
        if not decision.is_switch:
            return decision
        reason = f"stay: {decision.chosen} was refused before: {situation.rejected[decision.chosen]}"
        return replace(decision, chosen=decision.current, reason=reason)

    def _allowed(self, plan: Plan | None) -> Plan | None:
        return None if plan is None or self._refusal_of(plan) else plan

    def _situation(self) -> Situation:
        known = self._knowledge
        return Situation(
            iteration=self._args.curr_iteration,
            consumed_samples=self._args.consumed_train_samples,
            train_samples=self._args.train_samples,
            current=self._job.plan,
            steps_since_switch=self._steps,
            noise=known.noise.estimate(),
            throughput=known.throughput,
            switch_cost=known.switch_cost,
            candidates=known.candidates,
            rejected=known.objections(),
        )


def _known(noise: NoiseEstimate | None, otherwise: float) -> float:
    """The noise scale where it is one that learning rates can be by."""
    value = math.nan if noise is None else noise.value
    return value if math.isfinite(value) and value > 0 else otherwise


def _meter_of(job: Job, estimator: str) -> NoiseMeter:
    """What measures the steps of ``job``; nothing where its plan does not let them be measured."""
    if why_unmeasurable_in_a_run(StepShape.of(job.plan), estimator):
        return NoMeter()
    return GradientMeter(partial(GradientNoise.of_job, job), estimator, job.args.optimizer, job.args.seq_length)
