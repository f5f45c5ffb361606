"""Policies that change the batch alone, against traces worked out by hand.

All start at dp4,mbs1,gbs16 and may go from 4 to 64 unless said otherwise.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.efficiency.branch_loss import ToleranceBatch
from copus_ext.core.efficiency.critical_batch import CriticalBatchFit, Interval
from copus_ext.core.efficiency.critical_batch_result import BranchedPoint, Measurement, to_json
from copus_ext.core.errors import UserError
from copus_ext.core.noise.noise_scale import NoiseEstimate
from copus_ext.core.noise.step_noise import StepEstimate
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.batch_change import at_batch, batches_here, fastest, grown_to
from copus_ext.core.planner.decision import Situation
from copus_ext.core.planner.policy import Policy, PolicySettings
from copus_ext.core.planner.registry import make_policy
from tests.unit.situations import CURRENT, DATA, PIPE, line, situation

STATE = situation(line(DATA, 1.0, 1 / 16) | line(PIPE, 0.1, 1 / 16), None)


def sure(value: float) -> NoiseEstimate:
    """No doubt; with the prior of c, whose median is 2, the critical batch has the median 2 x value."""
    return NoiseEstimate(value, value, value, 1.0, value, 500.0)


def policy(name: str, lr_rule: str = "sqrt", max_growth: float = 2.0) -> Policy:
    return make_policy(PolicySettings(name, lr_rule=lr_rule, max_growth=max_growth), CURRENT)


def at(batch: int, **changes: object) -> Situation:
    return replace(STATE, current=Plan(DATA, 1, batch), decisions=1, **changes)  # type: ignore[arg-type]


def trace(policy: Policy, situations: Sequence[Situation]) -> list[int]:
    """The global batch after each decision; each starts from what the one before has chosen."""
    current, batches = situations[0].current, []
    for state in situations:
        current = policy.decide(replace(state, current=current)).chosen
        assert current.layout == DATA
        batches.append(current.global_batch)
    return batches


# --- what they share ---


def test_the_micro_batch_is_the_one_predicted_fastest_that_was_not_rejected() -> None:
    plans = {
        Plan(DATA, micro, batch): 1.0 / micro for micro in (1, 2, 4) for batch in (16, 32, 64) if micro * 4 <= batch
    }
    state = situation(plans, None)
    assert at_batch(state, 32) == Plan(DATA, 4, 32)
    assert at_batch(state, 40) == Plan(DATA, 2, 40), "5 micro-batches of 2; 4 x 4 does not divide 40"
    assert at_batch(state, 42) is None
    assert at_batch(replace(state, rejected={Plan(DATA, 4, 32): "memory"}), 32) == Plan(DATA, 2, 32)
    assert at_batch(replace(state, rejected={Plan(DATA, micro, 32): "no" for micro in (1, 2, 4)}), 32) is None
    assert at_batch(state, 16) == CURRENT, "the plan in force stays as it is"
    assert fastest(state, []) is None


def test_beside_the_candidates_a_micro_batch_is_as_its_nearest_smaller_batch() -> None:
    """Memory speaks against 4 from batch 32 on; too few groups speak against 2 below 32."""
    plans = {Plan(DATA, micro, batch): 1.0 / micro for micro in (1, 2, 4) for batch in (16, 32, 64)}
    rejected = {Plan(DATA, 4, batch): "needs 95 GiB" for batch in (32, 64)} | {Plan(DATA, 2, 16): "2 groups a step"}
    state = replace(situation(plans, None), rejected=rejected)
    assert at_batch(state, 48) == Plan(DATA, 2, 48)
    assert at_batch(state, 24) == Plan(DATA, 1, 24), "2 has too few groups for all that is known, and 4 does not divide"


def test_a_micro_batch_that_only_larger_batches_have_is_no_choice() -> None:
    """It may be left out where a batch has too few groups for the noise scale."""
    state = situation({CURRENT: 1.0, Plan(DATA, 4, 64): 0.1}, None)
    assert at_batch(state, 32) == Plan(DATA, 1, 32)
    assert batches_here(state) == [16, 64]


def test_interleaved_stages_need_multiples_of_the_pipeline() -> None:
    layout = Layout(dp=2, pp=2, vpp=2)
    here = Plan(layout, 1, 4)
    state = situation({here: 1.0, Plan(layout, 1, 64): 1.0}, None, current=here)
    assert grown_to(state, 5, "why").chosen == Plan(layout, 1, 8)
    assert at_batch(state, 6) is None


def test_growing_is_capped_and_goes_round_what_was_rejected() -> None:
    assert grown_to(STATE, 33, "why").chosen.global_batch == 36
    capped = grown_to(STATE, 1000, "why")
    assert (capped.chosen.global_batch, capped.reason) == (
        64,
        "switch to dp4,mbs1,gbs64: why; 64 is the largest global batch there is",
    )
    around = replace(STATE, rejected={Plan(DATA, 1, 64): "memory"})
    assert grown_to(around, 1000, "why").chosen.global_batch == 32
    nothing = replace(STATE, rejected={Plan(DATA, 1, batch): "memory" for batch in (32, 64)})
    assert grown_to(nothing, 1000, "why").reason == "stay: why, but no global batch from 16 to 64 can be run"
    assert not grown_to(at(64), 1000, "why").is_switch


@pytest.mark.parametrize("name", ["cbs", "norm-test", "norm-test:test=inner-product", "cbs-warmup", "seesaw"])
def test_where_nothing_is_known_the_batch_stays(name: str) -> None:
    unknown = NoiseEstimate(math.inf, math.nan, math.nan, -0.1, 1.0, 2.0)
    for state in (at(16), at(16, noise=unknown), at(16, noise=unknown, recent=StepEstimate(math.nan, math.nan))):
        decision = policy(name).decide(state)
        assert decision.chosen == state.current
        assert decision.reason.startswith("stay: ")
        json.dumps(decision.to_json(), allow_nan=False)


# --- cbs ---


def test_cbs_goes_to_the_nearest_batch_with_hysteresis() -> None:
    """From 16 to 32 needs 1.2 sqrt(16 x 32) = 27.15 sequences; back from 32 to 16, sqrt(16 x 32) / 1.2 = 18.86."""
    critical = [26.0, 28.0, 26.0, 19.0, 18.0, 26.0]
    states = [at(16, noise=sure(value / 2)) for value in critical]
    assert trace(policy("cbs"), states) == [16, 32, 32, 32, 16, 16]
    reasons = [policy("cbs").decide(state).reason for state in states[:2]]
    assert reasons == [
        "stay: the critical batch is 26 sequences (median), and has to be above 27.15 for a change from 16 to 32",
        "switch to dp4,mbs1,gbs32: the critical batch is 28 sequences (median), above 27.15 from where on the batch "
        "grows to 32",
    ]


def test_cbs_follows_a_jump_by_one_factor_a_decision() -> None:
    assert trace(policy("cbs"), [at(16, noise=sure(1e6))] * 4) == [32, 64, 64, 64]
    assert trace(policy("cbs"), [at(16, noise=sure(1e-3))] * 4) == [8, 4, 4, 4]
    assert trace(policy("cbs", max_growth=4.0), [at(16, noise=sure(1e6))] * 2) == [64, 64]
    assert trace(policy("cbs", max_growth=1.0), [at(16, noise=sure(1e6))]) == [16]


def test_cbs_may_only_grow_where_the_noise_scale_is_open_above() -> None:
    for low, batch in ((0.5, 16), (64.0, 32)):
        opened = NoiseEstimate(math.inf, low, math.inf, N=-0.1, S=1.0, n_eff=20.0)
        assert policy("cbs").decide(at(16, noise=opened)).chosen.global_batch == batch


def test_cbs_waits_for_the_dwell_steps_and_goes_round_what_was_rejected() -> None:
    state = at(16, noise=sure(1e6), steps_since_switch=9)
    assert policy("cbs").decide(state).reason == "stay: 9 of 10 steps since the last switch are done"
    refused = replace(state, steps_since_switch=10, rejected={Plan(DATA, 1, 32): "memory"})
    assert policy("cbs").decide(refused).chosen == CURRENT


def test_cbs_starts_in_the_layout_of_one_end_of_the_space() -> None:
    """At batch 4 pipelines take 0.2 s and data parallel 0.3 s; at batch 64 3.2 s and 2.4 s."""
    seconds = {Plan(DATA, 1, 4): 0.3, CURRENT: 0.7, Plan(DATA, 1, 64): 2.4}
    seconds |= {Plan(PIPE, 1, 4): 0.2, Plan(PIPE, 1, 16): 0.8, Plan(PIPE, 1, 64): 3.2}
    first = situation(seconds, sure(1e6), decisions=0, steps_since_switch=0)
    small = policy("cbs:start=pessimistic").decide(first)
    assert small.chosen == Plan(PIPE, 1, 16)
    said = re.search(
        "its layout is predicted fastest at the smallest global batch of the space, 4, with (.*) s a", small.reason
    )
    assert said is not None
    assert float(said[1]) == pytest.approx(0.2, rel=0.05)
    large = policy("cbs:start=optimistic").decide(first)
    assert large.chosen == CURRENT
    assert large.reason.startswith("stay: the present layout is predicted fastest at the largest")
    assert policy("cbs").decide(replace(first, steps_since_switch=20)).chosen.layout == DATA
    later = replace(first, decisions=1, steps_since_switch=20)
    assert policy("cbs:start=pessimistic").decide(later).chosen.layout == DATA, "only the first decision"
    refused = replace(first, rejected={plan: "no" for plan in seconds if plan.layout == PIPE})
    assert policy("cbs:start=pessimistic").decide(refused).chosen == CURRENT


# --- norm-test ---


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        # N 1 and S 48 at B 16: |g|^2 = 1 + 48/16 = 4, and Var / B = 3.
        ("eta=1", 16),  # 4 is allowed
        ("eta=0.5", 48),  # 1 is; 48 / (0.25 x 4)
        ("eta=0.6", 36),  # 1.44 is; 48 / 1.44 = 33.3, so 34, and rounded up to a multiple of 4
        ("eta=0.2", 64),  # 0.16 is; 300, and 64 is the largest there is
        # Of four workers 3/4 of the variance: Var 36, Var / B = 2.25.
        ("test=fsdp,eta=0.8", 16),  # 2.56 is allowed
        ("test=fsdp,eta=0.7", 20),  # 1.96 is; 36 / 1.96 = 18.4
        ("test=ddp,eta=0.8", 20),  # 48 / 2.56 = 18.75
    ],
)
def test_norm_test_by_hand(options: str, batch: int) -> None:
    decision = policy(f"norm-test:{options}").decide(at(16, recent=StepEstimate(1.0, 48.0)))
    assert decision.chosen == Plan(DATA, 1, batch)


def test_norm_test_explains_itself() -> None:
    decision = policy("norm-test:eta=0.5").decide(at(16, recent=StepEstimate(1.0, 48.0)))
    assert decision.reason == (
        "switch to dp4,mbs1,gbs48: Var / B, Var 48, is 3 at batch 16, and 1 is allowed by eta 0.5, "
        "which takes 48 sequences"
    )


def test_norm_test_never_shrinks_and_asks_for_a_gradient() -> None:
    tests = policy("norm-test:eta=0.5")
    recents = [StepEstimate(1.0, 48.0), StepEstimate(100.0, 1.0), StepEstimate(-1.0, 96.0), StepEstimate(-5.0, 48.0)]
    # 48; then nothing is violated; then |g|^2 = 1, 96 / 0.25 = 384 is capped; then |g|^2 < 0 makes no test
    assert trace(tests, [at(16, recent=recent) for recent in recents]) == [48, 48, 64, 64]
    assert "make no test" in tests.decide(at(8, recent=StepEstimate(-6.0, 48.0))).reason
    assert not tests.decide(at(16, recent=StepEstimate(1.0, math.inf))).is_switch
    assert not tests.decide(at(16, recent=StepEstimate(1.0, -3.0))).is_switch


def test_one_worker_says_nothing_of_fsdp_norm() -> None:
    here = Plan(PIPE, 1, 16)
    state = replace(at(16, recent=StepEstimate(1.0, 48.0)), current=here)
    assert "only one" in policy("norm-test:test=fsdp").decide(state).reason
    assert policy("norm-test:test=ddp").decide(state).chosen == Plan(PIPE, 1, 64)


def test_inner_product_test_by_hand() -> None:
    """At B 16 |g|^2 = 4 and |g|^4 = 16; P 64 makes P / B 4. theta 0.5 allows 4; theta 0.4 2.56: 25, rounded to 28."""
    state = at(16, recent=StepEstimate(1.0, 48.0, P=64.0))
    assert policy("norm-test:test=inner-product").needs_inner_products
    assert not policy("norm-test").needs_inner_products
    assert not policy("norm-test:test=inner-product,theta=0.5").decide(state).is_switch
    grown = policy("norm-test:test=inner-product,theta=0.4").decide(state)
    assert grown.chosen == Plan(DATA, 1, 28)
    assert "P / B, P 64, is 4 at batch 16, and 2.56 is allowed by theta 0.4" in grown.reason
    assert not policy("norm-test:test=inner-product").decide(at(16, recent=StepEstimate(1.0, 48.0))).is_switch


# --- cbs-warmup ---


def test_warmup_doubles_when_the_critical_batch_is_twice_the_batch() -> None:
    """Of c the lower quartile has the logarithm ln 2 + 0.9 x (-0.6745): c = 1.09. So 32 takes a noise scale of 29.4."""
    states = [at(16, noise=sure(value)) for value in (29.0, 30.0, 40.0, 59.0, 1.0, 60.0, 1e9)]
    assert trace(policy("cbs-warmup"), states) == [16, 32, 32, 64, 64, 64, 64]
    assert trace(policy("cbs-warmup"), [at(16, noise=sure(1e9))] * 3) == [32, 64, 64]
    refused = at(16, noise=sure(1e9), rejected={Plan(DATA, 1, 32): "memory"})
    assert policy("cbs-warmup").decide(refused).reason.endswith("but no plan can run it")


def point(samples: int, within: int, critical: float) -> Measurement:
    """What branches came to, without them."""
    unknown = Interval(math.nan, math.nan, math.nan)
    fit = CriticalBatchFit(Interval(critical, critical, critical), "measured")
    branches = BranchedPoint(samples, 8, (), {8: unknown})
    return Measurement(branches, fit, fit, (), 0.01, ToleranceBatch(within, within, None), unknown)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    path = tmp_path / "critical_batch.json"
    points = [point(10_000, 64, math.inf), point(100, 16, 64.0)]
    path.write_text(json.dumps(to_json(points, {}), allow_nan=False))
    return path


@pytest.mark.parametrize(
    ("consumed", "batch", "grown"),
    [
        (0, 16, 16),  # 16 held before the first point
        (900, 16, 16),  # 16 x 4^(log10(9) / 2) = 31.0
        (1000, 16, 32),  # half way from 100 to 10 000 in the logarithm: 32
        (9000, 32, 32),  # 62.0
        (10_000, 32, 64),
        (10**9, 32, 64),  # 64 held after the last
        (10**9, 64, 64),
    ],
)
def test_warmup_by_measured_batches(measured: Path, consumed: int, batch: int, grown: int) -> None:
    state = at(batch, consumed_samples=consumed, noise=sure(1e-3))
    assert policy(f"cbs-warmup:file={measured}").decide(state).chosen.global_batch == grown


def test_warmup_by_the_fit_leaves_out_what_is_open(measured: Path) -> None:
    """The point at 100 samples has 64; the one at 10 000 is open, which JSON has as null."""
    fit = policy(f"cbs-warmup:file={measured},use=fit")
    assert trace(fit, [at(16, consumed_samples=10), at(16, consumed_samples=10), at(16)]) == [32, 64, 64]


def test_files_that_are_no_measurement_are_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"points": []}', '{"points": [{"samples": 1}]}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(UserError, match="cbs-warmup:file="):
            policy(f"cbs-warmup:file={tmp_path}/other.json")
    with pytest.raises(UserError, match="No such file"):
        policy(f"cbs-warmup:file={tmp_path}/none.json")
    with pytest.raises(UserError, match="no option 'use'"):
        policy("cbs-warmup:use=fit")


# --- seesaw ---


def test_seesaw_doubles_at_every_halving() -> None:
    shares = [1.0, 0.51, 0.5, 0.3, 0.5**2, 0.9, 0.01, 0.0]
    assert trace(policy("seesaw"), [at(16, rate_share=share) for share in shares]) == [16, 16, 32, 32, 64, 64, 64, 64]
    decision = policy("seesaw").decide(at(16, rate_share=0.24))
    assert decision.reason == (
        "switch to dp4,mbs1,gbs64: the learning rate is scheduled at 0.24 of its peak, 2 cuts by 2"
    )


def test_at_the_cuts_the_rate_under_seesaw_falls_by_the_root_of_two() -> None:
    """The rate in force is the schedule x sqrt(batch / first batch)."""
    grown = trace(policy("seesaw"), [at(16, rate_share=0.5**k) for k in range(3)])
    rates = [0.5**k * math.sqrt(batch / 16) for k, batch in enumerate(grown)]
    assert np.divide(rates[1:], rates[:-1]) == pytest.approx(1 / math.sqrt(2))


def test_seesaw_by_another_factor() -> None:
    """By 4: one cut at 1/4. By 1.5: two cuts at 0.44, 16 x 2.25 = 36."""
    assert trace(policy("seesaw:factor=4"), [at(16, rate_share=share) for share in (0.26, 0.25)]) == [16, 64]
    assert trace(policy("seesaw:factor=1.5"), [at(16, rate_share=0.44)]) == [36]


@pytest.mark.parametrize(("name", "rule"), [("seesaw", "linear"), ("seesaw", "none"), ("seesaw:factor=1", "sqrt")])
def test_seesaw_that_is_not_theirs_is_refused(name: str, rule: str) -> None:
    with pytest.raises(UserError, match="seesaw"):
        policy(name, lr_rule=rule)


# --- layout-only ---


def test_layout_only_changes_the_layout_and_never_the_batch() -> None:
    state = situation(line(DATA, 1.0, 1 / 16) | line(PIPE, 0.1, 1 / 16), sure(1e6))
    decision = policy("layout-only").decide(state)
    assert decision.chosen == Plan(PIPE, 1, 16)
    others = [score for score in decision.candidates if score.plan.global_batch != 16]
    assert {score.why_not for score in others} == {"the policy keeps the global batch"}
    alone = replace(state, candidates=Candidates(tuple(line(DATA, 1.0, 0.0))))
    assert policy("layout-only").decide(alone).chosen == CURRENT
