"""Branches of a running job: from one snapshot, the same samples under another plan, judged by the same sequences."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.training import training

from copus_ext.adapters.snapshot import Snapshot
from copus_ext.core.errors import UserError
from copus_ext.core.noise_tracker import NoiseTracker
from copus_ext.core.plan import Plan
from copus_ext.run import gpt
from copus_ext.run.progress import steps_until
from copus_ext.run.switch import put_in_charge
from copus_ext.run.telemetry import Telemetry, quiet

if TYPE_CHECKING:
    from copus_ext.run.driver import Driver

Iterators = tuple[Any, Any, Any]
Progress = Callable[[int, list[float]], None]  # sequences since the start, [blocks] losses

_NEVER = 10**12  # an interval in steps that no run reaches
_NOT_IN_A_BRANCH: dict[str, Any] = {  # of upstream's arguments: what is thrown away leaves nothing behind
    "save": None,
    "save_interval": None,
    "eval_interval": _NEVER,
    "exit_interval": None,
    "exit_duration_in_mins": None,
    "exit_signal_handler": False,
    "log_interval": _NEVER,
    "tensorboard_log_interval": _NEVER,
}


class BranchFailed(RuntimeError):
    """A branch could not be begun; the job is as it was."""


class BranchTelemetry(Telemetry):
    """Logs a branch, and leaves the terminal to whoever branches."""

    def say(self, text: str) -> None:
        """Nothing."""


class Branches:
    """Trains and evaluates branches of a driver's job. All methods are collective over all ranks."""

    def __init__(self, driver: Driver, blocks: int) -> None:
        """``blocks``: of validation sequences, an evaluation's global batch each, the same at every evaluation.

        Raises:
            UserError: there are no validation data.
        """
        self._driver, self._blocks = driver, blocks
        self.evaluated_s = 0.0  # seconds that evaluations took
        self._validation = self._validation_batches(driver.iterators()[1])

    def _validation_batches(self, iterators: Any) -> list[list[Any]]:
        """This rank's validation micro-batches, for each model chunk, to be read again at every evaluation."""
        args = self._driver.job.args
        if iterators is None or (isinstance(iterators, list) and None in iterators):
            raise UserError("there is no validation data to compare branches by; give --valid-data-path, or --split")
        per_block = args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)
        chunks = iterators if isinstance(iterators, list) else [iterators]
        return [[next(iterator) for _ in range(self._blocks * per_block)] for iterator in chunks]

    def losses(self) -> list[float]:
        """[blocks] losses on the validation sequences, always the same; ``nan`` on ranks without the last stage."""
        start, job, args = time.perf_counter(), self._driver.job, self._driver.job.args
        _take_hooks_off(job.model)
        again: list[Any] = [RerunDataIterator(iter(batches)) for batches in self._validation]
        consumed, found = args.consumed_valid_samples, []
        for _ in range(self._blocks):
            with quiet():
                losses, _, _ = training.evaluate(
                    gpt.forward_step, again if len(again) > 1 else again[0], job.model, None, job.config, eval_iters=1
                )
            if losses is None:  # upstream has found that --exit-duration-in-mins is over
                raise SystemExit(0)
            found.append(next((float(loss) for loss in losses.values()), math.nan))
        args.consumed_valid_samples = consumed
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
        driver, start = self._driver, self._driver.job.args.consumed_train_samples
        iterators = driver.iterators() if plan == driver.job.plan else driver.switch(plan)
        if iterators is None:
            raise BranchFailed(f"no branch under {plan}: {driver.knowledge.rejected[plan]}")
        found = []
        for number in range(1, evaluations + 1):
            done = number * (samples // evaluations)
            self.train_to(iterators, start + done)
            found.append(self.losses())
            progress(done, found[-1])
        return found, iterators

    def train_to(self, iterators: Iterators, samples: int) -> None:
        """Train under the plan in force until ``samples`` are consumed, deciding nothing on the way."""
        while steps_until(self._driver.job.args, samples):
            self._driver.segment(iterators, until=samples, deciding=False)

    def go_back(self, snapshot: Snapshot) -> None:
        """Take the job back to where ``snapshot`` was taken of it."""
        snapshot.restore(self._driver.job)
        put_in_charge(self._driver.job, self._driver.layouts)

    @contextlib.contextmanager
    def logged_apart(self, folder: Path) -> Iterator[None]:
        """A log of its own, and a noise scale measured from here on in which every sequence counts alike."""
        driver, telemetry = self._driver, self._driver.telemetry
        noise = NoiseTracker.start(driver.config.noise_estimator, half_life_tokens=math.inf)
        known = replace(driver.knowledge, noise=noise)
        driver.telemetry = BranchTelemetry(folder, telemetry.leads, None, known)
        try:
            driver.log_start()
            yield
            driver.telemetry.event("run_end", status="finished")
        finally:
            driver.telemetry.close()
            driver.telemetry = telemetry

    @contextlib.contextmanager
    def leaving_nothing(self) -> Iterator[None]:
        """Without checkpoints, log lines and exits of upstream's. A snapshot has to be restored behind the block."""
        driver = self._driver
        driver.in_branch = _NOT_IN_A_BRANCH
        vars(driver.job.args).update(_NOT_IN_A_BRANCH)
        try:
            yield
        finally:
            driver.in_branch = {}


def _take_hooks_off(model: list[Any]) -> None:
    """Parameters are whole between steps. Hooks that would wait for a gather are put back by ``job.ready()``."""
    for chunk in model:
        if getattr(chunk, "remove_forward_pre_hook_handles", None):
            chunk.disable_forward_pre_hook(param_sync=False)
