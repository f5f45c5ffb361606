"""Measures the steps of one job: which collectors read which step, and what each step was like."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

from copus_ext.adapters.noise.gradient_noise import GradientNoise
from copus_ext.core.noise.grouping import AUTO, LAYERNORM
from copus_ext.core.noise.noise_scale import StepEstimate, training_temperature
from copus_ext.core.noise.noise_tracker import MeasuredStep

_STEPS_BETWEEN_FULL = 16  # of which one is measured in full, where all are measured by their norm layers
_FULL_AT_FIRST = 8  # all of these: a correction needs as many before it is worth anything


class NoiseMeter(Protocol):
    """Reads gradients inside its ``with`` block."""

    estimator: str

    def __enter__(self) -> NoiseMeter:
        """Start reading."""

    def __exit__(self, *_: object) -> None:
        """Stop reading."""

    def step(self, iteration: int, grad_norm: float | None, learning_rate: float | None) -> list[MeasuredStep]:
        """A step has been taken; what is known by now of this one and those before it. Collective."""

    def flush(self) -> list[MeasuredStep]:
        """What has not been told yet. Collective."""


class NoMeter:
    """For steps that can't be measured."""

    estimator = "none"

    def __enter__(self) -> NoMeter:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was hooked."""

    def step(self, iteration: int, grad_norm: float | None, learning_rate: float | None) -> list[MeasuredStep]:
        """Nothing is known."""
        return []

    def flush(self) -> list[MeasuredStep]:
        """Nothing was kept."""
        return []


class _Pending(NamedTuple):
    """A step whose estimate is still to come."""

    iteration: int
    temperature: float
    in_full: bool


class GradientMeter:
    """Measures every step by one collector; with ``layernorm`` the first 8 and every 16th in full besides."""

    def __init__(
        self, collector_of: Callable[[str], GradientNoise], estimator: str, optimizer: str, seq_length: int
    ) -> None:
        """``collector_of``: makes the collector for an estimator's name; ``optimizer``: upstream's ``--optimizer``."""
        self._every = collector_of(estimator)
        self._full = collector_of(AUTO) if estimator == LAYERNORM else None
        self._full_attached = False
        self._steps = 0
        self.estimator = self._every.grouping.estimator
        self._optimizer, self._seq_length = optimizer, seq_length
        self._pending: list[_Pending] = []
        self._full_estimates: list[StepEstimate] = []

    def __enter__(self) -> GradientMeter:
        self._every.attach()
        self._attach_full(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._attach_full(False)
        self._every.detach()

    def step(self, iteration: int, grad_norm: float | None, learning_rate: float | None) -> list[MeasuredStep]:
        """A step has been taken; what is known by now of this one and those before it. Collective."""
        rate = math.nan if learning_rate is None else learning_rate
        temperature = training_temperature(self._optimizer, rate, self._every.batch)
        self._pending.append(_Pending(iteration, temperature, self._full_attached))
        if self._full is not None and self._full_attached:
            self._full_estimates += self._full.step(grad_norm)
        self._steps += 1
        self._attach_full(self._steps < _FULL_AT_FIRST or (iteration + 1) % _STEPS_BETWEEN_FULL == 0)
        return self._told(self._every.step(grad_norm))

    def flush(self) -> list[MeasuredStep]:
        """What has not been told yet. Collective."""
        return self._told(self._every.flush())

    def _told(self, estimates: list[StepEstimate]) -> list[MeasuredStep]:
        """The pending steps with their estimates, which come for all of them or for none."""
        if not estimates:
            return []
        if self._full is not None:
            self._full_estimates += self._full.flush()
        full = iter(self._full_estimates)
        batch = self._every.batch
        steps = [
            MeasuredStep(
                pending.iteration,
                estimate,
                next(full) if pending.in_full else None,
                batch * self._seq_length,
                batch,
                pending.temperature,
            )
            for pending, estimate in zip(self._pending, estimates, strict=True)
        ]
        self._pending.clear()
        self._full_estimates.clear()
        return steps

    def _attach_full(self, wanted: bool) -> None:
        if self._full is None or wanted == self._full_attached:
            return
        self._full_attached = wanted
        if wanted:
            self._full.attach()
        else:
            self._full.detach()
