"""Every plan of a model on a number of ranks: which Megatron allows, which fit in memory, and how long each takes.

All plans are columns of one table, so a hundred thousand of them take well under a second. Nothing is dropped that
could be the best of its global batch, as far as the predictions go:

* Plans that Megatron refuses, or that need more memory than is there, cannot be run.
* Recomputing more than memory asks for takes longer and changes nothing else, so of plans that differ in nothing else
  only the one that recomputes least and fits is timed. Anything that hides behind computing gets no more time to hide
  than is computed longer, so the step never gets shorter by it.

Two things are left out because they are hardly ever worth it, and not because they cannot be. Naming sizes in
:class:`SearchSpace` lifts both: tensor parallelism beyond the devices of a node, which sends messages in every layer
that nothing can be moved ahead of (``tp_across_nodes`` lifts it as well); and micro-batches that are no power of two.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from copus_ext.core.cost.hardware import Hardware
from copus_ext.core.cost.memory import peak_bytes
from copus_ext.core.cost.memory_model import MOST_OF_MEMORY
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import RunOptions
from copus_ext.core.cost.plan_table import Columns, PlanTable
from copus_ext.core.cost.step_time import StepTimeParts, step_times
from copus_ext.core.plan import RECOMPUTE_CHOICES

Objections = Sequence[tuple[str, Columns]]
PeakBytes = Callable[[PlanTable, ModelShape, RunOptions], Any]

NO_WHOLE_RANKS = "ranks not divisible by tensor x pipeline x context parallel"
NO_WHOLE_STEPS = "global batch not divisible by micro-batch x data parallel"
MORE_RECOMPUTE = "recomputes more than memory asks for, so it is slower"


@dataclass(frozen=True)
class SearchSpace:
    """What to choose from. ``None`` is every size that can be on that many ranks; see the module for what it omits.

    ``counted_as_layers``: embedding and loss, where Megatron counts them as layers when it shares layers out among
    stages: 1 for each of ``--account-for-embedding-in-pipeline-split`` and ``--account-for-loss-in-pipeline-split``.
    """

    global_batches: tuple[int, ...]
    tp: tuple[int, ...] | None = None
    pp: tuple[int, ...] | None = None
    vpp: tuple[int, ...] | None = None
    cp: tuple[int, ...] | None = None
    ep: tuple[int, ...] | None = None
    micro_batches: tuple[int, ...] | None = None
    recompute: tuple[str, ...] = RECOMPUTE_CHOICES
    sequence_parallel: tuple[bool, ...] = (True,)  # where tp > 1
    distributed_optimizer: tuple[bool, ...] = (False, True)
    tp_across_nodes: bool = False
    counted_as_layers: int = 0
    memory_share: float = MOST_OF_MEMORY


@dataclass(frozen=True)
class SearchResult:
    """Plans that can be run, timed; and what became of the others.

    ``table``, ``parts`` and ``memory`` [bytes on the fullest rank] have n rows each. ``considered`` counts every
    combination, ``candidates`` those that Megatron allows. ``smallest`` are, by global batch, the plan among these
    that needs least memory and its bytes, whether it fits or not.
    """

    table: PlanTable
    parts: StepTimeParts
    memory: Columns
    ruled_out: dict[str, int]  # plans by reason, most first
    considered: int
    candidates: int
    smallest: dict[int, tuple[PlanTable, float]]
    seconds_to_score: float

    def best(self, global_batch: int, top: int = 1) -> Columns:
        """Rows of the ``top`` fastest plans with that global batch, fastest first."""
        rows = np.flatnonzero(self.table.global_batch == global_batch)
        ordered: Columns = rows[np.argsort(self.parts.total[rows], kind="stable")]
        return ordered[:top]


def search_plans(
    model: ModelShape,
    hardware: Hardware,
    ranks: int,
    space: SearchSpace,
    options: RunOptions | None = None,
    memory_of: PeakBytes = peak_bytes,
) -> SearchResult:
    """Every plan of ``space`` for ``model`` on ``ranks`` devices, timed where it can be run.

    Args:
        ranks: devices, whole nodes or part of one.
        memory_of: bytes on the fullest rank of each plan of a table, [n].
    """
    start, options = time.perf_counter(), options or RunOptions()
    ruled_out: Counter[str] = Counter()
    allowed, considered = _allowed_plans(model, hardware.devices_per_node, ranks, space, ruled_out)
    table, memory, smallest = _fitting_plans(allowed, model, hardware, space, options, memory_of, ruled_out)
    parts = step_times(table, model, hardware, options)
    return SearchResult(
        table=table,
        parts=parts,
        memory=memory,
        ruled_out=dict(ruled_out.most_common()),
        considered=considered,
        candidates=len(allowed) * len(space.recompute),
        smallest=smallest,
        seconds_to_score=time.perf_counter() - start,
    )


# -- what Megatron allows


def allowed_plans(model: ModelShape, ranks: int, space: SearchSpace) -> PlanTable:
    """Every plan of ``space`` that Megatron allows, whether it fits in memory or not; tp across nodes, too."""
    table, _ = _allowed_plans(model, ranks, ranks, space, Counter())
    choices = np.array([RECOMPUTE_CHOICES.index(choice) for choice in space.recompute], dtype=np.int64)
    rows, recompute = _grid(np.arange(len(table)), choices)
    return replace(table.take(rows), recompute=recompute)


def objections(table: PlanTable, model: ModelShape, counted_as_layers: int = 0) -> Objections:
    """Reasons against plans, each with the plans [n] that it holds for; the rules of ``candidates.infeasible_reason``.

    That names what is wrong with one plan; this sorts a hundred thousand.
    """
    return [*_layout_objections(table, model, counted_as_layers), *_batch_objections(table)]


def _layout_objections(table: PlanTable, model: ModelShape, counted_as_layers: int) -> Objections:
    """All rules that batch sizes have no part in."""
    tp, stages, cp, ep = table.tp, table.pp * table.vpp, table.cp, table.ep
    width = model.moe_ffn if model.experts else model.ffn
    sp = table.sequence_parallel
    return [
        ("attention heads not divisible by tensor parallel", model.heads % tp != 0),
        ("MLP width not divisible by tensor parallel", width % tp != 0),
        ("padded vocabulary not divisible by tensor parallel", model.vocab % tp != 0),
        (
            "key-value heads neither a multiple nor a divisor of tensor parallel",
            (model.kv_heads % tp != 0) & (tp % model.kv_heads != 0),
        ),
        ("virtual pipeline needs pipeline parallel", (table.vpp > 1) & (table.pp == 1)),
        ("layers not divisible by pipeline stages x chunks", (model.layers + counted_as_layers) % stages != 0),
        ("sequence length not divisible by 2 x context parallel", (cp > 1) & (model.seq % (2 * cp) != 0)),
        ("sequence length not divisible by context x tensor parallel", sp & (model.seq % (cp * tp) != 0)),
        ("expert parallel needs experts", (ep > 1) & (not model.experts)),
        ("experts not divisible by expert parallel", model.experts % ep != 0),
        ("data x context parallel not divisible by expert parallel", table.dp * cp % ep != 0),
        ("experts with tensor parallel need sequence parallel", bool(model.experts) & (tp > 1) & ~sp),
    ]


def _batch_objections(table: PlanTable) -> Objections:
    uneven = (table.vpp > 1) & (table.num_microbatches % table.pp != 0)
    return [("micro-batches not divisible by stages (interleaving)", uneven)]


def _allowed_plans(
    model: ModelShape, devices_per_node: int, ranks: int, space: SearchSpace, ruled_out: Counter[str]
) -> tuple[PlanTable, int]:
    """Plans that Megatron allows, with one recompute choice each, and the number of all combinations.

    Layouts first and batches after, so that a layout is judged once and not once per batch.
    """
    layouts = _layouts(model, devices_per_node, ranks, space)
    batches = _grid(_micro_batches(space), np.unique(space.global_batches))
    optimizers = np.unique(space.distributed_optimizer)
    per_layout = len(batches[0]) * len(optimizers) * len(space.recompute)
    whole = ranks % (layouts.tp * layouts.pp * layouts.cp) == 0
    against = [(NO_WHOLE_RANKS, ~whole), *_layout_objections(layouts, model, space.counted_as_layers)]
    kept = layouts.take(_sift(against, ruled_out, per_layout))
    rows, batch, sharded = _grid(np.arange(len(kept)), np.arange(len(batches[0])), optimizers)
    plans = replace(
        kept.take(rows),
        micro_batch=batches[0][batch],
        global_batch=batches[1][batch],
        distributed_optimizer=sharded,
    )
    uneven = plans.global_batch % (plans.micro_batch * plans.dp) != 0
    against = [(NO_WHOLE_STEPS, uneven), *_batch_objections(plans)]
    return plans.take(_sift(against, ruled_out, len(space.recompute))), len(layouts) * per_layout


def _sift(against: Objections, ruled_out: Counter[str], weight: int) -> Columns:
    """[n] whether nothing speaks against a row; the first thing that does is counted, ``weight`` times."""
    kept = np.ones_like(against[0][1], dtype=np.bool_)
    for reason, holds in against:
        if lost := int(np.count_nonzero(kept & holds)):
            ruled_out[reason] += lost * weight
        kept &= ~holds
    return kept


# -- what there is to choose from


def _layouts(model: ModelShape, devices_per_node: int, ranks: int, space: SearchSpace) -> PlanTable:
    """All combinations of sizes that somebody may ask for, which may be impossible; dp may be no whole number."""
    divisors = _divisors(ranks)
    own_tp = divisors if space.tp_across_nodes else divisors[divisors <= devices_per_node]
    tp, pp, vpp, cp, ep, sp = _grid(
        _chosen(space.tp, own_tp),
        _chosen(space.pp, divisors[divisors <= model.layers + space.counted_as_layers]),
        _chosen(space.vpp, _divisors(model.layers + space.counted_as_layers)),
        _chosen(space.cp, divisors[divisors <= model.seq]),
        _chosen(space.ep, _divisors(max(1, model.experts))),
        np.unique(space.sequence_parallel),
    )
    asked = (tp > 1) | (sp == sp.min(initial=True))  # at tp 1 it says nothing, so one value is enough
    if space.vpp is None:
        asked &= (pp > 1) | (vpp == 1)
    if None in (space.tp, space.pp, space.cp):
        asked &= tp * pp * cp <= ranks
    tp, pp, vpp, cp, ep, sp = (column[asked] for column in (tp, pp, vpp, cp, ep, sp))
    ones = np.ones_like(tp)
    return PlanTable(
        dp=ranks / (tp * pp * cp),
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        ep=ep,
        sequence_parallel=(sp > 0) & (tp > 1),
        distributed_optimizer=ones > 1,
        recompute=np.zeros(tp.shape, dtype=np.int64),
        micro_batch=ones,
        global_batch=ones,
    )


def _micro_batches(space: SearchSpace) -> Columns:
    largest = max(space.global_batches)
    return _chosen(space.micro_batches, 2.0 ** np.arange(int(largest).bit_length()))


def _chosen(given: tuple[int, ...] | None, otherwise: Columns) -> Columns:
    return np.asarray(otherwise, dtype=np.float64) if given is None else np.unique(given).astype(np.float64)


def _divisors(number: int) -> Columns:
    small = np.arange(1, math.isqrt(number) + 1)
    small = small[number % small == 0]
    return np.unique(np.concatenate([small, number // small]))


def _grid(*choices: Columns) -> list[Columns]:
    """Every combination of the choices: one column for each of them."""
    return [column.ravel() for column in np.meshgrid(*choices, indexing="ij")]


# -- what fits


def _fitting_plans(
    allowed: PlanTable,
    model: ModelShape,
    hardware: Hardware,
    space: SearchSpace,
    options: RunOptions,
    memory_of: PeakBytes,
    ruled_out: Counter[str],
) -> tuple[PlanTable, Columns, dict[int, tuple[PlanTable, float]]]:
    """Of each plan the variant that recomputes least and fits: [n] plans and their bytes; and the smallest ones."""
    choices = np.array(sorted(RECOMPUTE_CHOICES.index(choice) for choice in set(space.recompute)), dtype=np.int64)
    variants = [replace(allowed, recompute=np.full(len(allowed), choice)) for choice in choices]
    needed = np.array([memory_of(variant, model, options) for variant in variants]).reshape(len(choices), -1)
    limit = space.memory_share * hardware.memory_bytes
    fits = needed <= limit
    first = np.argmax(fits, axis=0)  # the first that fits; 0 where none does
    rows = np.flatnonzero(fits.any(axis=0))
    too_large = np.where(fits.any(axis=0), first, len(choices))
    if lost := int(too_large.sum()):
        ruled_out[_too_large(needed[~fits], limit, hardware, space)] += lost
    if slower := int((len(choices) - 1 - first[rows]).sum()):
        ruled_out[MORE_RECOMPUTE] += slower
    table = replace(allowed.take(rows), recompute=choices[first[rows]])
    return table, needed[first[rows], rows], _smallest(variants, needed)


def _too_large(needed: Columns, limit: float, hardware: Hardware, space: SearchSpace) -> str:
    least, most, room, whole = (_gib(size) for size in (needed.min(), needed.max(), limit, hardware.memory_bytes))
    share = f"{100 * space.memory_share:.0f} %"
    return f"does not fit: needs {least} to {most} GiB, and {room} may be taken ({share} of {whole})"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f}" if size < 100 * 2**30 else f"{size / 2**30:,.0f}"


def _smallest(variants: list[PlanTable], needed: Columns) -> dict[int, tuple[PlanTable, float]]:
    """By global batch the plan that needs least memory, as a table of one row, and its bytes."""
    found = {}
    for batch in np.unique(variants[0].global_batch):
        rows = np.flatnonzero(variants[0].global_batch == batch)
        choice, row = np.unravel_index(np.argmin(needed[:, rows]), (len(variants), len(rows)))
        found[int(batch)] = (variants[choice].take(rows[[row]]), float(needed[choice, rows[row]]))
    return found
