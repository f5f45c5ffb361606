"""The space of plans: what the flag says, and what is kept away from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from copus_ext.core.errors import UserError
from copus_ext.core.grouping import MIN_GROUPS, slices_per_rank, why_avoided, why_unmeasurable
from copus_ext.core.memory import peak_bytes
from copus_ext.core.model_shape import ModelShape
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.space import parse_space, too_large

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


@pytest.mark.parametrize("text", ["dp=4", "tp", "tp=x", "tp=0", "gbs=8..4", "tp=1 tp=2"])
def test_what_is_not_understood_names_the_flag(text: str) -> None:
    with pytest.raises(UserError, match="--copus-space"):
        parse_space(text)


def test_slices_are_equal_and_as_few_as_give_enough_groups() -> None:
    for dp in (1, 2, 4):
        for micro_batches in range(1, 25):
            plan = Plan(Layout(dp=dp), 1, dp * micro_batches)
            slices = slices_per_rank(plan)
            assert micro_batches % slices == 0
            fewer = [s for s in range(1, slices) if micro_batches % s == 0]
            assert all(s * dp < MIN_GROUPS for s in fewer)
            assert slices * dp >= MIN_GROUPS or slices == micro_batches


def test_plans_that_hide_the_noise_are_avoided_unless_the_flags_hide_it_anyway() -> None:
    one_group = Plan(Layout(tp=4), 16, 16)
    assert why_unmeasurable(one_group)
    assert why_avoided(one_group, BASE)
    assert why_avoided(Plan(Layout(pp=4), 8, 16), BASE), "two groups where there could be four"
    assert why_avoided(Plan(Layout(pp=4), 4, 16), BASE) is None
    experts = Plan(Layout(dp=4, ep=2), 2, 16)
    assert why_avoided(replace(experts, micro_batch=4), experts) is None


def test_memory_of_the_state_is_eighteen_bytes_a_parameter_in_bf16() -> None:
    """fp32 gradient and main parameter, Adam's moments, bf16 parameter: 2 + 4 + 12, the last shared by ZeRO-1."""
    large = replace(MODEL, layers=2, hidden=4096, ffn=16384, vocab=128, seq=1, param_bytes=2)
    plain = peak_bytes(Plan(Layout(dp=4), 1, 4), large) / large.params
    sharded = peak_bytes(Plan(Layout(dp=4, distributed_optimizer=True), 1, 4), large) / large.params
    assert plain == pytest.approx(18, rel=0.01)
    assert sharded == pytest.approx(6 + 12 / 4, rel=0.01)


def test_splitting_a_model_makes_it_fit() -> None:
    whole, split = Plan(Layout(dp=4), 1, 4), Plan(Layout(tp=2, pp=2), 1, 4)
    room = (peak_bytes(whole, MODEL) + peak_bytes(split, MODEL)) / 2
    assert too_large(split, MODEL, room / 0.9) is None
    assert "GiB" in (too_large(whole, MODEL, room / 0.9) or "")
