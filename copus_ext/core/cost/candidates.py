"""Which plans a job may choose from, by Megatron's own rules of what divides what (megatron-core 0.19.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.plan_table import PlanTable
from copus_ext.core.plan import Layout, Plan


def infeasible_reason(plan: Plan, model: ModelShape) -> str | None:
    """Why ``model`` cannot be trained with ``plan``, in one sentence; None if nothing here speaks against it.

    Necessary, not sufficient: flags that are not part of a plan are for upstream's own validation. Experts are taken
    to be split over tensor parallelism as the rest is, which is upstream's default.
    """
    return next(_objections(plan, model), None)


def _objections(plan: Plan, model: ModelShape) -> Iterator[str]:
    yield from _tensor_objections(plan.layout, model)
    yield from _pipeline_objections(plan, model)
    yield from _sequence_objections(plan.layout, model)
    yield from _expert_objections(plan.layout, model)


def _tensor_objections(layout: Layout, model: ModelShape) -> Iterator[str]:
    """TransformerConfig.__post_init__ for heads; the parallel linear and embedding layers for widths.

    The hidden size itself is never split: the output projection takes heads x head size, which the heads settle. Fewer
    key-value heads than ranks are replicated.
    """
    tp = layout.tp
    width = model.moe_ffn if model.experts else model.ffn
    for name, size in (("attention heads", model.heads), ("MLP width", width), ("padded vocabulary", model.vocab)):
        if size % tp:
            yield f"{name} {size} is not divisible by tensor parallel {tp}"
    if model.kv_heads % tp and tp % model.kv_heads:
        yield f"{model.kv_heads} key-value heads are neither a multiple nor a divisor of tensor parallel {tp}"


def _pipeline_objections(plan: Plan, model: ModelShape) -> Iterator[str]:
    """validate_args for layers; forward_backward_pipelining_with_interleaving for the number of micro-batches."""
    layout = plan.layout
    if model.layers % (layout.pp * layout.vpp):
        chunks = f" x virtual pipeline {layout.vpp}" if layout.vpp > 1 else ""
        yield f"{model.layers} layers are not divisible by pipeline parallel {layout.pp}{chunks}"
    if layout.vpp > 1 and layout.pp == 1:
        yield f"virtual pipeline {layout.vpp} needs pipeline parallel > 1"
    if layout.vpp > 1 and plan.num_microbatches % layout.pp:
        yield f"virtual pipeline needs micro-batches in multiples of {layout.pp} stages, not {plan.num_microbatches}"


def _sequence_objections(layout: Layout, model: ModelShape) -> Iterator[str]:
    """validate_args: each context-parallel rank takes one slice from either end of the sequence."""
    if layout.cp > 1 and model.seq % (2 * layout.cp):
        yield f"sequence length {model.seq} is not divisible by 2 x context parallel {layout.cp}"
    if layout.sequence_parallel and model.seq % (layout.cp * layout.tp):
        yield f"sequence length {model.seq} is not divisible by context x tensor parallel {layout.cp} x {layout.tp}"


def _expert_objections(layout: Layout, model: ModelShape) -> Iterator[str]:
    """validate_args, initialize_model_parallel and MoELayer.forward."""
    if layout.ep > 1 and not model.experts:
        yield f"expert parallel {layout.ep} needs a model with experts"
    if model.experts % layout.ep:
        yield f"{model.experts} experts are not divisible by expert parallel {layout.ep}"
    if layout.dp * layout.cp % layout.ep:
        yield f"data x context parallel {layout.dp} x {layout.cp} is not divisible by expert parallel {layout.ep}"
    if model.experts and layout.tp > 1 and not layout.sequence_parallel:
        yield "a mixture of experts with tensor parallel needs sequence parallel"


@dataclass(frozen=True)
class Candidates(Sequence[Plan]):
    """Plans in a fixed order, each once; with what a decision about ten thousand of them needs worked out once."""

    plans: tuple[Plan, ...]

    @classmethod
    def of_table(cls, table: PlanTable) -> Candidates:
        """The rows of a table."""
        return cls(tuple(table.plans()))

    @overload
    def __getitem__(self, index: int) -> Plan: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Plan, ...]: ...
    def __getitem__(self, index: int | slice) -> Plan | tuple[Plan, ...]:
        return self.plans[index]

    def __len__(self) -> int:
        return len(self.plans)

    @cached_property
    def table(self) -> PlanTable:
        """The plans as columns."""
        return PlanTable.of(self.plans)

    @cached_property
    def row_of(self) -> dict[Plan, int]:
        """Where each plan stands."""
        return {plan: row for row, plan in enumerate(self.plans)}

    @cached_property
    def layouts(self) -> tuple[tuple[Layout, ...], NDArray[np.int64]]:
        """The layouts there are, and [n] the number of each plan's."""
        numbers: dict[Layout, int] = {}
        ids = np.array([numbers.setdefault(plan.layout, len(numbers)) for plan in self.plans], dtype=np.int64)
        return tuple(numbers), ids

    def with_first(self, plan: Plan) -> Candidates:
        """The same, led by ``plan`` where it is not among them."""
        return self if plan in self.row_of else Candidates((plan, *self.plans))
