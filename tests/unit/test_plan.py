"""Plans: what is written is what is read."""

from __future__ import annotations

import itertools
import json

import pytest

from copus_ext.core.plan import RECOMPUTE_CHOICES, Layout, Plan, parse_plan, plan_from_json

BASE = Plan(Layout(dp=8), 2, 32)
EVERY_LAYOUT = [
    Layout(8 // (tp * pp), tp, pp, vpp, 1, ep, sp, zero1, recompute)
    for tp, pp in ((1, 1), (2, 1), (1, 4), (2, 2))
    for vpp, ep in ((1, 1), (2, 1), (1, 2))
    for sp, zero1 in itertools.product((False, True), repeat=2)
    for recompute in RECOMPUTE_CHOICES
    if not (sp and tp == 1)  # a wish that counts, and is written, where tp > 1 only
]


@pytest.mark.parametrize("layout", EVERY_LAYOUT, ids=str)
def test_text_and_json_give_the_plan_back(layout: Layout) -> None:
    plan = Plan(layout, 1, 16)
    assert parse_plan(str(plan), BASE) == plan
    assert plan_from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_what_is_not_named_is_as_in_the_base_or_takes_the_ranks_left() -> None:
    base = Plan(Layout(dp=8, distributed_optimizer=True, recompute="full"), 2, 32)
    assert parse_plan("tp2", base) == Plan(Layout(dp=4, tp=2, distributed_optimizer=True, recompute="full"), 2, 32)
    assert not parse_plan("no-zero1", base).layout.distributed_optimizer
    assert parse_plan("pp2,gbs64", base).num_microbatches == 64 // (2 * 4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dp3", "takes 3 ranks, and there are 8"),
        ("tp3", "multiple of 3 ranks"),
        ("dp8,gbs12", "not divisible"),
        ("tp0", "at least 1"),
        ("recompute-some", "recompute must be one of"),
        ("xp2", "'xp2' is not part of a plan"),
        ("", "'' is not part of a plan"),
        ("mbs0", "at least 1"),
    ],
)
def test_what_cannot_be_is_told(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_plan(text, BASE)
