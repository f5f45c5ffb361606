"""Move a job's weights and optimizer state into another job on the same ranks, bit-exactly, through memory alone.

    old, new = job in layout A, job built with ``initialise_weights=False`` in layout B
    report = reshard(old, new)
    carry_scheduler(old, new)

``old`` keeps its state, so a caller who does not like the report can go on with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from copus_ext.adapters.carry import carry_grad_scaler, optimizer_step, set_optimizer_step
from copus_ext.adapters.checksum import Checksums, agree
from copus_ext.adapters.exchange import exchange
from copus_ext.adapters.job import Job
from copus_ext.adapters.job_state import (
    JobState,
    UnsupportedReshard,
    job_state,
    moment_names,
    uncovered,
)
from copus_ext.adapters.optimizer_shards import inner_optimizers
from copus_ext.adapters.phases import Phases
from copus_ext.core.plan import Layout
from copus_ext.core.transfer import Holding, TransferPlan, plan_transfer

CHUNK_BYTES = 256 * 2**20
_Sides = tuple[list[Holding], list[Holding]]


@dataclass(frozen=True)
class ReshardReport:
    """What a reshard did.

    ``seconds`` on this rank by phase: plan, move, sync (weights from main parameters, counters), verify. Bytes are over
    all ranks: ``bytes_moved`` went from rank to rank, ``bytes_minimum`` had to. ``exact``: the checksums of all logical
    tensors agree before and after; ``differing`` names those that don't.
    """

    seconds: dict[str, float]
    bytes_moved: int
    bytes_minimum: int
    exact: bool
    differing: tuple[str, ...] = ()


@dataclass
class PlanCache:
    """Transfer plans by pair of layouts. One cache serves one model and one process."""

    plans: dict[tuple[Layout, Layout, bool], tuple[_Sides, TransferPlan]] = field(default_factory=dict)


@torch.no_grad()
def reshard(old: Job, new: Job, *, plans: PlanCache | None = None, chunk_bytes: int = CHUNK_BYTES) -> ReshardReport:
    """Give ``new`` the weights, optimizer state, step count and loss scale of ``old``. Collective over all ranks.

    Hyper-parameters (learning rate, betas, weight decay) are ``new``'s own: they come from its plan's arguments.
    Pending parameter gathers of ``old`` are finished; otherwise it is left as it is.

    Args:
        old: a job between two steps.
        new: a job of the same model and precision in any layout on the same ranks.
        plans: keeps what is planned, so that going between the same two layouts again costs no planning.
        chunk_bytes: what a rank packs and sends at most at a time.

    Raises:
        UnsupportedReshard: state that is not covered, on every rank and before anything is moved.
        TransferError: the two jobs do not hold the same logical tensors; likewise.
    """
    phases = Phases()
    with phases("plan"):
        _refuse_uncovered(old, new)
        _finish_parameter_gathers(old)
        step = _highest(optimizer_step(old), old)
        before, after, plan = _planned(old, new, step >= 0, plans if plans is not None else PlanCache())
    rank = dist.get_rank()
    with phases("verify"):
        together = max(1, len(moment_names(new.args)))
        checksums = Checksums(plan.keys, plan.new_cover, together, _device(new))
        sums_before = checksums.of(plan.old_cover[rank], before.pieces)
    with phases("move"):
        exchange(plan.transfers, before.pieces, after.pieces, chunk_bytes)
    with phases("sync"):
        if step >= 0:
            set_optimizer_step(new, step)
        carry_grad_scaler(old, new)
        _derive_weights(new)
    with phases("verify"):
        differing = agree(sums_before, checksums.of(plan.new_cover[rank], after.pieces))
    names = tuple(plan.keys[row] for row in differing)
    return ReshardReport(phases.seconds, plan.bytes_moved, plan.bytes_minimum, not names, names)


def _refuse_uncovered(old: Job, new: Job) -> None:
    """By arguments, which are the same on every rank."""
    reason = uncovered(old.args) or uncovered(new.args)
    for name in ("bf16", "fp16", "optimizer", "padded_vocab_size"):
        before, after = getattr(old.args, name), getattr(new.args, name)
        if before != after:
            reason = reason or f"{name} is {before} in the old job and {after} in the new one"
    if reason:
        raise UnsupportedReshard(reason)


def _planned(old: Job, new: Job, with_moments: bool, cache: PlanCache) -> tuple[JobState, JobState, TransferPlan]:
    """This rank's state on both sides and the plan between them, from the cache or from all ranks' holdings."""
    before, after, failure = JobState(), JobState(), None
    try:
        before, after = job_state(old, with_moments=with_moments), job_state(new, with_moments=with_moments)
    except UnsupportedReshard as error:
        failure = str(error)
    except Exception as error:  # out of memory, say: the other ranks must hear of anything, or they wait forever
        failure = f"{type(error).__name__}: {error}"
    mine = (before.holdings, after.holdings)
    key = (old.plan.layout, new.plan.layout, with_moments)
    known, plan = cache.plans.get(key, (None, None))
    if not _highest(int(failure is not None or known != mine), old) and plan is not None:
        return before, after, plan
    plan = _plan_together(mine, failure)
    cache.plans[key] = (mine, plan)
    return before, after, plan


def _plan_together(mine: _Sides, failure: str | None) -> TransferPlan:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, failure or mine)
    failures = [f"rank {rank}: {said}" for rank, said in enumerate(gathered) if isinstance(said, str)]
    if failures:
        raise UnsupportedReshard(failures[0])
    return plan_transfer([sides[0] for sides in gathered], [sides[1] for sides in gathered])


def _finish_parameter_gathers(job: Job) -> None:
    """Where gathering updated weights overlaps with the next forward pass, some are still on their way, or old."""
    if job.args.overlap_param_gather:
        for chunk in job.model:
            chunk.start_param_sync(force_sync=True)


def _derive_weights(job: Job) -> None:
    """Half-precision weights from main parameters, and from the other ranks' where the optimizer is distributed."""
    if not (job.args.bf16 or job.args.fp16):
        return
    for wrapper in inner_optimizers(job.optimizer):
        wrapper._copy_main_params_to_model_params()
    if job.args.use_distributed_optimizer:
        for chunk in job.model:
            chunk.start_param_sync(force_sync=True)


def _highest(value: int, job: Job) -> int:
    """The largest of all ranks' values."""
    tensor = torch.tensor([value], device=_device(job))
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def _device(job: Job) -> torch.device:
    return next(job.model[0].parameters()).device
