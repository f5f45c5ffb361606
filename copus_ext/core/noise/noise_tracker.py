"""What a run knows of its noise scale, whichever estimator reads the gradients; a value that is saved with the run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

from copus_ext.core.noise.continuity import ContinuityCheck, ContinuityVerdict
from copus_ext.core.noise.correction import RunningCorrection
from copus_ext.core.noise.grouping import ADAM, LAYERNORM
from copus_ext.core.noise.noise_scale import NoiseEstimate, NoiseScaleEstimator, StepEstimate
from copus_ext.core.plan import Plan

_OF_NORMS, _PRECONDITIONED, _OF_GRADIENT = "norm layers", "preconditioned gradient", "gradient"


class MeasuredStep(NamedTuple):
    """A step that was measured: of ``batch`` sequences, ``tokens`` tokens, at a training temperature.

    ``full`` is there where ``estimate`` is of norm layers only and the whole gradient was measured besides.
    """

    iteration: int
    estimate: StepEstimate
    full: StepEstimate | None
    tokens: float
    batch: float
    temperature: float


@dataclass(frozen=True)
class NoiseTracker:
    """Smoothed noise scale, and the check that a switch of the layout leaves it where it was."""

    measures: str
    smoothed: NoiseScaleEstimator | RunningCorrection
    continuity: ContinuityCheck = field(default_factory=ContinuityCheck)

    @classmethod
    def start(cls, estimator: str, half_life_tokens: float) -> Self:
        """Before the first step of a run with ``--copus-gns-estimator estimator``."""
        if estimator == LAYERNORM:
            return cls(_OF_NORMS, RunningCorrection.start(half_life_tokens))
        measures = _PRECONDITIONED if estimator == ADAM else _OF_GRADIENT
        return cls(measures, NoiseScaleEstimator(half_life_tokens))

    def update(self, step: MeasuredStep) -> Self:
        """After one more step."""
        smoothed, (N, S, _) = self.smoothed, step.estimate
        if isinstance(smoothed, RunningCorrection):
            later: NoiseScaleEstimator | RunningCorrection = smoothed.update(
                step.full, step.estimate, step.tokens, step.batch, temperature=step.temperature
            )
        else:
            later = smoothed.update(N, S, step.tokens, step.batch, temperature=step.temperature)
        return replace(self, smoothed=later, continuity=self.continuity.update(N, S))

    def after_switch(self, old: Plan, new: Plan) -> Self:
        """A switch was made. N and S go on as they were if only the layout changed."""
        only_layout = old.global_batch == new.global_batch
        return replace(self, continuity=self.continuity.switched() if only_layout else self.continuity.cancelled())

    def verdict(self) -> ContinuityVerdict | None:
        """On the last switch of the layout alone, when the last step has completed its check."""
        return self.continuity.verdict()

    def estimate(self) -> NoiseEstimate | None:
        """The noise scale as known now; ``None`` before the first step."""
        estimate = self.smoothed.estimate()
        return estimate if estimate.value == estimate.value else None

    def carried_on(self, saved: NoiseTracker) -> NoiseTracker:
        """This start of a run, with what an earlier part of the run has saved if that measured the same thing."""
        if saved.measures != self.measures:
            return self
        return replace(saved, smoothed=saved.smoothed.with_half_life(self.smoothed.half_life_tokens))

    def to_json(self) -> dict[str, Any]:
        """Plain values; through ``json`` and :meth:`from_json` they come back to the last bit."""
        return {
            "measures": self.measures,
            "smoothed": self.smoothed.to_json(),
            "continuity": self.continuity.to_json(),
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> NoiseTracker:
        """Inverse of :meth:`to_json`."""
        kind = RunningCorrection if values["measures"] == _OF_NORMS else NoiseScaleEstimator
        smoothed = kind.from_json(values["smoothed"])
        return NoiseTracker(values["measures"], smoothed, ContinuityCheck.from_json(values["continuity"]))
