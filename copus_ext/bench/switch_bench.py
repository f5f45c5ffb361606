"""Jobs of several models with several optimizers in one process group, to be taken from layout to layout."""

from __future__ import annotations

import argparse
import copy
import gc

from copus_ext.adapters.job import Job, build_job
from copus_ext.adapters.layouts import LayoutGroups
from copus_ext.bench.switch_setting import REFERENCE, TRAINING, VOCABULARY, Walk, base_plan
from copus_ext.bench.workbench import Workbench
from copus_ext.core.plan import Plan
from copus_ext.run.switch import put_in_charge


class SwitchBench(Workbench):
    """Upstream, brought up once for every walk. Making one is collective over all ranks."""

    def __init__(self, ranks: int) -> None:
        super().__init__((REFERENCE.flags + TRAINING).split(), base_plan(ranks))
        self._pristine = copy.deepcopy(self.raw)
        gc.collect()
        gc.freeze()  # as a run does before its first job: collecting garbage in a switch then takes 3 ms and not 400

    def begin(self, walk: Walk) -> None:
        """Jobs that are built from now on are of this model with this optimizer."""
        self.raw = copy.deepcopy(self._pristine)
        vars(self.raw).update({**walk.model.attributes, **walk.kind.attributes, "padded_vocab_size": VOCABULARY})

    @property
    def layouts(self) -> LayoutGroups:
        """The process groups of the layouts that were used."""
        return self._layouts

    def take_charge(self, job: Job) -> None:
        """Make ``job`` the one that upstream's globals speak of."""
        put_in_charge(job, self._layouts)

    def build(self, plan: Plan, args: argparse.Namespace) -> Job:
        """A job of upstream's validated ``args``, which may name a checkpoint to load; in charge."""
        job = build_job(plan, args, self._layouts.activate(plan.layout, args))
        self.take_charge(job)
        return job

    def advance(self, job: Job) -> None:
        """One step of training, counted as upstream's ``train()`` counts it."""
        args = job.args
        first = args.consumed_train_samples
        self.step(job, range(first, first + job.plan.global_batch))
        args.iteration += 1
        args.consumed_train_samples += job.plan.global_batch
