"""Megatron's own batch ramps: ``--rampup-batch-size`` and ``--step-batch-size-schedule``.

The layout and the micro-batch are those of the flags. Upstream asks before every step which batch holds at the samples
consumed, so a change comes at the first step that starts at or beyond its threshold. Here those starts are worked out
beforehand.

megatron-core 0.19.2 still takes ``--rampup-batch-size``, but ignores it; 0.17.1 and before had a calculator
that did what :func:`_ramp` does. ``--step-batch-size-schedule`` is what 0.19.2 has instead: from the command line its
thresholds are tokens, each rounded down to whole sequences (``StepBatchsizeNumMicroBatchesCalculator``).
"""

from __future__ import annotations

import math

from copus_ext.core.errors import UserError
from copus_ext.core.plan import Plan
from copus_ext.core.planner.policy import FLAG, Options, Policy, PolicySettings
from copus_ext.core.planner.schedule import Schedule
from copus_ext.core.policies.schedule import SchedulePolicy

RAMP_FLAG, STEPS_FLAG = "--rampup-batch-size", "--step-batch-size-schedule"
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

Thresholds = list[tuple[int, int]]  # samples consumed, and the global batch from there on


def _ramp(start: int, increment: int, samples: int, last: int) -> Thresholds:
    """Thresholds of a linear ramp from batch ``start`` to ``last`` over so many samples, as upstream counts them.

    The batch is start + increment x int(consumed / (samples / increments)) up to ``samples``, ``last`` beyond. The
    divisions are of floats, as upstream's are, so that a threshold which rounding moves is moved here, too.
    """
    _check_ramp(start, increment, samples, last)
    increments = (last - start) // increment
    per_increment = samples / increments

    def threshold(count: int) -> int:
        consumed = max(0, int(count * per_increment) - 1)
        while int(consumed / per_increment) < count:
            consumed += 1
        return consumed

    rising = [(threshold(count), start + count * increment) for count in range(increments)]
    return [*rising, (min(samples + 1, threshold(increments)), last)]


def _check_ramp(start: int, increment: int, samples: int, last: int) -> None:
    given = f"{RAMP_FLAG} {start} {increment} {samples}"
    if min(start, increment, samples) < 1:
        raise UserError(f"{given}: START, INCREMENT and SAMPLES have to be at least 1")
    if start >= last:
        raise UserError(f"{given}: START has to be below --global-batch-size {last}, where the ramp ends")
    if (last - start) % increment:
        raise UserError(
            f"{given}: from {start} to --global-batch-size {last} it is {last - start}, no multiple of INCREMENT"
        )


def _steps(text: str, seq_length: int) -> Thresholds:
    """Thresholds of ``TOKENS:BATCH`` entries, separated by spaces or commas; suffixes K, M, B and T are decimal."""
    words = text.replace(",", " ").split()
    try:
        thresholds = sorted(_step(word, seq_length) for word in words)
    except (ValueError, OverflowError):
        raise UserError(f'{STEPS_FLAG} "{text}": write it like "0:768 250B:1536", TOKENS:BATCH') from None
    starts = [start for start, _ in thresholds]
    if not starts or starts[0] != 0:
        raise UserError(f'{STEPS_FLAG} "{text}": the first entry has to be for 0 tokens')
    if len(set(starts)) < len(starts):
        raise UserError(f'{STEPS_FLAG} "{text}": two entries start at the same sequence; thresholds have to rise')
    if min(batch for _, batch in thresholds) < 1:
        raise UserError(f'{STEPS_FLAG} "{text}": batches have to be at least 1')
    return thresholds


def _step(word: str, seq_length: int) -> tuple[int, int]:
    tokens, _, batch = word.partition(":")
    return _number(tokens) // seq_length, _number(batch)


def _number(text: str) -> int:
    """As upstream reads it: through a float."""
    upper = text.upper()
    factor = _SUFFIXES.get(upper[-1:], 1)
    return int(float(upper[:-1] if factor > 1 else upper) * factor)


def real_starts(thresholds: Thresholds, train_samples: float) -> Thresholds:
    """Where batches really change: at the first step that starts at or beyond a threshold.

    Args:
        thresholds: (samples, batch), rising, the first at 0.
        train_samples: where the run ends, in sequences.

    Returns:
        The same in a run's own steps; batches that no step has are left out.
    """
    found: Thresholds = []
    consumed = 0
    while True:
        batch = [size for threshold, size in thresholds if threshold <= consumed][-1]
        if not found or found[-1][1] != batch:
            found.append((consumed, batch))
        ahead = [threshold for threshold, _ in thresholds if threshold > consumed]
        if not ahead or ahead[0] >= train_samples:
            return found
        consumed += -(-(ahead[0] - consumed) // batch) * batch
        if consumed >= train_samples:
            return found


def _check_batches(starts: Thresholds, base: Plan, flag: str) -> None:
    """Upstream checks each before its first step; here all are, before training starts."""
    unit = base.micro_batch * base.layout.dp
    for start, batch in starts:
        if batch % unit:
            raise UserError(
                f"{flag}: batch {batch}, due at {start} samples, is not divisible by micro-batch "
                f"{base.micro_batch} x data parallel {base.layout.dp} = {unit}"
            )


def make(settings: PolicySettings, base: Plan, options: Options) -> Policy:
    """It has no options but upstream's two flags.

    Raises:
        UserError: neither flag, both, or what upstream would refuse.
    """
    if settings.rampup is not None and settings.step_schedule is not None:
        raise UserError(f"{FLAG} rampup: {RAMP_FLAG} and {STEPS_FLAG} are two ramps; give one of them")
    if settings.rampup is not None:
        start, increment, samples = settings.rampup
        flag, thresholds = RAMP_FLAG, _ramp(start, increment, samples, base.global_batch)
    elif settings.step_schedule is not None:
        flag, thresholds = STEPS_FLAG, _steps(settings.step_schedule, settings.seq_length)
    else:
        raise UserError(f"{FLAG} rampup needs a ramp; give {RAMP_FLAG} or {STEPS_FLAG}")
    starts = real_starts(thresholds, settings.train_samples or math.inf)
    _check_batches(starts, base, flag)
    entries = tuple((start, base.with_batch(batch)) for start, batch in starts)
    return SchedulePolicy(Schedule(entries), named="batch ramp")
