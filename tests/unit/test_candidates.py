from __future__ import annotations

from dataclasses import replace

import pytest

from copus_ext.core.cost.candidates import infeasible_reason
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.space import Space

MODEL = ModelShape(layers=4, hidden=64, heads=8, kv_heads=2, ffn=256, vocab=512, seq=32)
MOE = replace(MODEL, experts=4, moe_ffn=128)
BASE = Plan(Layout(dp=8), micro_batch=1, global_batch=16)


@pytest.mark.parametrize(
    ("layout", "model", "says"),
    [
        (Layout(tp=3), MODEL, "attention heads 8"),
        (Layout(tp=8), replace(MODEL, ffn=260), "MLP width 260"),
        (Layout(tp=8), replace(MODEL, vocab=513), "padded vocabulary 513"),
        (Layout(tp=4), replace(MODEL, heads=12, kv_heads=6), "6 key-value heads"),
        (Layout(pp=3), MODEL, "4 layers"),
        (Layout(pp=4, vpp=2), MODEL, "virtual pipeline 2"),
        (Layout(vpp=2), MODEL, "needs pipeline parallel"),
        (Layout(dp=2, cp=4), replace(MODEL, seq=36), "2 x context parallel 4"),
        (Layout(tp=8, sequence_parallel=True), replace(MODEL, seq=36), "context x tensor parallel 1 x 8"),
        (Layout(dp=2, ep=2), MODEL, "needs a model with experts"),
        (Layout(dp=3, ep=3), MOE, "4 experts"),
        (Layout(dp=2, tp=2, ep=4, sequence_parallel=True), MOE, "expert parallel 4"),
        (Layout(tp=2), MOE, "needs sequence parallel"),
    ],
)
def test_what_does_not_divide_is_said(layout: Layout, model: ModelShape, says: str) -> None:
    reason = infeasible_reason(Plan(layout, 1, 12), model)
    assert reason is not None
    assert says in reason


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        (Layout(tp=8), MODEL),  # fewer key-value heads than ranks: each is held by several
        (Layout(tp=2), MODEL),
        (Layout(pp=2, vpp=2), MODEL),
        (Layout(dp=4, tp=2, ep=4, sequence_parallel=True), MOE),
        (Layout(dp=2, cp=2, ep=4), MOE),
    ],
)
def test_what_megatron_allows_is_allowed(layout: Layout, model: ModelShape) -> None:
    assert infeasible_reason(Plan(layout, 1, 16), model) is None


def test_interleaving_needs_whole_rounds_of_micro_batches() -> None:
    layout = Layout(pp=2, vpp=2)
    assert infeasible_reason(Plan(layout, 1, 4), MODEL) is None
    assert "not 3" in (infeasible_reason(Plan(layout, 1, 3), MODEL) or "")


def test_candidates_are_exactly_the_feasible_plans() -> None:
    found = Space(mbs=(1, 2, 4), batches=(16, 8)).plans(BASE, MODEL)
    sizes = [(dp, tp, pp) for dp in range(1, 9) for tp in range(1, 9) for pp in range(1, 9) if dp * tp * pp == 8]
    expected = {
        plan
        for dp, tp, pp in sizes
        for batch in (8, 16)
        for micro in (1, 2, 4)
        if batch % (micro * dp) == 0
        and infeasible_reason(plan := Plan(Layout(dp=dp, tp=tp, pp=pp), micro, batch), MODEL) is None
    }
    assert set(found) == expected
    assert len(found) == len(set(found))
    assert BASE in found


def test_order_does_not_depend_on_the_order_asked_in() -> None:
    spaces = (Space(mbs=(2, 1), batches=(8, 16, 8)), Space(mbs=(1, 2), batches=(16, 8)))
    assert spaces[0].plans(BASE, MODEL) == spaces[1].plans(BASE, MODEL)


def test_the_rest_of_the_layout_is_kept_and_interleaving_is_left_where_it_fits() -> None:
    layout = Layout(tp=2, pp=2, vpp=2, dp=2, sequence_parallel=True, distributed_optimizer=True, recompute="full")
    found = Space(mbs=(1, 2, 4), batches=(16,)).plans(Plan(layout, 1, 16), MODEL)
    assert all(plan.layout.distributed_optimizer and plan.layout.recompute == "full" for plan in found)
    assert all(plan.layout.sequence_parallel for plan in found), "a wish that counts where tp > 1"
    assert all(plan.layout.world_size == 8 for plan in found)
    assert {(plan.layout.pp, plan.layout.vpp) for plan in found} == {(1, 1), (2, 1), (2, 2), (4, 1)}


def test_context_parallel_ranks_are_not_given_away() -> None:
    found = Space(batches=(8,)).plans(Plan(Layout(dp=2, cp=2, tp=2), 1, 8), MODEL)
    assert {(p.layout.dp, p.layout.tp, p.layout.pp, p.layout.cp) for p in found} == {
        (dp, tp, pp, 2) for dp, tp, pp in ((4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2), (1, 1, 4))
    }
