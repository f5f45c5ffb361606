"""The ``--branch-*`` flags of ``tools/measure_critical_batch.py``, and what they say as one value, checked at once."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from fractions import Fraction

from copus_ext.core.errors import UserError
from copus_ext.core.plan import Plan
from copus_ext.run.progress import NEVER

_LEAST_BLOCKS = 8  # resampling fewer tells little of how uncertain their mean is


def add_branch_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group ``branches`` to a parser."""
    group = parser.add_argument_group("branches")
    group.add_argument("--branch-samples", type=int, metavar="N", help="sequences that every branch trains on")
    group.add_argument(
        "--branch-at",
        metavar="SAMPLES",
        help="consumed sequences at which branches leave the run, like 1024,4096 (default: where --load puts it)",
    )
    group.add_argument(
        "--branch-multiples",
        default="1,2,4,8",
        metavar="K",
        help="batches of the branches in units of the run's own, like 1/2,1,2,4; 1 is always among them "
        "(default: 1,2,4,8)",
    )
    group.add_argument(
        "--branch-evals", type=int, default=4, metavar="N", help="evaluations on the way of a branch (default: 4)"
    )
    group.add_argument(
        "--branch-settle",
        type=int,
        metavar="N",
        help="first sequences of a branch whose losses are not compared (default: a quarter of --branch-samples)",
    )
    group.add_argument(
        "--branch-tolerance",
        type=float,
        default=0.01,
        metavar="NATS",
        help="loss above the run's own that a larger batch may cost (default: 0.01)",
    )
    return parser


@dataclass(frozen=True)
class BranchSettings:
    """What the flags say, checked. Counts are in sequences."""

    points: tuple[int, ...]  # where branches leave; empty: where the checkpoint stands
    plans: tuple[Plan, ...]  # of the branches, by batch, the run's own among them
    base: Plan
    samples: int
    evaluations: int
    settle: int
    tolerance: float

    @property
    def spacing(self) -> int:
        """Sequences between two evaluations."""
        return self.samples // self.evaluations


def settings_from(flags: argparse.Namespace, raw: argparse.Namespace, base: Plan) -> BranchSettings:
    """Check the flags.

    Args:
        flags: of :func:`add_branch_arguments`.
        raw: upstream's arguments before validation, with the copus group.
        base: the plan that the run is under where branches leave it.

    Raises:
        UserError: something is wrong; the message names the flag and says what to do.
    """
    _check_run(raw)
    plans = tuple(sorted({_branch_plan(base, k) for k in _multiples(flags.branch_multiples)}, key=_batch))
    samples, settle = _lengths(flags, plans)
    if not flags.branch_tolerance > 0:
        raise UserError(f"--branch-tolerance {flags.branch_tolerance:g} must be positive")
    points = _points(flags.branch_at, raw, base, samples)
    return BranchSettings(points, plans, base, samples, flags.branch_evals, settle, flags.branch_tolerance)


def keep_to_branches(raw: argparse.Namespace, base: Plan) -> None:
    """Switch off what a run does beside training: branches go back in time, and would write over each other's files."""
    raw.save = raw.save_interval = raw.tensorboard_dir = raw.wandb_project = raw.exit_interval = None
    raw.eval_interval = NEVER  # branches are evaluated at samples, not at steps
    raw.eval_micro_batch_size = raw.eval_micro_batch_size or base.micro_batch  # the same in every branch


def _batch(plan: Plan) -> int:
    return plan.global_batch


def _check_run(raw: argparse.Namespace) -> None:
    if raw.no_copus:
        raise UserError("--no-copus: branches are batches that COPUS switches to; leave it out")
    if raw.copus_policy in ("schedule", "rampup"):
        raise UserError(f"--copus-policy {raw.copus_policy}: branches leave a run that keeps its plan; leave it out")
    if not raw.full_validation and raw.eval_iters < _LEAST_BLOCKS:
        raise UserError(
            f"--eval-iters {raw.eval_iters} gives too few blocks of validation sequences to compare branches by; "
            f"give at least {_LEAST_BLOCKS}, with a smaller --eval-global-batch-size"
        )


def _multiples(text: str) -> set[Fraction]:
    try:
        found = {Fraction(word) for word in text.split(",")}
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--branch-multiples {text}: give numbers and fractions like 1/2,1,2,4") from None
    if min(found) <= 0:
        raise UserError(f"--branch-multiples {text}: a batch has to be positive; give numbers above 0")
    if found <= {Fraction(1)}:
        raise UserError(f"--branch-multiples {text}: there is nothing to compare; give another one beside 1")
    return found | {Fraction(1)}


def _branch_plan(base: Plan, multiple: Fraction) -> Plan:
    """The same layout with ``multiple`` times the batch, in the largest micro-batch up to the run's own that fits."""
    batch, ranks = multiple * base.global_batch, base.layout.dp
    if batch.denominator != 1 or batch.numerator % ranks:
        raise UserError(
            f"--branch-multiples {multiple}: {multiple} x {base.global_batch} sequences can't be dealt to {ranks} "
            "data-parallel ranks; give another multiple"
        )
    per_rank = batch.numerator // ranks
    micro = next(m for m in range(base.micro_batch, 0, -1) if per_rank % m == 0)
    return base.with_batch(batch.numerator, micro)


def _lengths(flags: argparse.Namespace, plans: tuple[Plan, ...]) -> tuple[int, int]:
    """Samples of a branch, and how many of them it has to settle."""
    if flags.branch_evals < 2:
        raise UserError(f"--branch-evals {flags.branch_evals} is too few; give at least 2")
    if flags.branch_samples is None:
        raise UserError("--branch-samples is missing; say how many sequences every branch trains on")
    unit = flags.branch_evals * math.lcm(*map(_batch, plans))
    if flags.branch_samples < 1 or flags.branch_samples % unit:
        raise UserError(
            f"--branch-samples {flags.branch_samples}: every branch has to end a step at each of {flags.branch_evals} "
            f"evaluations; give a multiple of {unit}, or change --branch-evals"
        )
    settle = flags.branch_samples // 4 if flags.branch_settle is None else flags.branch_settle
    if not 0 <= settle < flags.branch_samples:
        raise UserError(f"--branch-settle {settle} leaves nothing of --branch-samples {flags.branch_samples}")
    return flags.branch_samples, settle


def _points(text: str | None, raw: argparse.Namespace, base: Plan, samples: int) -> tuple[int, ...]:
    if text is None:
        if raw.load is None:
            raise UserError("--branch-at is missing; say after how many sequences to branch, or --load a checkpoint")
        return ()
    try:
        points = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--branch-at {text}: give counts of sequences like 1024,4096") from None
    if points != sorted(set(points)) or points[0] < 0:
        raise UserError(f"--branch-at {text}: give rising counts of sequences")
    for point in points:
        if raw.load is None and point % base.global_batch:
            raise UserError(f"--branch-at {point}: no step ends there; give a multiple of {base.global_batch}")
    check_room(points[-1], samples, raw.train_samples)
    return tuple(points)


def check_room(point: int, samples: int, train_samples: int) -> None:
    """Branches from ``point`` must end within the run, for which data and learning rate are laid out.

    Raises:
        UserError: they don't.
    """
    if point + samples > train_samples:
        raise UserError(
            f"--branch-samples {samples}: branches from {point} end beyond --train-samples {train_samples}; "
            "give fewer, or a longer run"
        )
