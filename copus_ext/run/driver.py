"""An adaptive run: segments of upstream's ``train()``, each under one plan, with switches between them."""

from __future__ import annotations

import argparse
import gc
import math
import os
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from megatron.training import get_timers, training
from megatron.training.global_vars import set_global_variables

from copus_ext.adapters.agreement import largest
from copus_ext.adapters.arguments import arguments_for, first_line, model_shape, run_options
from copus_ext.adapters.job import build_job
from copus_ext.adapters.layouts import LayoutGroups
from copus_ext.adapters.tokenizer import make_tokenizer
from copus_ext.core.cost.candidates import Candidates, infeasible_reason
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import FUSED
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.cost.throughput_table import Subject
from copus_ext.core.errors import UserError
from copus_ext.core.plan import Plan
from copus_ext.core.planner.betas import beta_at_batch
from copus_ext.core.planner.knowledge import Knowledge
from copus_ext.core.planner.learning_rate import ADASCALE, learning_rate_factor
from copus_ext.core.planner.space import tensor_sizes
from copus_ext.core.report.page import report_run
from copus_ext.run import gpt
from copus_ext.run.config import ALWAYS, NEVER, TABLE_FLAG, CopusConfig
from copus_ext.run.controller import Controller
from copus_ext.run.data import Data
from copus_ext.run.hardware import describe_hardware
from copus_ext.run.host import Iterators
from copus_ext.run.knowledge import carried_on, first_knowledge, load_knowledge
from copus_ext.run.probe import make_probe
from copus_ext.run.progress import steps_beyond, steps_until
from copus_ext.run.supported import why_not_under
from copus_ext.run.switch import LEARNING_RATES, NoMemory, Switcher, SwitchFailed, change_rates
from copus_ext.run.telemetry import Telemetry, quiet
from megatron.patches.training_hooks import observing

_NOTICED_S = 0.01  # what is ready already takes less, and is no event
_ROOMY = 0.5  # of a device's memory: a plan predicted to take no more is not rehearsed
_TIMED_OPTIONS = (  # what step times depend on beside plan, model and device; by argument name
    "optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "grad_reduce_in_bf16",
    "tp_comm_overlap",
    "fp8",
)


class Driver:
    """One run on this rank. Building and running it is collective over all ranks.

    ``chooses``: it is there to choose among the plans of ``--copus-space``.
    """

    chooses: bool = True

    def __init__(self, raw: argparse.Namespace, config: CopusConfig) -> None:
        """Bring upstream up for the first plan, or for the plan of the checkpoint that ``--load`` names.

        Args:
            raw: upstream's arguments before validation.
            config: the checked ``--copus-*`` flags.
        """
        self.raw, self.config = raw, config
        saved = None if raw.finetune else load_knowledge(raw.load, raw.ckpt_step)  # fine-tuning begins its own run
        plan = saved.plan if saved else config.first_plan
        _check_ranks(plan, raw)
        self.layouts = LayoutGroups()  # before upstream makes any group
        self.switcher = Switcher(raw, self.layouts)
        self._can_rehearse, self._trained = True, False
        self.in_branch: dict[str, Any] = {}  # what of the arguments is other while a branch is trained
        raw.padded_vocab_size = self._padded_vocabulary()
        self._check_schedule()
        # A checkpoint is found to fit only with the learning rates that it was made with, to the last bit.
        rates_by = saved.rate_noise_scale if saved else math.inf
        args = arguments_for(raw, plan, announce=True, **self._overrides(plan, rates_by))
        candidates = self._candidates(model_shape(args))
        set_global_variables(args)
        training.initialize_megatron()
        training.set_jit_fusion_options(tp_size=args.tensor_model_parallel_size)
        # What lives by now lives for ever. Collecting garbage after a switch need not look at it: 3 ms instead of 400.
        gc.collect()
        gc.freeze()
        self.job = build_job(plan, args, self.layouts.adopt(plan.layout))
        args.curr_iteration = args.iteration  # upstream sets it in its loop only
        known = self._first_knowledge(args, candidates, saved)
        possible = (*known.candidates, *config.named_plans, config.base)
        self.data = Data(min(plan.global_batch for plan in possible))
        leads = args.rank == args.world_size - 1
        self.telemetry = Telemetry(config.directory, leads, args.iteration or None, known)
        if tight := known.memory.objections(Candidates((plan,))).get(plan):
            self.telemetry.say(f"the first plan, {plan}, {tight}: it may run out of memory")

    @property
    def knowledge(self) -> Knowledge:
        """What is known by now: it moves on with every event."""
        assert self.telemetry.knowledge is not None
        return self.telemetry.knowledge

    # -- set-up

    def _padded_vocabulary(self) -> int:
        """One padded vocabulary for all layouts, or weights would not fit from one to another."""
        if self.raw.padded_vocab_size is not None:
            return int(self.raw.padded_vocab_size)
        probe = argparse.Namespace(**{**vars(self.raw), "pad_vocab_size": False})
        size = make_tokenizer(probe).vocab_size
        multiple = self.raw.make_vocab_size_divisible_by * math.lcm(*self._tensor_parallel_sizes())
        return math.ceil(size / multiple) * multiple

    def _check_schedule(self) -> None:
        """Every plan that is scheduled must be one that the model and upstream allow, now and not when it is due."""
        for plan in self.config.named_plans:
            if refusal := self.refusal_of(plan):
                settings = self.config.settings
                flag = f"--copus-policy {settings.name}" if settings.schedule is None else "--copus-schedule"
                whose = "the flags" if plan == self.config.base else flag
                raise UserError(f"{whose}: plan {plan} cannot be: {refusal}")

    def _tensor_parallel_sizes(self) -> list[int]:
        if not self.config.policy.searches:
            return [plan.layout.tp for plan in self.config.named_plans]
        return tensor_sizes(self.config.space, self.config.base, self.raw.num_attention_heads)

    def _overrides(self, plan: Plan, noise_scale: float | None = None) -> dict[str, Any]:
        """Arguments that follow from the plan but are no part of it: learning rates and betas for its global batch.

        ``noise_scale``: in sequences, that learning rates are by (default: as the run knows it).
        """
        batch, base, rule = plan.global_batch, self.config.base.global_batch, self.config.lr_rule
        scale = self.knowledge.rate_noise_scale if noise_scale is None else noise_scale
        factor = learning_rate_factor(rule, batch, base, scale, self.raw.optimizer)
        betas = {
            name: beta_at_batch(self.config.beta_rule, getattr(self.raw, name), batch, base)
            for name in ("adam_beta1", "adam_beta2")
        }
        rates = {name: getattr(self.raw, name) for name in LEARNING_RATES}
        scaled = {name: rate * factor for name, rate in rates.items() if rate is not None}
        # Evaluation reads the same batches whatever the plan; a batch that every layout can share among its ranks.
        ranks = self.config.base.layout.world_size
        together = self.raw.eval_global_batch_size or math.ceil(base / ranks) * ranks
        return {**scaled, **betas, "eval_global_batch_size": together, **self.in_branch}

    def _candidates(self, model: ModelShape) -> Candidates:
        """What there is to choose from. Raises :class:`UserError` where a run that chooses has only one plan."""
        space, base = self.config.space, self.config.base
        if not self.config.policy.searches:
            return Candidates(())
        return space.candidates(base, model) if self.chooses else space.plans(base, model).with_first(base)

    def _first_knowledge(self, args: argparse.Namespace, candidates: Candidates, saved: Knowledge | None) -> Knowledge:
        hardware = describe_hardware(self.raw)
        known = first_knowledge(self.raw, args, self.config, self.job.plan, candidates, hardware)
        if saved is not None:
            known = carried_on(known, saved, hardware_is_named=self.raw.copus_hardware is not None)
        return replace(known, throughput=self._seeded(known.throughput, args))

    def _seeded(self, throughput: ThroughputModel, args: argparse.Namespace) -> ThroughputModel:
        """With step times of a table known from the start. What a checkpoint knows of a plan counts for more."""
        table = self.config.throughput_table
        if table is None:
            return throughput
        table.check(measured_subject(self.raw, args), f"{TABLE_FLAG} {self.raw.copus_throughput_table}")
        return table.seed(throughput, throughput.seen.steps)

    def refusal_of(self, plan: Plan) -> str | None:
        """Why a plan is refused by the model's sizes, upstream's own validation or ours; ``None`` where it is not."""
        try:
            with quiet():
                args = arguments_for(self.raw, plan, **self._overrides(plan, math.inf))  # rates refuse no plan
            return infeasible_reason(plan, model_shape(args)) or why_not_under(args)
        except (AssertionError, ValueError, RuntimeError) as error:
            return first_line(error)

    # -- running

    def run(self) -> None:
        """Train to the end of ``--train-samples``, evaluate, save, and report."""
        self.log_start()
        status = "failed"
        try:
            self._train()
            status = "finished"
        except SystemExit as stop:  # upstream's way to end at --exit-interval, --exit-duration-in-mins or a signal
            status = "stopped" if not stop.code else "failed"
            raise
        finally:
            self.telemetry.event("run_end", status=status)
            self.telemetry.close()
        self._report()

    def log_start(self) -> None:
        """The first event of an attempt: all that deciding again from the log takes."""
        args, known, config = self.job.args, self.knowledge, self.config
        self.telemetry.event(
            "run_start",
            world_size=args.world_size,
            plan=str(self.job.plan),
            base=config.base.to_json(),
            policy=config.settings.name,
            settings=config.settings.to_json(),
            space=self.raw.copus_space,
            searches=config.policy.searches,
            noise_estimator=config.noise_estimator,
            train_samples=args.train_samples,
            model=asdict(model_shape(args)),
            hardware=asdict(known.throughput.hardware),
            candidates=[str(plan) for plan in known.candidates],
            directory=str(config.directory),
            knowledge=known.to_json(),
        )

    def _train(self) -> None:
        iterators = self.iterators()
        due = self.config.policy.plan_at(self.job.args.consumed_train_samples)
        if due not in (None, self.job.plan):  # a checkpoint was made just before a scheduled change
            iterators = self.switch(due) or iterators
        while steps_until(self.job.args, self.job.args.train_samples):
            ended = self.segment(iterators)
            if ended.wanted is not None:
                iterators = self.switch(ended.wanted) or iterators
            elif ended.probe is not None:
                iterators = make_probe(self, ended.probe)
        with observing(self._controller(continues_a_run=True, deciding=False)):
            self._finish(iterators, save=self._trained)
        if self.job.args.do_test:  # by itself: it is no validation loss, and the log has one kind of evaluation
            self._evaluate("test", iterators[2])
        training.maybe_finalize_async_save(blocking=True, terminate=True)

    def iterators(self) -> Iterators:
        """What the job reads from here on: training, validation and test."""
        with quiet():
            return self.data.iterators(len(self.job.model))

    def segment(self, iterators: Iterators, until: int | None = None, deciding: bool = True) -> Controller:
        """Train under the present plan until it should change, or ``until`` samples are consumed (default: to the end).

        Returns:
            Who watched it, and knows what is wanted next.
        """
        job, args = self.job, self.job.args
        change = self.config.policy.next_change(args.consumed_train_samples)
        steps = steps_until(args, args.train_samples if until is None else until)
        # A schedule's changes fall on whole steps, unless an earlier one was given up and other batches are in force.
        args.train_iters = args.iteration + (steps if change is None else min(steps, steps_beyond(args, change)))
        job.ready()
        controller = self._controller(continues_a_run=self._trained, deciding=deciding)
        if self._trained:  # train() starts this timer and leaves it running
            timer = get_timers()("interval-time")
            timer.stop()
            timer.reset()
        self._trained = True
        with controller, observing(controller):
            args.iteration, args.num_floating_point_operations_so_far = training.train(
                gpt.forward_step,
                job.model,
                job.optimizer,
                job.scheduler,
                iterators[0],
                iterators[1],
                None,
                job.config,
                {},
                None,
            )
        return controller

    def switch(self, plan: Plan) -> Iterators | None:
        """Move to ``plan``; the iterators to read on with, or ``None`` where the job stays as it is after a fault."""
        old, parts = self.job.plan, plan.to_json()
        try:
            with quiet():
                rehearsed = self._is_rehearsed(plan)
                self.job, report = self.switcher.switch(self.job, plan, self._overrides(plan), rehearsed=rehearsed)
        except SwitchFailed as fault:
            kind = "memory" if isinstance(fault, NoMemory) else "switch"
            self.telemetry.event("fault", kind=kind, message=str(fault), plan=str(plan), parts=parts)
            self.telemetry.say(f"{fault}; training goes on with {old}")
            return None
        start = time.perf_counter()
        iterators = self.iterators()
        report.seconds["data"] = time.perf_counter() - start
        self.telemetry.switch(report)
        if report.not_rehearsed:
            self._can_rehearse = False  # and would not next time
            self.telemetry.event("fault", kind="rehearse", message=report.not_rehearsed, plan=str(plan), parts=parts)
        if report.rehearsed_bytes is not None:
            self.telemetry.memory(plan, report.rehearsed_bytes, self.knowledge.memory.expected(plan))
        return iterators

    def _is_rehearsed(self, plan: Plan) -> bool:
        """Whether a switch to ``plan`` is kept only if each rank can make a step by itself. Collective over all ranks.

        By default where devices tell what they take, it is not known of the plan, and it may be much.
        """
        memory = self.knowledge.memory
        unknown = self._can_rehearse and plan not in dict(memory.peaks)  # the same on every rank, as the flag is
        if self.config.rehearse == NEVER or not unknown:
            return False
        if self.config.rehearse == ALWAYS or not torch.cuda.is_available():
            return self.config.rehearse == ALWAYS
        tight = memory.expected(plan) > _ROOMY * memory.capacity
        return bool(largest(int(tight)))  # ranks may be on unlike devices

    def prepare(self, plan: Plan) -> None:
        """Have a switch to ``plan`` ready; where that fails, the switch itself has to do all of it."""
        start = time.perf_counter()
        try:
            with quiet():
                self.switcher.prepare(self.job, plan, self._overrides(plan))
            if (seconds := time.perf_counter() - start) > _NOTICED_S:
                self.telemetry.event("prepare", plan=str(plan), seconds=seconds)
        except SwitchFailed as fault:
            self.telemetry.event("fault", kind="prepare", message=str(fault), plan=str(plan), parts=plan.to_json())

    def follow_noise(self) -> None:
        """Let the learning rates be what they are by the noise scale as it is known now, where their rule asks it."""
        if self.config.lr_rule == ADASCALE:
            change_rates(self.job, self._overrides(self.job.plan))

    def _finish(self, iterators: tuple[Any, Any, Any], save: bool) -> None:
        """What upstream's ``pretrain()`` does behind its training loop; ``save``: there is something new to save."""
        job, args = self.job, self.job.args
        if save and args.save and args.iteration % (args.save_interval or args.iteration + 1):
            flops = args.num_floating_point_operations_so_far
            training.save_checkpoint_and_time(args.iteration, job.model, job.optimizer, job.scheduler, flops, {})
        if args.do_valid:
            self._evaluate("validation", iterators[1])

    def _evaluate(self, name: str, iterator: Any) -> None:
        job, iteration = self.job, self.job.args.iteration
        prefix = f"iteration {iteration} on {name} set"
        training.evaluate_and_print_results(
            prefix, gpt.forward_step, iterator, job.model, iteration, None, job.config, verbose=False
        )

    def _controller(self, continues_a_run: bool, deciding: bool) -> Controller:
        return Controller(self, continues_a_run=continues_a_run, deciding=deciding)

    def _report(self) -> None:
        if self.telemetry.leads:
            print(report_run(self.config.directory), flush=True)


def measured_subject(raw: argparse.Namespace, args: argparse.Namespace) -> Subject:
    """What step times of this job are times of; ``args`` are validated, of any plan, and ``raw`` of none."""
    cores = len(os.sched_getaffinity(0))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU with {cores} cores"
    given = [(name, getattr(raw, name, None)) for name in _TIMED_OPTIONS]
    words = [name if value is True else f"{name}={value}" for name, value in given if value]
    options = run_options(raw)
    words += [f"no_{name}" for name in FUSED if not getattr(options, name)]
    per_node = os.environ.get("LOCAL_WORLD_SIZE", args.world_size)
    return Subject(model_shape(args), args.world_size, f"{per_node} ranks a node, {device}", " ".join(words))


def _check_ranks(plan: Plan, raw: argparse.Namespace) -> None:
    """A run goes on with as many ranks as it was saved with."""
    if plan.layout.world_size != raw.world_size:
        raise UserError(
            f"--load {raw.load}: the run was saved under {plan}, on {plan.layout.world_size} ranks, and there are "
            f"{raw.world_size}; start as many, or use --no-copus to load it in the layout of the flags"
        )
