"""Where a driver looks into upstream's training loop, and where it may end a segment.

``train()`` has no callbacks. It calls some functions by their module-level names; these are wrapped to tell an observer
what happened. Without an observer they do what upstream does.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from megatron.patches.registry import Patch


@dataclass(frozen=True)
class StepResult:
    """One step of ``train()``. ``losses`` (and so ``loss``) are known on ranks of the last pipeline stage only."""

    iteration: int
    losses: dict[str, Any]
    skipped: bool
    grad_norm: float | None
    learning_rate: float | None
    step_time_s: float

    @property
    def loss(self) -> float | None:
        """The language-model loss, where this rank knows it."""
        values = list(self.losses.values())
        return float(values[0]) if values else None


class Observer:
    """What a driver may know of a running ``train()``. This one does nothing."""

    continues_a_run = False  # True: upstream's first-step extras (repeated log line, memory report) are left out

    def before_step(self, model: Sequence[Any], optimizer: Any) -> None:
        """Before a step, with the DDP-wrapped chunks that will take it."""

    def on_step(self, step: StepResult) -> None:
        """After the log line of a step, before its evaluation and checkpoint."""

    def on_eval(self, losses: dict[str, Any]) -> None:
        """After an evaluation on a validation set; empty where the loss is not known."""

    def on_checkpoint(self, iteration: int) -> None:
        """After a checkpoint was handed to the writer."""


_OBSERVER: ContextVar[Observer] = ContextVar("copus_observer", default=Observer())  # noqa: B039 (has no state)


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Have ``observer`` told of every step, evaluation and checkpoint inside the block."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


class _Clock:
    """Seconds the last step took; the two wrappers below share one."""

    step_time_s = 0.0


def _announced_and_timed(train_step: Any, clock: _Clock) -> Any:
    signature = inspect.signature(train_step)

    @functools.wraps(train_step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        _OBSERVER.get().before_step(given["model"], given["optimizer"])
        start = time.perf_counter()
        result = train_step(*args, **kwargs)
        clock.step_time_s = time.perf_counter() - start
        return result

    return wrapper


def _told_of_steps(training_log: Any, clock: _Clock) -> Any:
    signature = inspect.signature(training_log)

    @functools.wraps(training_log)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        observer = _OBSERVER.get()
        bound = signature.bind(*args, **kwargs)
        if observer.continues_a_run:
            bound.arguments |= {"is_first_iteration": False, "report_memory_flag": False}
        given = dict(bound.arguments)
        result = training_log(*bound.args, **bound.kwargs)
        rate, norm = given["learning_rate"], given["grad_norm"]
        observer.on_step(
            StepResult(
                iteration=given["iteration"],
                losses=given["loss_dict"],
                skipped=bool(given["skipped_iter"]),
                grad_norm=None if norm is None else float(norm),
                learning_rate=None if rate is None else float(rate),
                step_time_s=clock.step_time_s,
            )
        )
        return result

    return wrapper


def _told_of_evaluations(evaluate: Any) -> Any:
    @functools.wraps(evaluate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        _OBSERVER.get().on_eval(result[0] or {})
        return result

    return wrapper


def _untold_of_tests(evaluate_and_print_results: Any) -> Any:
    """The evaluation on a test set, which ``pretrain()`` adds at the end, is none of training."""

    @functools.wraps(evaluate_and_print_results)
    def wrapper(prefix: str, *args: Any, **kwargs: Any) -> Any:
        with observing(Observer()) if prefix.endswith("test set") else contextlib.nullcontext():
            return evaluate_and_print_results(prefix, *args, **kwargs)

    return wrapper


def _told_of_checkpoints(save: Any) -> Any:
    @functools.wraps(save)
    def wrapper(iteration: int, *args: Any, **kwargs: Any) -> Any:
        result = save(iteration, *args, **kwargs)
        _OBSERVER.get().on_checkpoint(iteration)
        return result

    return wrapper


def _only_once(write_args: Any) -> Any:
    @functools.wraps(write_args)
    def wrapper() -> None:
        if not _OBSERVER.get().continues_a_run:
            write_args()

    return wrapper


def apply() -> None:
    """Wrap the functions that ``train()`` calls."""
    import megatron.training.training as training

    clock = _Clock()
    training.train_step = _announced_and_timed(training.train_step, clock)
    training.training_log = _told_of_steps(training.training_log, clock)
    training.evaluate = _told_of_evaluations(training.evaluate)
    training.evaluate_and_print_results = _untold_of_tests(training.evaluate_and_print_results)
    training.save_checkpoint_and_time = _told_of_checkpoints(training.save_checkpoint_and_time)
    training.write_args_to_tensorboard = _only_once(training.write_args_to_tensorboard)


PATCH = Patch(
    name="training_hooks",
    upstream=(
        "megatron.training.training.train",
        "megatron.training.training.train_step",
        "megatron.training.training.training_log",
        "megatron.training.training.evaluate",
        "megatron.training.training.evaluate_and_print_results",
        "megatron.training.training.save_checkpoint_and_time",
        "megatron.training.initialize.write_args_to_tensorboard",
    ),
    why="losses, gradient norms and step times of a running train() reach nobody but the log",
    issue="none known",
    remove_when="train() takes callbacks",
    apply=apply,
)
