"""What a run tells: ``events.jsonl``, TensorBoard, lines on the terminal; by the last rank, as upstream's log is."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.training import get_args, get_tensorboard_writer
from megatron.training.global_vars import get_wandb_writer

from copus_ext.core.efficiency.critical_ratio import CriticalRatio
from copus_ext.core.events import EventLog, EventSink, NullEventLog, plain
from copus_ext.core.noise.continuity import ContinuityVerdict
from copus_ext.core.noise.noise_scale import NoiseEstimate
from copus_ext.core.noise.noise_tracker import MeasuredStep
from copus_ext.core.plan import Plan
from copus_ext.core.planner.knowledge import Knowledge, measured_step_json
from copus_ext.core.report.summary import format_bytes
from copus_ext.run.switch import SwitchReport
from megatron.patches.training_hooks import StepResult

EVENTS_FILE = "events.jsonl"


class Telemetry:
    """Turns what happens into events, curves and lines. On ranks that do not lead it writes nothing."""

    def __init__(
        self, directory: Path, leads: bool, resumed_from: int | None, knowledge: Knowledge | None = None
    ) -> None:
        """``knowledge``: of an adaptive run, which every event moves on, on all ranks."""
        self.leads, self.knowledge = leads, knowledge
        self.path = directory / EVENTS_FILE
        self._last_loss: float | None = None
        self._log: EventSink = EventLog(self.path, time.monotonic, resumed_from) if leads else NullEventLog()

    def event(self, event: str, /, **fields: Any) -> None:
        """One event at the run's present progress; what it teaches is known from here on."""
        args = get_args()
        progress = args.curr_iteration, args.consumed_train_samples
        self._log.write(event, *progress, **fields)
        if self.knowledge is None:
            return
        before = self.knowledge.critical_ratio
        happened = {"event": event, "iteration": progress[0], "consumed_samples": progress[1], **fields}
        self.knowledge = self.knowledge.after(plain(happened))
        if self.knowledge.critical_ratio is not before:
            self._log.write("critical_ratio", *progress, **_learned(self.knowledge.critical_ratio, progress[1]))

    def say(self, text: str) -> None:
        """One line for whoever watches the run."""
        if self.leads:
            print(f" [copus] {text}", flush=True)

    def step(self, result: StepResult, plan: Plan, seq_length: int, rate_share: float = 1.0) -> None:
        """A step was taken under ``plan``; ``rate_share``: the scheduled learning rate as a share of its peak."""
        self._last_loss = result.loss
        self.event(
            "step",
            loss=result.loss,
            plan=str(plan),
            step_time_s=result.step_time_s,
            tokens=plan.global_batch * seq_length,
            learning_rate=result.learning_rate,
            rate_share=rate_share,
            grad_norm=result.grad_norm,
            skipped=result.skipped,
        )

    def noise_scale(self, estimate: NoiseEstimate | None, estimator: str, steps: Sequence[MeasuredStep]) -> None:
        """The smoothed noise scale after a few more steps were measured, and what they gave one by one."""
        known = estimate or NoiseEstimate(*(math.nan,) * 5, n_eff=0.0)
        measured = [measured_step_json(step) for step in steps]
        self.event("noise_scale", **known._asdict(), estimator=estimator, steps=measured)
        self._scalars(
            {
                "noise-scale": known.value,
                "noise-scale-low": known.low,
                "noise-scale-high": known.high,
                "gradient-covariance-trace": known.S,
                "gradient-square-norm": known.N,
            }
        )

    def memory(self, plan: Plan, peak_bytes: int, predicted_bytes: float) -> None:
        """What ``plan`` was seen to take of the fullest rank's device, and what was expected."""
        self.event(
            "memory", plan=str(plan), parts=plan.to_json(), peak_bytes=peak_bytes, predicted_bytes=predicted_bytes
        )

    def switch_check(self, verdict: ContinuityVerdict, plan: Plan) -> None:
        """Whether N and S went on after a switch of the layout as before it."""
        self.event("switch_check", plan=str(plan), **verdict.to_json())
        if verdict.suspect:
            self.say(
                f"the switch to {plan} is suspect: |G|^2 went from {verdict.n_before:.3g} to {verdict.n_after:.3g} "
                f"({verdict.z_n:+.1f} sigma), tr(Sigma) from {verdict.s_before:.3g} to {verdict.s_after:.3g} "
                f"({verdict.z_s:+.1f} sigma)"
            )

    def _scalars(self, values: dict[str, float]) -> None:
        """To TensorBoard and W&B under upstream's habits of naming: ``name`` by iteration, ``name vs samples``."""
        writer, wandb, args = get_tensorboard_writer(), get_wandb_writer(), get_args()
        for name, value in values.items() if writer is not None else ():
            writer.add_scalar(name, value, args.curr_iteration)
            writer.add_scalar(f"{name} vs samples", value, args.consumed_train_samples)
        if wandb is not None:
            wandb.log(values, args.curr_iteration)

    def decision(self, fields: dict[str, Any]) -> None:
        """The policy decided: the fields of the event."""
        noise = None if self.knowledge is None else self.knowledge.noise.estimate()
        self.event("decision", **fields)
        args = get_args()
        loss = "" if self._last_loss is None else f"loss {self._last_loss:.4f} | "
        scale = "unknown" if noise is None else f"{noise.value:.3g} [{noise.low:.3g}, {noise.high:.3g}]"
        self.say(
            f"iteration {args.curr_iteration:5d} | samples {args.consumed_train_samples}/{args.train_samples} | "
            f"{fields['current']} | {loss}noise scale {scale} | {fields['reason']}"
        )

    def switch(self, report: SwitchReport) -> None:
        """The job moved to another plan."""
        self.event(
            "switch",
            **{"from": str(report.old), "to": str(report.new)},
            parts=report.new.to_json(),
            seconds=report.seconds,
            bytes_moved=report.bytes_moved,
            bytes_minimum=report.bytes_minimum,
            state_bytes=report.state_bytes,
            peak_extra_bytes=report.peak_extra_bytes,
            exact=report.exact,
        )
        phases = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in report.seconds.items())
        moved = ""
        if "move" in report.seconds:
            moved = f"; {format_bytes(report.bytes_moved)} moved" if report.bytes_moved else "; nothing had to move"
            moved += ", every bit checked"
        self.say(f"switched to {report.new} in {report.total_s:.2f} s ({phases}){moved}")

    def close(self) -> None:
        """Nothing more will happen."""
        self._log.close()


def _learned(ratio: CriticalRatio, consumed_samples: int) -> dict[str, Any]:
    """What was seen of c last, and what is known of it now."""
    seen = ratio.observations[-1]
    c, low, high = ratio.interval(consumed_samples)
    names = ("kind", "batch_from", "batch_to", "log_ratio", "log_sd")
    return {**{name: getattr(seen, name) for name in names}, "c": c, "low": low, "high": high}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep upstream's set-up messages, which it prints for every model it builds, off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
