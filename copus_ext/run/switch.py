"""Moving the running job from one plan to another, in two phases: prepare, on all ranks or on none; then move."""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
from megatron.training.global_vars import set_args

from copus_ext.adapters.agreement import first_failure
from copus_ext.adapters.arguments import arguments_for, first_line
from copus_ext.adapters.carry import RngState, carry_scheduler, recount_steps, tell_where_it_stands
from copus_ext.adapters.job import Job, build_job
from copus_ext.adapters.job_memory import gradients
from copus_ext.adapters.layouts import LayoutGroups
from copus_ext.adapters.phases import Phases
from copus_ext.adapters.rehearsal import RanOut, RehearsalFailed, forget_frames, in_flight, rehearse
from copus_ext.adapters.reshard import MoveFailed, PlanCache, UnsupportedReshard, plan_reshard, reshard
from copus_ext.adapters.world import whole_world
from copus_ext.core.plan import Layout, Plan
from copus_ext.run.progress import carry_progress

_KEPT = 8
LEARNING_RATES = ("lr", "min_lr", "lr_warmup_init", "decoupled_lr", "decoupled_min_lr")


@dataclass
class SwitchReport:
    """How a switch went.

    ``seconds`` by phase, on this rank, add up to the whole. Bytes moved from rank to rank, and those that had to, are
    over all ranks. ``state_bytes`` and ``peak_extra_bytes`` are this rank's, as of :class:`ReshardReport`. ``exact``:
    every bit arrived, by checksums or compared; a switch where one did not is given up. ``rehearsed_bytes``: what a
    rehearsal took of the fullest rank's device; ``None`` where nothing was rehearsed, or devices do not tell.
    ``not_rehearsed``: why a rehearsal that was asked for came to nothing.
    """

    old: Plan
    new: Plan
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_moved: int = 0
    bytes_minimum: int = 0
    state_bytes: int = 0
    peak_extra_bytes: int = 0
    exact: bool = True
    rehearsed_bytes: int | None = None
    not_rehearsed: str = ""

    @property
    def total_s(self) -> float:
        """Seconds that training stood still."""
        return sum(self.seconds.values())


class SwitchFailed(RuntimeError):
    """The switch was given up. All ranks are back on the old plan, with nothing lost."""


class NoMemory(SwitchFailed):
    """It was, since a step of the plan was rehearsed and ran out of memory on some rank."""


@contextlib.contextmanager
def _without_collecting_garbage() -> Iterator[None]:
    """What is made in a switch is not garbage, and looking through all of it takes longer than the switch."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Switcher:
    """Takes a run's job from plan to plan. Jobs that were left stay, hollow, so that going back builds nothing.

    A plan may have fewer ranks than there are processes. Those that it leaves idle make the same calls as the others,
    in the same order, and wait in the next one for them, which torch lets them do for the time-out of the default
    group.
    """

    def __init__(self, raw: argparse.Namespace, layouts: LayoutGroups) -> None:
        """``raw``: upstream's arguments before validation. ``layouts``: the process groups of layouts used so far."""
        self._raw, self._layouts = raw, layouts
        self.plans = PlanCache()
        self._hollow: dict[Layout, Job] = {}  # the one left longest ago comes first
        self._not_ahead: set[Layout] = set()  # which could not be prepared ahead of a switch

    @_without_collecting_garbage()
    def switch(
        self, job: Job, plan: Plan, overrides: dict[str, Any], *, rehearsed: bool = False
    ) -> tuple[Job, SwitchReport]:
        """Go from the job's plan to ``plan``. Collective over all processes.

        Args:
            job: what trains now, between two steps.
            plan: where to go.
            overrides: further arguments for the new plan (learning rates, betas, padded vocabulary).
            rehearsed: see whether all ranks have the memory for a step of ``plan`` before it is settled that the job
                stays there (:func:`~copus_ext.adapters.rehearsal.rehearse`). The same on every rank. Where only batch
                sizes change, nothing is rehearsed that can't need more memory than before.

        Returns:
            The job to go on with, and how it went.

        Raises:
            NoMemory: a rank ran out of memory in the rehearsal; ``job`` is as it was.
            SwitchFailed: a rank could not prepare, or the state did not arrive as it left; ``job`` is as it was.
        """
        phases = Phases()
        report = SwitchReport(job.plan, plan, phases.seconds)
        with phases("prepare"):
            args = self._arguments(job, plan, overrides)
        if plan.layout == job.plan.layout:
            if rehearsed and _takes_more(plan, job):
                with phases("rehearse"):
                    _rehearse(job, plan, report)
            with phases("prepare"):
                before = job.args
                _change_batch(job, plan, args, before)
                recount_steps(job, before)
            return job, report
        rng = RngState.capture()
        with _return_if_it_fails(job, self._layouts, rng):
            with phases("prepare"):
                if plan.layout not in self._hollow:
                    gradients(job).empty()  # what is built next may take their place
                new = self._in_charge(plan, args, job.args)
            moved = reshard(job, new, plans=self.plans)
        for phase, seconds in moved.seconds.items():
            phases.add(phase, seconds)
        report.bytes_moved, report.bytes_minimum = moved.bytes_moved, moved.bytes_minimum
        report.state_bytes, report.peak_extra_bytes = moved.state_bytes, moved.peak_extra_bytes
        if rehearsed:
            with phases("rehearse"), self._moved_back_if_it_fails(job, new, rng):
                _rehearse(new, plan, report)
        with phases("release"):
            carry_scheduler(job, new)
            recount_steps(new, job.args)
            rng.restore_for(new, args.iteration)
            self._hollow.pop(plan.layout, None)
            self._keep(job)
        return new, report

    @_without_collecting_garbage()
    def prepare(self, job: Job, plan: Plan, overrides: dict[str, Any]) -> None:
        """Make ahead of time what a switch to ``plan`` takes: groups, a hollow job, the transfer plan.

        Collective over all processes.

        Between two steps of ``job``, which stays in charge. Arguments as of :meth:`switch`.

        Raises:
            SwitchFailed: it can't be made on some rank.
        """
        if plan.layout in (job.plan.layout, *self._not_ahead):
            return
        if plan.layout in self._hollow:
            with _return_if_it_fails(job, self._layouts, RngState.capture()):
                plan_reshard(job, self._hollow[plan.layout], self.plans)
            return
        self._not_ahead.add(plan.layout)  # memory may be too short now, and not when the old job's gradients are gone
        args, rng = self._arguments(job, plan, overrides), RngState.capture()
        with _return_if_it_fails(job, self._layouts, rng):
            new = self._in_charge(plan, args, job.args)
            plan_reshard(job, new, self.plans)
        self._not_ahead.discard(plan.layout)
        self._keep(new)
        put_in_charge(job, self._layouts)
        rng.restore()

    def _arguments(self, job: Job, plan: Plan, overrides: dict[str, Any]) -> argparse.Namespace:
        args = _agreed(lambda _: arguments_for(self._raw, plan, **overrides), f"the arguments of {plan}")
        tell_where_it_stands(job)
        carry_progress(job.args, args)
        return args

    def _in_charge(self, plan: Plan, args: argparse.Namespace, running: argparse.Namespace) -> Job:
        """A hollow job for ``plan``, in charge; ``running``: the arguments of the job that trains now."""
        kept = self._hollow.get(plan.layout)
        if kept is None:
            return _agreed(lambda vote: _built(plan, args, self._layouts, vote), f"the job of {plan}")
        self._layouts.activate(plan.layout, args)
        _change_batch(kept, plan, args, running)
        return kept

    @contextlib.contextmanager
    def _moved_back_if_it_fails(self, job: Job, new: Job, rng: RngState) -> Iterator[None]:
        """Where a rehearsal of ``new`` fails, which it does on all ranks alike, give ``job`` all of its state back.

        Raises:
            MoveFailed: it did not arrive. There is no job to go on with then, and the run has to end.
        """
        try:
            yield
        except NoMemory:
            gradients(new).empty()
            put_in_charge(job, self._layouts)
            reshard(new, job, plans=self.plans)
            rng.restore()
            self._keep(new)  # its layout may do with a smaller micro-batch
            raise

    def _keep(self, job: Job) -> None:
        self._hollow[job.plan.layout] = job
        if len(self._hollow) > _KEPT:
            self._hollow.pop(next(iter(self._hollow))).release()
            gc.collect()


@contextlib.contextmanager
def _return_if_it_fails(job: Job, layouts: LayoutGroups, rng: RngState) -> Iterator[None]:
    """Put the old job back in charge when the block fails, which it does on all ranks alike."""
    try:
        yield
    except (SwitchFailed, UnsupportedReshard, MoveFailed) as error:
        put_in_charge(job, layouts)
        rng.restore()
        forget_frames(error)
        gc.collect()
        gradients(job).fill()
        raise SwitchFailed(str(error)) from error


def _rehearse(job: Job, plan: Plan, report: SwitchReport) -> None:
    """Rehearse a step of ``plan``. Only memory decides: where a rank can't make one alone, that is noted and no more.

    Raises:
        NoMemory: on every rank, where one ran out.
    """
    try:
        report.rehearsed_bytes = rehearse(job, plan)
    except RanOut as failure:
        raise NoMemory(f"the rehearsal of {plan}: {failure}") from None
    except RehearsalFailed as failure:
        report.not_rehearsed = str(failure)


def _takes_more(plan: Plan, job: Job) -> bool:
    """Whether a step of ``plan`` may need more memory than one of the job's plan, in the same layout."""
    group, than = job.config.microbatch_group_size_per_vp_stage, job.plan
    return plan.micro_batch > than.micro_batch or in_flight(plan, group) > in_flight(than, group)


def _built(plan: Plan, args: argparse.Namespace, layouts: LayoutGroups, vote: Callable[[], None]) -> Job:
    """Groups, model and optimizer of the next plan, hollow.

    Models are where memory may run out, and are built by each rank for itself; what comes behind them is collective.
    """
    groups = layouts.activate(plan.layout, args)
    set_micro_batches(args)
    iteration, flops = args.iteration, args.num_floating_point_operations_so_far
    new = build_job(plan, args, groups, when_models_are_built=vote, initialise_weights=False)
    args.iteration, args.num_floating_point_operations_so_far = iteration, flops  # building sets them to 0
    return new


def _change_batch(job: Job, plan: Plan, args: argparse.Namespace, running: argparse.Namespace) -> None:
    """Other batch sizes, or another time, on the same layout: nothing is built, only what counts batches is told."""
    # Upstream works it out when it builds a scheduler, and would build one in steps where it is there before.
    args.train_iters = running.train_iters
    tell_optimizer(job, args)
    job.plan, job.args = plan, args
    set_args(args)
    set_micro_batches(args)


def change_rates(job: Job, overrides: Mapping[str, Any]) -> None:
    """Give ``job`` other learning rates, and leave its plan: between two steps, also within ``train()``.

    Upstream's ``train()`` holds on to the arguments and counts in them, so they stay the same object, and what is no
    learning rate among ``overrides`` is let be. Not collective: all ranks have to be given the same.
    """
    rates = {name: overrides[name] for name in LEARNING_RATES if name in overrides}
    args = copy.copy(job.args)
    vars(args).update(rates)
    tell_optimizer(job, args)
    vars(job.args).update(rates)


def tell_optimizer(job: Job, args: argparse.Namespace) -> None:
    """Learning rates, their bounds and Adam's betas of ``args`` for a job that has those of ``job.args``."""
    for group in job.optimizer.param_groups:
        group["max_lr"] = _rate_under(args, job.args, group["max_lr"], "lr", "decoupled_lr")
        group["min_lr"] = _rate_under(args, job.args, group["min_lr"], "min_lr", "decoupled_min_lr")
        if args.optimizer == "adam":  # others have betas of another meaning, from other flags
            group["betas"] = (args.adam_beta1, args.adam_beta2)
    scheduler = job.scheduler
    scheduler.init_lr, scheduler.max_lr, scheduler.min_lr = args.lr_warmup_init, args.lr, args.min_lr
    scheduler.step(0)


def _rate_under(new: argparse.Namespace, old: argparse.Namespace, rate: float, *names: str) -> float:
    """What a bound of a parameter group's learning rate is under ``new``, to the last bit.

    Upstream finds the groups of a checkpoint again by comparing these numbers, so they must be those that a job built
    under ``new`` has. Groups with rates of their own (upstream's muP) are scaled.
    """
    for name in names:
        if rate == getattr(old, name):
            return float(getattr(new, name))
    return rate * new.lr / old.lr if old.lr else rate


def put_in_charge(job: Job, layouts: LayoutGroups) -> None:
    """Make ``job`` the one that upstream's globals speak of: groups, arguments, micro-batches."""
    layouts.activate(job.plan.layout, job.args)
    set_args(job.args)
    set_micro_batches(job.args)


def set_micro_batches(args: argparse.Namespace) -> None:
    """Tell upstream's calculator how many micro-batches a step has under ``args``."""
    reconfigure_num_microbatches_calculator(
        rank=args.rank,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
        decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
    )


class _PeerFailed(Exception):
    """Another rank failed; the argument says how."""


def _agreed[Result](step: Callable[[Callable[[], None]], Result], what: str) -> Result:
    """Do ``step`` on every rank, and fail on every rank if it fails on one, everywhere with the same reason.

    ``step`` is given a function to call before anything collective: it returns when all ranks have come as far, and
    ends the step on the others where one failed on its way there.
    """

    def vote() -> None:
        if failure := first_failure(None):
            raise _PeerFailed(failure)

    try:
        result = step(vote)
        vote()
    except _PeerFailed as failure:
        raise SwitchFailed(f"{what}: {failure}") from None
    except Exception as error:  # whatever it is: the others wait for this rank
        failure_here = first_failure(f"rank {whole_world().rank()}: {first_line(error)}")
        raise SwitchFailed(f"{what}: {failure_here}") from error
    return result
