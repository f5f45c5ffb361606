"""Megatron's batch ramps against its own calculators, step by step."""

from __future__ import annotations

import random

import pytest
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from copus_ext.core.errors import UserError
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.policy import Policy, PolicySettings
from copus_ext.core.planner.registry import make_policy
from tests.unit.situations import situation

ONE = Layout()


def ramp(flag: tuple[int, int, int], base: Plan, train_samples: int = 10_000) -> Policy:
    return make_policy(PolicySettings("rampup", rampup=flag, train_samples=train_samples), base)


def steps(text: str, base: Plan, seq_length: int = 1, train_samples: int = 10_000) -> Policy:
    settings = PolicySettings("rampup", step_schedule=text, seq_length=seq_length, train_samples=train_samples)
    return make_policy(settings, base)


def batches(policy: Policy, train_samples: int) -> list[tuple[int, int]]:
    """Where every step of a run starts, and its batch; each stretch has to be whole steps."""
    consumed, taken = 0, []
    while consumed < train_samples:
        plan, change = policy.plan_at(consumed), policy.next_change(consumed)
        assert plan is not None
        assert change is None or (change - consumed) % plan.global_batch == 0
        taken.append((consumed, plan.global_batch))
        consumed += plan.global_batch
    return taken


def megatron_017(flag: tuple[int, int, int], last: int, train_samples: int) -> list[tuple[int, int]]:
    """The rule of megatron-core 0.17.1 and before, whose calculator 0.19 has no more: asked before every step."""
    start, increment, samples = flag
    per_increment = samples / ((last - start) // increment)
    consumed, taken = 0, []
    while consumed < train_samples:
        batch = last if consumed > samples else start + int(consumed / per_increment) * increment
        taken.append((consumed, batch))
        consumed += batch
    return taken


def test_a_ramp_by_hand() -> None:
    """From 4 to 16 by 4 over 40 samples: thresholds 13.33, 26.67 and 40.

    Steps of 4 start at 0, 4, 8, 12; 16 is the first at or beyond 13.33. Steps of 8 at 16 and 24; 32 is beyond 26.67.
    Steps of 12 at 32; 44 is beyond 40.
    """
    base = Plan(Layout(dp=4), 1, 16)
    policy = ramp((4, 4, 40), base)
    assert policy.named_plans(base) == tuple(base.with_batch(batch) for batch in (4, 8, 12, 16))
    assert batches(policy, 76) == [(0, 4), (4, 4), (8, 4), (12, 4), (16, 8), (24, 8), (32, 12), (44, 16), (60, 16)]


def test_a_ramp_is_upstreams_at_every_step() -> None:
    draw = random.Random(0)
    for _ in range(100):
        start, increment, samples = draw.randint(1, 40), draw.randint(1, 12), draw.randint(1, 1000)
        last = start + increment * draw.randint(1, 30)
        flag, end = (start, increment, samples), samples + 2 * last
        assert batches(ramp(flag, Plan(ONE, 1, last), end), end) == megatron_017(flag, last, end)


def test_a_step_schedule_is_upstreams_at_every_step() -> None:
    draw = random.Random(0)
    for seq in (1, 7, 4096):
        for _ in range(30):
            starts = [0, *sorted(draw.sample(range(1, 2000), 4))]
            text = " ".join(
                f"{start * seq + draw.randrange(seq) * (start > 0)}:{draw.randint(1, 300)}" for start in starts
            )
            upstream = StepBatchsizeNumMicroBatchesCalculator(1, 1, False, -1, text, seq)
            for consumed, batch in batches(steps(text, Plan(ONE, 1, 1), seq, 3000), 3000):
                upstream.update(consumed, consistency_check=True)
                assert batch == upstream.get_current_global_batch_size(), text


def test_suffixes_commas_and_order_are_upstreams() -> None:
    """0.5K tokens of 4 a sequence are 125 sequences; 8 x 16 = 128 is the first step's end beyond them."""
    policy = steps("0.5K:16,0:8", Plan(ONE, 1, 8), seq_length=4)
    assert (policy.next_change(0), policy.next_change(128)) == (128, None)


def test_equal_batches_are_one_stretch_and_those_that_no_step_has_are_left_out() -> None:
    base = Plan(ONE, 1, 64)
    policy = steps("0:8 16:8 20:64 30:7 60:64", base)  # steps start at 0, 8, 16, 24, 88: none is from 30 to 60
    assert policy.named_plans(base) == (base.with_batch(8), base)
    short = steps("0:8 16:16", base, train_samples=16)
    assert short.named_plans(base) == (base.with_batch(8),)


def test_layout_and_micro_batch_are_those_of_the_flags_and_changes_say_why() -> None:
    base = Plan(Layout(dp=2, tp=2), 2, 16)
    policy = ramp((4, 4, 40), base)
    state = situation({base: 1.0}, None, current=policy.plan_at(0), consumed_samples=16)
    decision = policy.decide(state)
    assert decision.chosen == Plan(base.layout, 2, 8)
    assert decision.reason == "switch to dp2,tp2,mbs2,gbs8: scheduled at 16 samples"
    refused = policy.decide(
        situation({base: 1.0}, None, current=policy.plan_at(0), consumed_samples=16, rejected={decision.chosen: "no"})
    )
    assert not refused.is_switch


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (PolicySettings("rampup"), "give --rampup-batch-size or --step-batch-size-schedule"),
        (PolicySettings("rampup", rampup=(4, 4, 40), step_schedule="0:4"), "give one of them"),
        (PolicySettings("rampup", rampup=(16, 4, 40)), "START has to be below --global-batch-size 16"),
        (PolicySettings("rampup", rampup=(4, 5, 40)), "it is 12, no multiple of INCREMENT"),
        (PolicySettings("rampup", rampup=(4, 4, 0)), "at least 1"),
        (PolicySettings("rampup", rampup=(6, 2, 40)), "batch 6, due at 0 samples, is not divisible by micro-batch 1 x"),
        (PolicySettings("rampup", step_schedule="0:4 x:8"), "TOKENS:BATCH"),
        (PolicySettings("rampup", step_schedule="4"), "TOKENS:BATCH"),
        (PolicySettings("rampup", step_schedule=""), "for 0 tokens"),
        (PolicySettings("rampup", step_schedule="8:4"), "for 0 tokens"),
        (PolicySettings("rampup", step_schedule="0:4 8:8 9:16", seq_length=4), "two entries"),
        (PolicySettings("rampup", step_schedule="0:0"), "at least 1"),
        (PolicySettings("rampup", step_schedule="0:4 8:6"), "--step-batch-size-schedule: batch 6, due at 8 samples"),
        (PolicySettings("rampup:from=4", rampup=(4, 4, 40)), "no option 'from'"),
    ],
)
def test_what_upstream_would_refuse_is_refused_in_one_line(settings: PolicySettings, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        make_policy(settings, Plan(Layout(dp=4), 1, 16))
    assert "\n" not in str(caught.value)
