"""The closed form of memory: by hand, after the papers, and what must hold for any plan."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from copus_ext.core.cost.memory import MemoryParts, memory_parts, peak_bytes
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import RunOptions
from copus_ext.core.cost.plan_table import PlanTable
from copus_ext.core.plan import Layout, Plan

# The model of Korthikanti et al. 2022: two bytes, four times wider MLP, dropout, tied embeddings, scores in memory.
PAPER = ModelShape(layers=48, hidden=1024, heads=16, kv_heads=16, ffn=4096, vocab=512, seq=2048, param_bytes=2)
FLASH = replace(PAPER, flash_attention=True)
DROPOUT, NO_DROPOUT = RunOptions(dropout=True), RunOptions()
EXPERTS = replace(FLASH, experts=8, experts_per_token=2, moe_ffn=2048, gated=True)
UNIT = PAPER.seq * PAPER.hidden  # s b h with one sequence
SCORES = 5 * PAPER.heads * PAPER.seq / PAPER.hidden


def _parts(layout: Layout, model: ModelShape, options: RunOptions = NO_DROPOUT, micro_batches: int = 64) -> MemoryParts:
    table = PlanTable.of([Plan(layout, 1, layout.dp * micro_batches)])
    return MemoryParts(*(float(column[0]) for column in memory_parts(table, model, options).columns()))


def _layer_bytes(layout: Layout, model: ModelShape, options: RunOptions = DROPOUT) -> float:
    """Activations that one layer more keeps, without pipeline stages."""
    more = replace(model, layers=model.layers + 1)
    return _parts(layout, more, options).activations - _parts(layout, model, options).activations


@pytest.mark.parametrize(
    ("param_bytes", "gradient_bytes", "whole", "shared"), [(2, 4, 6, 12), (2, 2, 4, 12), (4, 4, 8, 8)]
)
def test_state_is_eighteen_bytes_a_parameter_in_bf16(
    param_bytes: int, gradient_bytes: int, whole: int, shared: int
) -> None:
    """Rajbhandari et al. 2020, figure 1, with Megatron's fp32 gradients; fp32 training has no second parameters."""
    wide = replace(PAPER, layers=2, hidden=8192, ffn=32768, param_bytes=param_bytes)
    options = RunOptions(gradient_bytes=gradient_bytes)
    plain = _parts(Layout(dp=4, cp=2), wide, options)
    sharded = _parts(Layout(dp=4, cp=2, distributed_optimizer=True), wide, options)
    assert plain.state / wide.params == pytest.approx(whole + shared, rel=1e-3)
    assert sharded.state / wide.params == pytest.approx(whole + shared / 8, rel=1e-3)
    assert plain.gradients == pytest.approx(plain.parameters * gradient_bytes / param_bytes)


def test_experts_are_cut_by_ep_and_their_optimizer_by_what_is_left_of_the_replicas() -> None:
    experts = EXPERTS.layers * EXPERTS.experts * EXPERTS.mlp_params
    dense = EXPERTS.layers * EXPERTS.attention_params + EXPERTS.embedding_params
    parts = _parts(Layout(dp=8, tp=2, ep=4, distributed_optimizer=True), EXPERTS)
    assert parts.optimizer == pytest.approx(12 * (dense / 2 / 8 + experts / (2 * 4) / (8 / 4)), rel=2e-3)
    assert parts.parameters == pytest.approx(2 * (dense / 2 + experts / (2 * 4)), rel=2e-3)


def test_untied_embeddings_are_two_on_one_stage_and_one_on_each_end() -> None:
    wide = replace(FLASH, vocab=100_000, layers=4)
    one = 2 * wide.embedding_params
    assert (
        _parts(Layout(), replace(wide, tied=False), micro_batches=1).parameters - _parts(Layout(), wide).parameters
        == one
    )
    assert _parts(Layout(pp=4), replace(wide, tied=False)).parameters == _parts(Layout(pp=4), wide).parameters


@pytest.mark.parametrize(
    ("tp", "sp", "recompute", "expected"),  # table 2 of the paper, in s b h
    [
        (1, False, "none", 34 + SCORES),
        (8, False, "none", 10 + 24 / 8 + SCORES / 8),
        (8, True, "none", 34 / 8 + SCORES / 8),
        (8, False, "selective", 10 + 24 / 8),
        (8, True, "selective", 34 / 8),
        (8, False, "full", 2),
        (8, True, "full", 2 / 8),
    ],
)
def test_a_layer_keeps_what_the_paper_says(tp: int, sp: bool, recompute: str, expected: float) -> None:
    layout = Layout(tp=tp, sequence_parallel=sp, recompute=recompute)
    assert _layer_bytes(layout, PAPER) == pytest.approx(UNIT * expected)


@pytest.mark.parametrize(
    ("model", "options", "in_units"),
    [
        (FLASH, RunOptions(), 32),  # no masks
        (replace(FLASH, kv_heads=4), RunOptions(), 32 - 2 * 2 * 3 / 4),  # a quarter of keys and values
        (replace(FLASH, gated=True), RunOptions(), 32 + 8 + 4),  # two inputs of the activation function, rotated copies
        (replace(FLASH, param_bytes=4), DROPOUT, 2 * 32 + 2),  # a mask stays one byte
        (
            EXPERTS,
            RunOptions(),
            8 + 8 + 4 + 2 * (2 + 6 * 2),
        ),  # for each of two experts a copy, three values of width 2 h
        # norms, two linear inputs; queries, keys, values, what attention gives, and that again in fp8; the MLP
        (FLASH, RunOptions(fp8=True), 4 + 2 + 8 + 1 + 8 + 4),
    ],
)
def test_a_layer_of_other_models(model: ModelShape, options: RunOptions, in_units: float) -> None:
    assert _layer_bytes(Layout(), model, options) == pytest.approx(UNIT * in_units)


def test_context_parallel_ranks_share_the_tokens() -> None:
    assert _layer_bytes(Layout(cp=4), PAPER) == pytest.approx(_layer_bytes(Layout(), PAPER) / 4)


def test_the_first_of_p_stages_has_p_micro_batches_in_flight_or_all_there_are() -> None:
    whole = _parts(Layout(), FLASH).activations
    for pp in (2, 4, 8):
        for micro_batches in (1, 2, 3, 8, 64):
            held = _parts(Layout(pp=pp), FLASH, micro_batches=micro_batches).activations
            assert held == pytest.approx(whole * min(pp, micro_batches) / pp, rel=0.02)


def test_where_logits_outweigh_the_last_stage_is_the_fullest() -> None:
    large = replace(FLASH, vocab=1_000_000)
    layout = Layout(pp=4, tp=2)
    parts = _parts(layout, large, DROPOUT)
    assert parts.logits == PAPER.seq * 1_000_000 / 2 * (2 + 4), "as the product gives them, and in fp32 for the loss"
    assert parts.activations == pytest.approx(UNIT * ((10 + 24 / 2) * 48 / 4 + 4)), "one micro-batch in flight"
    assert _parts(layout, replace(large, param_bytes=4)).logits == PAPER.seq * 1_000_000 / 2 * 4
    assert _parts(layout, FLASH).logits == 0, "not on the first stage"


def test_interleaving_costs_the_published_penalty() -> None:
    """Korthikanti et al. 2022, section 4.2.3: 1 + (p - 1) / (p v)."""
    plain = _parts(Layout(pp=4), FLASH).activations
    for vpp in (2, 3, 4):
        held = _parts(Layout(pp=4, vpp=vpp), FLASH).activations
        assert held / plain == pytest.approx(1 + 3 / (4 * vpp))
    assert _parts(Layout(pp=4, vpp=4), FLASH, micro_batches=4).activations == pytest.approx(plain), "there are no more"


def test_full_recompute_works_on_one_layer_at_a_time() -> None:
    layout = Layout(recompute="full")
    parts = _parts(layout, PAPER, DROPOUT)
    gradients = max(2 * 2 * PAPER.heads * PAPER.seq / PAPER.hidden, 2 * 4 * 2) + 2 * 2
    one_layer = UNIT * (34 + SCORES + gradients)
    assert parts.workspace + parts.logits == pytest.approx(one_layer)
    assert _parts(layout, replace(PAPER, layers=96), DROPOUT).workspace == parts.workspace
    assert _parts(Layout(recompute="selective"), PAPER, DROPOUT).workspace == pytest.approx(
        UNIT * (SCORES + gradients) - parts.logits
    )


def test_fp32_gradients_of_a_step_take_the_place_of_activations() -> None:
    """Half-precision gradient buffers are cast for the optimizer, when all activations are gone."""
    short = replace(FLASH, seq=1)
    parts = _parts(Layout(), short, RunOptions(gradient_bytes=2))
    assert parts.activations + parts.logits + parts.workspace == pytest.approx(parts.optimizer / 3)
    long = _parts(Layout(), FLASH, RunOptions(gradient_bytes=2))
    assert long.workspace == _parts(Layout(), FLASH).workspace


def test_stages_in_the_middle_are_the_fullest_where_layers_do_not_divide_evenly() -> None:
    uneven = _parts(Layout(pp=4), replace(FLASH, layers=14), micro_batches=1)
    even = _parts(Layout(pp=4), replace(FLASH, layers=16), micro_batches=1)
    assert uneven.activations == pytest.approx(even.activations, rel=0.05), "3 + 4 + 4 + 3 layers"


def test_what_a_process_holds_of_its_device_is_added() -> None:
    plans = PlanTable.of([Plan(Layout(), 1, 1), Plan(Layout(pp=2), 1, 4)])
    more = peak_bytes(plans, FLASH, RunOptions(context_bytes=2e9)) - peak_bytes(plans, FLASH)
    np.testing.assert_allclose(more, 2e9)


def _random_plans(count: int) -> PlanTable:
    """Plans of 24 layers that divide evenly."""
    random = np.random.default_rng(5)

    def power(highest: int) -> np.ndarray:
        return 2.0 ** random.integers(0, highest + 1, count)

    pp = power(2)
    vpp = np.where((pp > 1) & (random.random(count) < 0.5), random.choice([2.0, 3.0], count), 1.0)
    dp, micro_batch = power(4), power(3)
    micro_batches = pp * random.integers(1, 9, count)
    sequence_parallel, zero1 = random.random((2, count)) < 0.5
    return PlanTable(
        dp=dp,
        tp=power(3),
        pp=pp,
        vpp=vpp,
        cp=power(1),
        ep=np.minimum(dp, power(2)),
        sequence_parallel=sequence_parallel,
        distributed_optimizer=zero1,
        recompute=random.integers(0, 3, count),
        micro_batch=micro_batch,
        global_batch=dp * micro_batch * micro_batches,
    )


MODELS = [replace(model, layers=24) for model in (PAPER, EXPERTS, replace(PAPER, param_bytes=4, vocab=200_000))]


@pytest.mark.parametrize("model", MODELS)
def test_what_holds_for_any_plan(model: ModelShape) -> None:
    table = _random_plans(2000)
    parts, peak = memory_parts(table, model, DROPOUT), peak_bytes(table, model, DROPOUT)
    assert all(np.all(column >= 0) for column in parts.columns())
    np.testing.assert_allclose(parts.total, peak)

    def changed(**columns: object) -> PlanTable:
        return replace(table, **columns)  # type: ignore[arg-type]

    def never_more(other: PlanTable, what: str) -> None:
        less = memory_parts(other, model, DROPOUT)
        assert np.all(getattr(less, what) <= getattr(parts, what) * (1 + 1e-12)), what

    batch = {"micro_batch": 2 * table.micro_batch, "global_batch": 2 * table.global_batch}
    assert np.all(peak_bytes(changed(**batch), model, DROPOUT) > peak), "a larger micro-batch needs more"
    assert np.all(peak_bytes(changed(global_batch=2 * table.global_batch), model, DROPOUT) >= peak)
    never_more(changed(distributed_optimizer=np.full(2000, True)), "total")
    never_more(changed(sequence_parallel=np.full(2000, True)), "total")
    never_more(changed(tp=2 * table.tp), "total")
    never_more(changed(cp=2 * table.cp), "total")
    wide = {"pp": 2 * table.pp, "vpp": np.ones(2000), "global_batch": 2 * table.global_batch}
    few_ends = model if model.vocab < 1000 else replace(model, vocab=512)
    deeper = memory_parts(changed(**wide), few_ends, DROPOUT).state
    assert np.all(deeper <= memory_parts(table, few_ends, DROPOUT).state * (1 + 1e-12))
    kept = [memory_parts(changed(recompute=np.full(2000, kind)), few_ends, DROPOUT).activations for kind in range(3)]
    assert np.all(kept[1] <= kept[0])
    assert np.all(kept[2] < kept[1])


def test_a_plan_needs_the_same_alone_and_among_others() -> None:
    table = _random_plans(20)
    together = memory_parts(table, EXPERTS)
    for row in range(len(table)):
        alone = memory_parts(PlanTable.of([table.plan(row)]), EXPERTS)
        for field in fields(MemoryParts):
            np.testing.assert_allclose(getattr(alone, field.name)[0], getattr(together, field.name)[row])
