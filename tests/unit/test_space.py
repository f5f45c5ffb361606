"""The space of plans: what the flag says, and what is kept away from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from copus_ext.core.cost.candidates import infeasible_reason
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.errors import UserError
from copus_ext.core.noise.grouping import (
    MIN_GROUPS,
    StepShape,
    grouping_of,
    why_avoided,
    why_unmeasurable,
    why_unmeasurable_in_a_run,
)
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.space import parse_space

MODEL = ModelShape(layers=8, hidden=64, heads=8, kv_heads=8, ffn=256, vocab=512, seq=32)
BASE = Plan(Layout(dp=4), 2, 16)


def test_by_default_every_layout_and_batches_a_factor_16_around() -> None:
    space = parse_space("")
    assert space.global_batches(BASE) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    plans = space.plans(BASE, MODEL)
    assert {(p.layout.tp, p.layout.pp) for p in plans} == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}
    assert {p.micro_batch for p in plans} == {1, 2}
    assert all(p.layout.world_size == 4 for p in plans)


def test_the_flag_narrows_it() -> None:
    plans = parse_space("tp=1 pp=1,4 mbs=4 gbs=16..32").plans(BASE, MODEL)
    assert {(p.layout.pp, p.micro_batch, p.global_batch) for p in plans} == {
        (1, 4, 16),
        (1, 4, 32),
        (4, 4, 16),
        (4, 4, 32),
    }


def test_every_dimension_can_be_opened() -> None:
    text = "tp=1,2 pp=2 vpp=any mbs=any recompute=none,full zero1=any sp=on,off gbs=16,48"
    plans = parse_space(text).plans(BASE, MODEL)
    layouts = {plan.layout for plan in plans}
    assert {layout.recompute for layout in layouts} == {"none", "full"}
    assert {layout.distributed_optimizer for layout in layouts} == {True, False}
    assert {layout.vpp for layout in layouts} == {1, 2, 4}
    assert {layout.sequence_parallel for layout in layouts if layout.tp == 2} == {True, False}
    assert {layout.sequence_parallel for layout in layouts if layout.tp == 1} == {False}, "at tp 1 it says nothing"
    assert {plan.micro_batch for plan in plans} == {1, 2, 4, 8, 16}
    assert {plan.global_batch for plan in plans} == {16, 48}
    assert len(set(plans)) == len(plans)
    assert all(infeasible_reason(plan, MODEL) is None for plan in plans)


def test_a_space_of_one_plan_leaves_nothing_to_choose_from() -> None:
    assert BASE in parse_space("tp=1 gbs=16").candidates(BASE, MODEL).row_of
    for text in ("tp=3", "tp=1 pp=1 mbs=2 gbs=16"):
        with pytest.raises(UserError, match=f"--copus-space leaves nothing to choose from but {BASE} on 4 ranks"):
            parse_space(text).candidates(BASE, MODEL)


def test_a_batch_that_is_named_is_there() -> None:
    assert parse_space("gbs=12").global_batches(Plan(Layout(dp=4), 1, 8)) == [8, 12]
    assert parse_space("gbs=8..12").global_batches(Plan(Layout(dp=4), 1, 8)) == [8]


def test_experts_and_context_are_left_as_they_are_unless_they_are_named() -> None:
    experts = replace(MODEL, experts=4, moe_ffn=64)
    base = Plan(Layout(dp=2, cp=2, ep=2), 1, 8)
    assert {(p.layout.cp, p.layout.ep) for p in parse_space("tp=1 pp=1").plans(base, experts)} == {(2, 2)}
    opened = parse_space("tp=1 pp=1 cp=1,2 ep=any").plans(base, experts)
    assert {(p.layout.cp, p.layout.ep) for p in opened} == {(cp, ep) for cp in (1, 2) for ep in (1, 2, 4)}


def test_the_plan_of_the_flags_is_found_again_whatever_it_wishes_at_tp_1() -> None:
    for wish in (True, False):
        base = Plan(Layout(dp=4, sequence_parallel=wish, distributed_optimizer=True), 2, 16)
        assert base in parse_space("").plans(base, MODEL).row_of


@pytest.mark.parametrize(
    "text", ["dp=4", "tp", "tp=x", "tp=0", "gbs=8..4", "tp=1 tp=2", "recompute=some", "zero1=yes", "gbs=any"]
)
def test_what_is_not_understood_names_the_flag(text: str) -> None:
    with pytest.raises(UserError, match="--copus-space"):
        parse_space(text)


def test_slices_are_equal_and_as_few_as_give_enough_groups() -> None:
    for dp in (1, 2, 4):
        for micro_batches in range(1, 25):
            plan = Plan(Layout(dp=dp), 1, dp * micro_batches)
            slices = grouping_of(StepShape.of(plan)).slices
            assert micro_batches % slices == 0
            fewer = [s for s in range(1, slices) if micro_batches % s == 0]
            assert all(s * dp < MIN_GROUPS for s in fewer)
            assert slices * dp >= MIN_GROUPS or slices == micro_batches


def test_plans_that_hide_the_noise_are_avoided_unless_the_flags_hide_it_anyway() -> None:
    one_group = Plan(Layout(tp=4), 16, 16)
    assert why_unmeasurable(StepShape.of(one_group))
    assert why_avoided(one_group, BASE)
    assert why_avoided(Plan(Layout(pp=4), 8, 16), BASE), "two groups where there could be four"
    assert why_avoided(Plan(Layout(pp=4), 4, 16), BASE) is None
    assert why_avoided(Plan(Layout(pp=4), 8, 16), one_group) is None


def test_an_estimator_that_was_asked_for_keeps_a_run_where_it_can_read() -> None:
    base, pipeline = Plan(Layout(dp=2, tp=2), 1, 8), Plan(Layout(tp=2, pp=2), 1, 8)
    assert "two data-parallel ranks" in (why_avoided(pipeline, base, "dp-groups") or "")
    assert why_avoided(pipeline, base, "slices") is None
    assert why_avoided(base, base, "dp-groups") is None, "a run is not kept away from its own plan"
    assert why_avoided(base.with_batch(2), base, "dp-groups") is None, "as many groups as in its own plan"
    assert "2 groups" in (why_avoided(base, Plan(Layout(dp=4), 1, 8), "dp-groups") or "")


def test_norm_layers_are_measured_where_they_can_be_corrected() -> None:
    one_micro_batch = StepShape.of(Plan(Layout(tp=4), 8, 8))
    assert why_unmeasurable(one_micro_batch, "layernorm") is None, "eight sequences are eight groups"
    assert "one micro-batch" in (why_unmeasurable_in_a_run(one_micro_batch, "layernorm") or "")
    assert why_avoided(Plan(Layout(tp=4), 8, 8), Plan(Layout(dp=4), 1, 8), "layernorm")


@pytest.mark.parametrize(
    ("shape", "estimator", "slices", "dense", "experts"),
    [
        (StepShape(dp=8, edp=8, cp=1, ep=1, micro_batch=1, num_microbatches=4), "auto", 1, 8, 8),
        (StepShape(dp=8, edp=8, cp=1, ep=1, micro_batch=1, num_microbatches=4), "slices", 1, 8, 8),
        (StepShape(dp=2, edp=2, cp=1, ep=1, micro_batch=1, num_microbatches=6), "auto", 2, 4, 4),
        (StepShape(dp=8, edp=2, cp=1, ep=4, micro_batch=1, num_microbatches=4), "sketch", 2, 16, 4),
        (StepShape(dp=8, edp=1, cp=1, ep=8, micro_batch=1, num_microbatches=2), "sketch", 2, 16, 2),
        (StepShape(dp=2, edp=4, cp=2, ep=1, micro_batch=1, num_microbatches=8), "auto", 2, 4, 4),
        (StepShape(dp=2, edp=2, cp=1, ep=1, micro_batch=3, num_microbatches=2), "layernorm", 1, 12, 12),
    ],
)
def test_groups_by_estimator(shape: StepShape, estimator: str, slices: int, dense: int, experts: int) -> None:
    assert why_unmeasurable(shape, estimator) is None
    assert grouping_of(shape, estimator)[1:] == (slices, dense, experts)


@pytest.mark.parametrize(
    ("shape", "estimator", "reason"),
    [
        (StepShape(dp=1, edp=1, cp=1, ep=1, micro_batch=1, num_microbatches=4), "dp-groups", "two data-parallel ranks"),
        (StepShape(dp=4, edp=8, cp=2, ep=1, micro_batch=1, num_microbatches=4), "slices", "context-parallel"),
        (StepShape(dp=4, edp=8, cp=4, ep=2, micro_batch=1, num_microbatches=4), "auto", "context-parallel"),
        (StepShape(dp=4, edp=1, cp=1, ep=4, micro_batch=1, num_microbatches=1), "auto", "every expert sees one group"),
        (StepShape(dp=1, edp=1, cp=1, ep=1, micro_batch=4, num_microbatches=1), "auto", "one micro-batch"),
    ],
)
def test_what_cannot_be_measured_says_why(shape: StepShape, estimator: str, reason: str) -> None:
    assert reason in (why_unmeasurable(shape, estimator) or "")


def test_exact_norms_are_chosen_where_they_are_cheap() -> None:
    shape = StepShape(dp=4, edp=4, cp=1, ep=1, micro_batch=1, num_microbatches=4)
    assert grouping_of(shape).estimator == "dp-groups"
    for other in (shape._replace(dp=2), shape._replace(cp=2), shape._replace(ep=2), shape._replace(tied=True)):
        assert grouping_of(other).estimator == "sketch"
