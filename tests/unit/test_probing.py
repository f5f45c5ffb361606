"""When a branch that measures c is worth its cost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from copus_ext.core.efficiency.critical_ratio import PROBE, CriticalRatio, EfficiencyRatio
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.decision import Decision, Probe, Situation
from copus_ext.core.planner.switch_rule import parse_switch_rule
from copus_ext.core.policies.copus import CopusPolicy
from tests.unit.situations import CURRENT, DATA, known, situation

POLICY = CopusPolicy(probe_budget=0.01)
# Steps of 0.92 + 0.08 B/16 s: twice the batch wins much if Bc is large, and loses much if it is small.
SECONDS = {Plan(DATA, 1, batch): 0.3 + 0.7 * batch / 16 for batch in (8, 16, 32)}
STAYS = situation(SECONDS, known(30.0), can_probe=True, train_samples=2_000_000)


def surely(c: float) -> CriticalRatio:
    """C known to a few per cent, from here."""
    ratio = CriticalRatio()
    for _ in range(8):
        log_ratio = math.log((1 + 4 / (c * 30.0)) / (1 + 256 / (c * 30.0)))
        found = EfficiencyRatio(PROBE, STAYS.consumed_samples, 4, 256, log_ratio, 0.02, 30.0, 29.9, 30.1)
        ratio = ratio.observe(found)
    return ratio


def decide(**changes: object) -> Decision:
    return POLICY.decide(replace(STAYS, **changes))  # type: ignore[arg-type]


def test_the_decision_hangs_on_c() -> None:
    """With c large the batch grows, with c small it shrinks: so there is something to be learned."""
    assert decide(critical_ratio=surely(20.0)).chosen == Plan(DATA, 1, 32)
    assert decide(critical_ratio=surely(0.3)).chosen == Plan(DATA, 1, 8)


def test_where_it_does_a_branch_is_made() -> None:
    decision = decide()
    assert not decision.is_switch
    assert decision.probe is not None
    assert decision.probe.plan.layout == DATA
    assert decision.probe.plan.global_batch != 16
    assert decision.probe.samples % (4 * math.lcm(16, decision.probe.plan.global_batch)) == 0
    assert decision.reason.startswith(f"stay, and branch to global batch {decision.probe.plan.global_batch}")
    assert decision.to_json()["probe"] == {"plan": str(decision.probe.plan), "samples": decision.probe.samples}


def test_it_stays_within_its_budget() -> None:
    """1 % of the run's time; a branch of n samples takes about n / throughput and a quarter of that again."""
    decision = decide()
    assert isinstance(decision.probe, Probe)
    throughput = {score.plan: score.throughput for score in decision.candidates}[decision.probe.plan]
    assert throughput is not None
    assert 1.25 * decision.probe.samples / throughput <= 0.01 * decision.horizon_s
    assert decide(probed_s=0.01 * decision.horizon_s).probe is None
    assert decide(train_samples=STAYS.consumed_samples + 20_000).probe is None, "too short for 16 steps"


@pytest.mark.parametrize(
    "changes",
    [
        {"can_probe": False},
        {"critical_ratio": surely(2.0)},
        {"noise": None},
        {"noise": known(30.0)._replace(high=math.inf)},
        {"steps_since_switch": 3},
    ],
)
def test_no_branch_where_there_is_nothing_to_learn_or_no_way_to(changes: dict[str, object]) -> None:
    assert decide(**changes).probe is None


def test_what_has_nothing_to_do_with_c_makes_no_branch() -> None:
    """A faster layout at the same batch is as good whatever c is; the paper's rule takes c as known."""
    seconds = SECONDS | {Plan(Layout(pp=4), 1, 16): 0.9}
    sure = situation(seconds, known(30.0), layout_cost=1e6, can_probe=True, train_samples=2_000_000)
    assert POLICY.decide(replace(sure, critical_ratio=surely(2.0))).probe is None
    assert CopusPolicy(probe_budget=0.01, rule=parse_switch_rule("threshold:9")).decide(STAYS).probe is None


def test_no_branch_without_a_budget() -> None:
    assert CopusPolicy(probe_budget=0.0).decide(STAYS).probe is None


def test_no_branch_where_the_batch_can_not_be_changed() -> None:
    state: Situation = replace(STAYS, candidates=situation({CURRENT: 1.0}, None).candidates)
    assert POLICY.decide(state).probe is None
    assert CopusPolicy(max_growth=1.0, probe_budget=0.01).decide(STAYS).probe is None
