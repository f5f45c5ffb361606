"""The policy of COPUS with the doubt removed: it replays what a recorded run came to know, from the start.

From ``events.jsonl`` of that run it takes the noise scale with hindsight and the median step time of every plan the run
has had; c is given. What the recorded run never tried stays as uncertain as it is for any policy. So it says what
knowing better would have been worth, not what the best of all runs is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.cost.visits import BLOCK, Visit, Visits
from copus_ext.core.efficiency.critical_ratio import CriticalRatio
from copus_ext.core.errors import UserError
from copus_ext.core.events import Event, read_events
from copus_ext.core.noise.grouping import LAYERNORM
from copus_ext.core.noise.noise_scale import NoiseEstimate
from copus_ext.core.plan import Plan, parse_plan
from copus_ext.core.planner.decision import Decision, Situation
from copus_ext.core.planner.objective import parse_objective
from copus_ext.core.planner.policy import FLAG, Options, Policy, PolicySettings
from copus_ext.core.planner.switch_rule import parse_switch_rule
from copus_ext.core.policies.copus import CopusPolicy

WIDTH = 0.1  # of the samples recorded: the window of the centred average, half of it to either side; our choice
_UNSETTLED = 2  # steps after each change whose time does not count
_OFTEN = 16  # visits to each plan told, so that what is told outweighs the closed form

Array = NDArray[np.float64]


class Truth(NamedTuple):
    """N and S of a run with hindsight after so many samples, each [points]; and seconds a step by plan."""

    samples: Array
    N: Array
    S: Array
    step_times: tuple[tuple[Plan, float], ...]


@dataclass(frozen=True)
class KnownRatio(CriticalRatio):
    """c without any doubt."""

    c: float = 2.0

    def quantiles(self, count: int, consumed_samples: float) -> Array:
        """[count] times ln c."""
        return np.full(count, math.log(self.c))


@dataclass(frozen=True)
class OraclePolicy(Policy):
    """``policy`` decides, shown ``truth`` instead of what the run itself has measured."""

    searches = True

    truth: Truth
    c: float = 2.0
    policy: CopusPolicy = field(default_factory=CopusPolicy)

    def decide(self, situation: Situation) -> Decision:
        """As COPUS, knowing more."""
        noise = self.noise_after(situation.consumed_samples)
        shown = replace(
            situation,
            noise=noise,
            can_probe=False,  # c is told
            critical_ratio=KnownRatio(c=self.c),
            throughput=with_step_times(situation.throughput, self.truth.step_times),
        )
        decision = self.policy.decide(shown)
        said = "unknown" if noise is None else f"{noise.value:.4g} sequences"
        return replace(decision, reason=f"{decision.reason}; by the record the noise scale is {said}, c {self.c:g}")

    def noise_after(self, consumed_samples: int) -> NoiseEstimate | None:
        """The recorded noise scale with an interval of no width; None where the record has no positive one."""
        signal, noise = (
            float(np.interp(consumed_samples, self.truth.samples, values)) for values in (self.truth.N, self.truth.S)
        )
        if signal <= 0 or noise <= 0:
            return None
        value = noise / signal
        return NoiseEstimate(value, value, value, signal, noise, n_eff=math.inf)


def with_step_times(model: ThroughputModel, step_times: Iterable[tuple[Plan, float]]) -> ThroughputModel:
    """The model as if each plan had just been visited often, for some equal steps [s]."""
    now = model.seen.now_s
    told = {plan: Visit(plan, now - BLOCK * seconds, (seconds,) * BLOCK) for plan, seconds in step_times}
    kept = (visit for visit in model.seen.visits if visit.plan not in told)
    return replace(model, seen=Visits((*kept, *(visit for visit in told.values() for _ in range(_OFTEN))), now))


def read_truth(directory: str, base: Plan) -> Truth:
    """What a run's ``events.jsonl`` says with hindsight.

    Args:
        directory: the run's ``--copus-dir``.
        base: gives the number of ranks, and the wish for sequence parallelism that plans do not name at tp 1.

    Raises:
        UserError: there are no events, or none of steps and their noise; another number of ranks; or a noise scale of
            the norm layers alone.
    """
    try:
        events = read_events(Path(directory) / "events.jsonl")
    except (OSError, ValueError) as error:
        raise UserError(f"{FLAG} oracle:run={directory} has no events to replay: {error}") from None
    steps = [event for event in events if event["event"] == "step"]
    noise = [event for event in events if event["event"] == "noise_scale"]
    if any(event.get("estimator") == LAYERNORM for event in noise):
        raise UserError(f"{FLAG} oracle:run={directory} measured norm layers alone; record it with another estimator")
    try:
        plans = {text: _plan(text, base) for text in {step["plan"] for step in steps}}
    except ValueError as error:
        raise UserError(f"{FLAG} oracle:run={directory} had other ranks: {error}; replay it on as many") from None
    samples, signal, scatter = _hindsight(_measured(steps, noise, plans))
    if not samples.size:
        raise UserError(f"{FLAG} oracle:run={directory} has no steps whose noise scale was measured; record one")
    return Truth(samples, signal, scatter, _step_times(steps, plans))


def _plan(text: str, base: Plan) -> Plan:
    """A plan as events write it: what is not named is off, but sequence parallelism at tp 1 as in the flags."""
    off = replace(base.layout, sequence_parallel=False, distributed_optimizer=False, recompute="none")
    plan = parse_plan(text, replace(base, layout=off))
    if plan.layout.tp > 1:
        return plan
    return replace(plan, layout=replace(plan.layout, sequence_parallel=base.layout.sequence_parallel))


def _measured(steps: Sequence[Event], noise: Sequence[Event], plans: dict[str, Plan]) -> Array:
    """[steps, 4] samples consumed, batch, N and S of each step that was measured, in order."""
    taken = {step["iteration"]: (step["consumed_samples"], plans[step["plan"]].global_batch) for step in steps}
    single = {row[0]: row[1:3] for event in noise for row in event["steps"] if None not in row[1:3]}
    rows = [(*taken[iteration], *values) for iteration, values in sorted(single.items()) if iteration in taken]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _hindsight(measured: Array) -> tuple[Array, Array, Array]:
    """Samples, and N and S averaged within half of WIDTH to either side; a step counts by its batch."""
    samples, batch, signal, scatter = measured.T
    half = 0.5 * WIDTH * float(np.ptp(samples)) if samples.size else 0.0
    first = np.searchsorted(samples, samples - half, side="left")
    last = np.searchsorted(samples, samples + half, side="right")
    weight, *sums = (_between(values, first, last) for values in (batch, batch * signal, batch * scatter))
    return samples, sums[0] / weight, sums[1] / weight


def _between(values: Array, first: NDArray[np.int64], last: NDArray[np.int64]) -> Array:
    """[n] sums of ``values[first:last]``."""
    sums = np.append(0.0, np.cumsum(values))
    return np.asarray(sums[last] - sums[first])


def _step_times(steps: Sequence[Event], plans: dict[str, Plan]) -> tuple[tuple[Plan, float], ...]:
    """The median of each plan's steps, without the first ones after each change."""
    times: dict[str, list[float]] = {}
    before, since = None, 0
    for step in steps:
        since = since + 1 if step["plan"] == before else 1
        before = step["plan"]
        if since > _UNSETTLED:
            times.setdefault(before, []).append(step["step_time_s"])
    return tuple((plans[text], float(np.median(seconds))) for text, seconds in times.items())


def make(settings: PolicySettings, base: Plan, options: Options) -> Policy:
    """Options ``run``, the directory of a recorded run, which it needs, and ``c``, critical batch / noise scale.

    Raises:
        UserError: no such record.
    """
    directory = options.text("run")
    if directory is None:
        raise UserError(f"{FLAG} oracle replays a run; give {FLAG} oracle:run=DIR")
    decides = CopusPolicy(
        dwell_steps=settings.dwell_steps,
        max_growth=settings.max_growth,
        objective=parse_objective(settings.objective, settings.lr_rule),
        rule=parse_switch_rule(settings.switch_rule),
    )
    return OraclePolicy(read_truth(directory, base), options.positive("c", 2.0), decides)
