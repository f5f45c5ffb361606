"""Branches of a running job: from one snapshot, the same samples under another plan, judged by the same sequences."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.training import get_signal_handler, training

from copus_ext.adapters.agreement import largest
from copus_ext.adapters.snapshot import Snapshot
from copus_ext.core.errors import UserError
from copus_ext.core.noise.noise_tracker import NoiseTracker
from copus_ext.core.plan import Plan
from copus_ext.run import gpt
from copus_ext.run.host import Host, Iterators
from copus_ext.run.progress import NEVER, steps_until
from copus_ext.run.switch import put_in_charge
from copus_ext.run.telemetry import Telemetry, quiet

Progress = Callable[[int, list[float]], None]  # sequences since the start, [blocks] losses

_STEPS_BETWEEN_LOOKS = 4  # at whether the run has to end, while it is in a branch
_NOT_IN_A_BRANCH: dict[str, Any] = {  # of upstream's arguments: what is thrown away leaves nothing behind
    "save": None,
    "save_interval": None,
    "eval_interval": NEVER,
    "exit_interval": None,
    "exit_duration_in_mins": None,
    "exit_signal_handler": False,
    "log_interval": NEVER,
    "tensorboard_log_interval": NEVER,
}


class BranchFailed(RuntimeError):
    """A branch could not be begun; the job is as it was."""


class BranchStopped(RuntimeError):
    """The run was asked to end, by a signal or its time limit; it will, once it has been taken back."""


class BranchTelemetry(Telemetry):
    """Logs a branch, and leaves the terminal and the curves of the run alone."""

    def say(self, text: str) -> None:
        """Nothing."""

    def _scalars(self, values: dict[str, float]) -> None:
        """Nothing: the run's own curves go on behind the branch."""


class Branches:
    """Trains and evaluates branches of a run's job. All methods are collective over all ranks."""

    def __init__(self, host: Host, blocks: int) -> None:
        """``blocks``: of validation sequences, an evaluation's global batch each, the same at every evaluation.

        Raises:
            UserError: there are no validation data.
        """
        self._host, self._blocks = host, blocks
        self._ends_by: _Ending | None = None  # inside of a branch that leaves nothing behind
        self.evaluated_s = 0.0  # seconds that evaluations took
        self._validation = self._validation_batches(host.iterators()[1])

    def _validation_batches(self, iterators: Any) -> list[list[Any]]:
        """This rank's validation micro-batches, for each model chunk, to be read again at every evaluation."""
        args = self._host.job.args
        if iterators is None or (isinstance(iterators, list) and None in iterators):
            raise UserError("there is no validation data to compare branches by; give --valid-data-path, or --split")
        per_block = args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)
        chunks = iterators if isinstance(iterators, list) else [iterators]
        try:
            return [[next(iterator) for _ in range(self._blocks * per_block)] for iterator in chunks]
        except StopIteration:
            few = f"there are too few validation data for {self._blocks} blocks to compare branches by"
            raise UserError(f"{few}; give more, by --split or --eval-iters") from None

    def losses(self) -> list[float]:
        """[blocks] losses on the validation sequences, always the same; ``nan`` on ranks without the last stage."""
        start, job, args = time.perf_counter(), self._host.job, self._host.job.args
        _take_hooks_off(job.model)
        again: list[Any] = [RerunDataIterator(iter(batches)) for batches in self._validation]
        consumed, found = args.consumed_valid_samples, []
        limit, args.exit_duration_in_mins = args.exit_duration_in_mins, None  # train() is who saves and ends then
        for _ in range(self._blocks):
            with quiet():
                losses, _, _ = training.evaluate(
                    gpt.forward_step, again if len(again) > 1 else again[0], job.model, None, job.config, eval_iters=1
                )
            found.append(next((float(loss) for loss in losses.values()), math.nan))
        args.consumed_valid_samples, args.exit_duration_in_mins = consumed, limit
        self.evaluated_s += time.perf_counter() - start
        return found

    def train(
        self, plan: Plan, samples: int, evaluations: int, progress: Progress = lambda *_: None
    ) -> tuple[list[list[float]], Iterators]:
        """Train on the next ``samples`` under ``plan``, in the layout of the job.

        Args:
            plan: of the branch.
            samples: sequences, a whole number of steps between evaluations.
            evaluations: at equal distances, the last one at the end.
            progress: told of each evaluation.

        Returns:
            [evaluations][blocks] losses, and what to read on with.
        """
        host, start = self._host, self._host.job.args.consumed_train_samples
        iterators = host.iterators() if plan == host.job.plan else host.switch(plan)
        if iterators is None:
            raise BranchFailed(f"no branch under {plan}: {host.knowledge.rejected[plan]}")
        found = []
        for number in range(1, evaluations + 1):
            done = number * (samples // evaluations)
            self.train_to(iterators, start + done)
            found.append(self.losses())
            progress(done, found[-1])
        return found, iterators

    def train_to(self, iterators: Iterators, samples: int) -> None:
        """Train under the plan in force until ``samples`` are consumed, deciding nothing on the way.

        Raises:
            BranchStopped: inside of :meth:`leaving_nothing`, when the run has been asked to end.
        """
        while steps_until(args := self._host.job.args, samples):
            until = samples
            if self._ends_by is not None:
                until = min(samples, args.consumed_train_samples + _STEPS_BETWEEN_LOOKS * args.global_batch_size)
                if self._ends_by.is_due():
                    raise BranchStopped
            self._host.segment(iterators, until=until, deciding=False)

    def go_back(self, snapshot: Snapshot) -> None:
        """Take the job back to where ``snapshot`` was taken of it."""
        snapshot.restore(self._host.job)
        put_in_charge(self._host.job, self._host.layouts)

    @contextlib.contextmanager
    def logged_apart(self, folder: Path) -> Iterator[None]:
        """A log of its own, and a noise scale measured from here on in which every sequence counts alike."""
        host, telemetry = self._host, self._host.telemetry
        noise = NoiseTracker.start(host.config.noise_estimator, half_life_tokens=math.inf)
        known = replace(host.knowledge, noise=noise)
        host.telemetry = BranchTelemetry(folder, telemetry.leads, None, known)
        try:
            host.log_start()
            yield
            host.telemetry.event("run_end", status="finished")
        finally:
            host.telemetry.close()
            host.telemetry = telemetry

    @contextlib.contextmanager
    def leaving_nothing(self) -> Iterator[None]:
        """Without checkpoints, log lines and exits of upstream's. A snapshot has to be restored behind the block."""
        host, args = self._host, self._host.job.args
        self._ends_by = _Ending(args.exit_signal_handler, args.exit_duration_in_mins)
        # All branches read the same validation micro-batches, whatever their own are.
        host.in_branch = {**_NOT_IN_A_BRANCH, "eval_micro_batch_size": args.eval_micro_batch_size}
        vars(args).update(host.in_branch)
        try:
            yield
        finally:
            host.in_branch, self._ends_by = {}, None


@dataclass(frozen=True)
class _Ending:
    """What ends a run beside its samples, as its flags say: ``--exit-signal-handler``, ``--exit-duration-in-mins``."""

    by_signal: bool
    after_min: float | None

    def is_due(self) -> bool:
        """Whether a rank was told to end, or the time is over on one. Collective."""
        told = self.by_signal and any(get_signal_handler().signals_received())
        minutes = (time.time() - training._TRAIN_START_TIME) / 60.0
        return bool(largest(int(told or (self.after_min is not None and minutes > self.after_min))))


def _take_hooks_off(model: list[Any]) -> None:
    """Parameters are whole between steps. Hooks that would wait for a gather are put back by ``job.ready()``."""
    for chunk in model:
        if getattr(chunk, "remove_forward_pre_hook_handles", None):
            chunk.disable_forward_pre_hook(param_sync=False)
