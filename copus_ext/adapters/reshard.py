"""Move a job's weights and optimizer state into another job in the same processes, bit-exactly, through memory alone.

    old, new = job in layout A, job built with ``initialise_weights=False`` in layout B
    report = reshard(old, new)
    carry_scheduler(old, new)

The state is moved, not copied: memory of ``old`` is given back as ``new`` fills, and no rank ever holds both. After it
``old`` is hollow, and can be the ``new`` of another one. When anything fails, ``old`` is as it was and ``new`` hollow.

Either job may be on part of the world (:mod:`copus_ext.adapters.world`): a rank that has no part in it has nothing to
give, or gets nothing, and makes the same calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch

from copus_ext.adapters.agreement import first_failure, largest
from copus_ext.adapters.blueprint import holdings_of_layout
from copus_ext.adapters.carry import carry_grad_scaler, optimizer_step, set_optimizer_step, tell_where_it_stands
from copus_ext.adapters.checksum import Checksums
from copus_ext.adapters.derived import derive_weights, finish_gathers
from copus_ext.adapters.job import Job
from copus_ext.adapters.job_memory import JobMemory, Side, gradients
from copus_ext.adapters.job_state import UnsupportedReshard, uncovered
from copus_ext.adapters.move import Ledger, Move, MoveFailed
from copus_ext.adapters.optimizer_shards import MOST_MOMENTS, inner_optimizers
from copus_ext.adapters.pages import Pages
from copus_ext.adapters.phases import Phases
from copus_ext.adapters.staging import has_to_be_staged
from copus_ext.adapters.wire import MemoryWire, Wire, open_wire
from copus_ext.adapters.world import whole_world
from copus_ext.core.plan import Layout
from copus_ext.core.reshard.streaming import Stream, default_limit, stream
from copus_ext.core.reshard.transfer import Holding, TransferError, plan_transfer

__all__ = ["MoveFailed", "PlanCache", "ReshardReport", "UnsupportedReshard", "plan_reshard", "reshard"]

_KEPT_MOVES = 32
_PARTS = 3  # of a round, where the room that gradients leave goes to a buffer of weights, and packing needs some too
_Way = tuple[Layout, Layout, bool, int | None]  # from, to, with the optimizer's moments, bytes of a round


@dataclass(frozen=True)
class ReshardReport:
    """What a reshard did.

    ``seconds`` on this rank by phase: plan, move, verify, sync (weights from main parameters, counters). Bytes are over
    all ranks: ``bytes_moved`` went from rank to rank, ``bytes_minimum`` had to. On this rank, ``state_bytes`` are what
    the larger of the two jobs takes between steps (weights, gradients, optimizer), and ``peak_extra_bytes`` what was
    held beyond that at any time, but for pages that the system may have back.
    """

    seconds: dict[str, float]
    bytes_moved: int
    bytes_minimum: int
    state_bytes: int
    peak_extra_bytes: int


@dataclass
class PlanCache:
    """What was planned, what layouts hold, and what moves go over. One serves one model, one process and one device.

    ``wire``: opened by the first that needs it, on all ranks, where it is not given. ``pages``: of memory let go.
    """

    moves: dict[_Way, tuple[Stream, Checksums]] = field(default_factory=dict)
    holdings: dict[tuple[Layout, bool], list[list[Holding]]] = field(default_factory=dict)
    wire: Wire | None = None
    pages: Pages = field(default_factory=Pages)

    def keep(self, way: _Way, move: tuple[Stream, Checksums]) -> None:
        """Remember how to go ``way``, and forget the one that was planned longest ago where there are many."""
        self.moves[way] = move
        if len(self.moves) > _KEPT_MOVES:
            del self.moves[next(iter(self.moves))]

    def opened_wire(self, device: torch.device, timeout: timedelta) -> Wire:
        """What moves between tensors on ``device`` go over. Collective the first time."""
        if self.wire is None:
            self.wire = open_wire(device, timeout)
        return self.wire


@torch.no_grad()
def reshard(
    old: Job,
    new: Job,
    *,
    plans: PlanCache | None = None,
    chunk_bytes: int | None = None,
    staged: bool | None = None,
) -> ReshardReport:
    """Give ``new`` the weights, optimizer state, step count and loss scale of ``old``. Collective over all processes.

    Hyper-parameters (learning rate, betas, weight decay) are ``new``'s own: they come from its plan's arguments.

    Args:
        old: a job between two steps. Ranks that have no part in it are told where it stands
            (:func:`~copus_ext.adapters.carry.tell_where_it_stands`), so that they carry on what the others carry on.
        new: a job of the same model and precision in any layout, with as many ranks, fewer or more; what it holds is
            lost.
        plans: keeps what is planned, so that going between the same two layouts again costs no planning.
        chunk_bytes: what a rank handles at most at a time; where it is not given, as
            :func:`~copus_ext.core.reshard.streaming.default_limit` says.
        staged: take what is held through pinned host memory, for which a rank must have room there; where it is not
            given, only if a rank has less free on its GPU than moving from device to device takes in between.

    Raises:
        UnsupportedReshard: state that is not covered, or two jobs that do not hold the same logical tensors, on every
            rank and before anything is moved.
        MoveFailed: memory ran out, something could not be read, or bits of a tensor differ, on any rank. ``old``
            has everything again.
    """
    phases = Phases()
    with phases("plan"):
        _refuse_uncovered(old, new)
        finish_gathers(old)
        tell_where_it_stands(old)
        step = largest(optimizer_step(old))
        plans = plans or PlanCache()
        plan, checksums, wire = _planned(old, new, step >= 0, plans, chunk_bytes)
        before, after = old.memory[step >= 0], new.memory[step >= 0]
    try:
        with plans.pages.between(before.nbytes, after.nbytes, after.device):
            with phases("move"):
                ledger = Ledger(before.held, plans.pages)
                after.empty()
                ledger.let_go(gradients(old))
                ledger.let_go(before.kept, before.derived)
                sides = Side(before), Side(after)
                if staged is None:
                    staged = has_to_be_staged(plan, *sides)
            Move(plan, *sides, checksums, wire, ledger, phases, staged).run()
    except MoveFailed:
        if isinstance(plans.wire, MemoryWire):
            plans.wire = None  # to be tried again
        before.fill()
        derive_weights(old)
        raise
    with phases("sync"):
        before.empty()
        if step >= 0:
            set_optimizer_step(new, step)
        else:  # a job that was used before may have moments
            for wrapper in inner_optimizers(new.optimizer):
                wrapper.optimizer.state.clear()
        carry_grad_scaler(old, new)
        if not derive_weights(new, wire):
            plans.wire = None  # to be tried again
    size = max(before.nbytes, after.nbytes)
    minimum = plan.plan.bytes_minimum
    return ReshardReport(phases.seconds, plan.plan.bytes_moved, minimum, size, max(0, ledger.peak - size))


def plan_reshard(old: Job, new: Job, plans: PlanCache) -> None:
    """Plan ahead, into ``plans``, what ``reshard`` does with the same jobs. Collective; raises what it raises then."""
    _refuse_uncovered(old, new)
    _planned(old, new, largest(optimizer_step(old)) >= 0, plans, None)


def _refuse_uncovered(old: Job, new: Job) -> None:
    """By arguments, which are the same on every rank."""
    reason = uncovered(old.args) or uncovered(new.args)
    for name in ("bf16", "fp16", "optimizer", "muon_scalar_optimizer", "padded_vocab_size"):
        before, after = getattr(old.args, name), getattr(new.args, name)
        if before != after:
            reason = reason or f"{name} is {before} in the old job and {after} in the new one"
    if reason:
        raise UnsupportedReshard(reason)


def _planned(
    old: Job, new: Job, with_moments: bool, plans: PlanCache, chunk_bytes: int | None
) -> tuple[Stream, Checksums, Wire]:
    """The plan between two jobs, which each rank makes alone and is heard of if it can't, and the wire. Collective."""
    before, after = _on_every_rank(lambda: [_held_by_all(job, with_moments, plans) for job in (old, new)])
    key = (old.plan.layout, new.plan.layout, with_moments, chunk_bytes)
    if key not in plans.moves:
        memories = old.memory[with_moments], new.memory[with_moments]
        in_one_buffer = _weights_in_one_buffer(old) or _weights_in_one_buffer(new)
        room = _least_room(*memories)

        def planned() -> tuple[Stream, Checksums]:
            plan = plan_transfer(before, after, ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            chunk = chunk_bytes or default_limit(before, after, room) // (_PARTS if in_one_buffer else 1)
            moving = stream(plan, before, after, chunk, weights_first=in_one_buffer)
            return moving, Checksums(plan.keys, after, MOST_MOMENTS, memories[0].device)

        plans.keep(key, _on_every_rank(planned))
    timeout = timedelta(minutes=old.args.distributed_timeout_minutes)
    return *plans.moves[key], plans.opened_wire(old.memory[with_moments].device, timeout)


def _least_room(before: JobMemory, after: JobMemory) -> int:
    """Bytes that the larger of two jobs takes on every rank of theirs beyond what is moved. Collective."""
    largest_job = max(before.nbytes, after.nbytes)
    room = largest_job - max(before.moved_nbytes, after.moved_nbytes)
    return -largest(-max(0, room) if largest_job else -(2**62))


def _on_every_rank[Result](step: Callable[[], Result]) -> Result:
    """What ``step`` gives on this rank, if it gives something on all. Collective.

    Raises:
        UnsupportedReshard: it failed on some rank, of whatever: the others must hear of it, or they wait forever.
    """
    failure = None
    try:
        result = step()
    except (UnsupportedReshard, TransferError) as error:
        failure = f"rank {whole_world().rank()}: {error}"
    except Exception as error:
        failure = f"rank {whole_world().rank()}: {type(error).__name__}: {error}"
    if said := first_failure(failure):
        raise UnsupportedReshard(said)
    return result


def _weights_in_one_buffer(job: Job) -> bool:
    """A distributed optimizer's weights in fp32: memory for all of them comes with the first and goes with the last."""
    return bool(job.args.use_distributed_optimizer and not (job.args.bf16 or job.args.fp16))


def _held_by_all(job: Job, with_moments: bool, plans: PlanCache) -> list[list[Holding]]:
    """By rank, what the job's layout holds; and this rank's memory, if it was not looked at before.

    Ranks of the world that are not the layout's hold nothing.
    """
    memory = job.memory.get(with_moments)
    if memory is None or not memory.is_current:
        memory = job.memory[with_moments] = JobMemory(job, with_moments=with_moments)
    key = (job.plan.layout, with_moments)
    if key not in plans.holdings:
        held = holdings_of_layout(job.plan, job.args, with_moments=with_moments)
        plans.holdings[key] = held + [[] for _ in range(len(held), whole_world().size())]
    if memory.is_held_elsewhere:
        raise UnsupportedReshard(f"memory of a job of {job.plan.layout} is shared with something outside of torch")
    if not memory.state.adopt(plans.holdings[key][whole_world().rank()]):
        raise UnsupportedReshard(f"a job of {job.plan.layout} holds something else than its layout says")
    return plans.holdings[key]
