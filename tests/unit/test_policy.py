from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.errors import UserError
from copus_ext.core.noise.noise_scale import NoiseEstimate
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.decision import Decision
from copus_ext.core.planner.policy import PolicySettings
from copus_ext.core.planner.registry import POLICIES, make_policy
from copus_ext.core.planner.switch_rule import parse_switch_rule
from copus_ext.core.policies.copus import CopusPolicy
from tests.unit.situations import CURRENT, DATA, PIPE, known, line, situation

COPUS = CopusPolicy()


def follow(seconds: Mapping[Plan, float], noise: NoiseEstimate | None, decisions: int = 6) -> list[Plan]:
    """The plans of a run whose noise scale does not change."""
    state, plans = situation(seconds, noise), []
    for _ in range(decisions):
        state = replace(state, current=COPUS.decide(state).chosen)
        plans.append(state.current)
    return plans


def shares(decision: Decision, pick: Callable[[Plan], bool]) -> list[str]:
    return [score.why_not for score in decision.candidates if pick(score.plan)]


def test_static_stays() -> None:
    decision = make_policy(PolicySettings("static"), CURRENT).decide(situation(line(PIPE, 0.1, 0.1), known(1000.0)))
    assert decision.chosen == CURRENT
    assert not decision.is_switch
    assert decision.reason.startswith("stay: ")


def test_schedule_follows_its_entries() -> None:
    settings = PolicySettings("schedule", schedule="0:dp4,mbs1,gbs16 1600:pp4,mbs1,gbs32")
    policy = make_policy(settings, CURRENT)
    state = situation({CURRENT: 1.0}, None)
    early = policy.decide(replace(state, consumed_samples=1584))
    assert (early.chosen, early.reason) == (CURRENT, "stay: the schedule has no change before 1600 samples")
    due = policy.decide(state)
    assert due.chosen == Plan(PIPE, 1, 32)
    assert due.is_switch
    assert not policy.decide(replace(state, current=due.chosen)).is_switch
    assert (policy.next_change(0), policy.next_change(1600)) == (1600, None)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (PolicySettings("magic"), f"--copus-policy magic.*choose one of {', '.join(POLICIES)}"),
        (PolicySettings("statik"), "did you mean static"),
        (PolicySettings("schedule"), "give --copus-schedule"),
        (PolicySettings("copus", schedule="0:dp4"), "does not follow --copus-schedule"),
        (PolicySettings("copus:eta=1"), "no option 'eta' here; it has none"),
        (PolicySettings("cbs:stat=1"), "no option 'stat' here; only .*start"),
        (PolicySettings(max_growth=0.5), "--copus-max-growth 0.5 is too small; give at least 1"),
        (PolicySettings(max_growth=float("nan")), "--copus-max-growth nan"),
        (PolicySettings(dwell_steps=-1), "--copus-dwell-steps -1 is too small"),
        (PolicySettings(probe_budget=1.0), "--copus-probe-budget 1 is a share of the run"),
        (PolicySettings("copus:eta"), "name=value"),
        (PolicySettings(objective="speed"), "--copus-objective speed"),
        (PolicySettings(switch_rule="always"), "--copus-switch-rule always"),
        (PolicySettings(switch_rule="threshold"), "threshold:0.10"),
        (PolicySettings(switch_rule="threshold:-1"), "threshold:0.10"),
    ],
)
def test_a_policy_that_cannot_be_is_told(settings: PolicySettings, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_policy(settings, CURRENT)


def test_settings_come_back_from_the_log() -> None:
    settings = PolicySettings("rampup", rampup=(8, 8, 1000), objective="paper", switch_rule="threshold:0.1")
    assert PolicySettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_large_noise_grows_the_batch_and_small_noise_shrinks_it() -> None:
    """With steps of 1 + B / 16 s the best batch is sqrt(16 Bc) = sqrt(32 noise): 64 at noise 128, 4 at noise 0.5."""
    seconds = line(DATA, 1.0, 1 / 16)
    assert [plan.global_batch for plan in follow(seconds, known(128.0))] == [32, 64, 64, 64, 64, 64]
    assert [plan.global_batch for plan in follow(seconds, known(0.5))] == [8, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("noise", [2.0, 8.0, 32.0])
def test_the_batch_it_stays_at_is_next_to_the_best_one(noise: float) -> None:
    best = math.sqrt(16 * 2 * noise)
    settled = follow(line(DATA, 1.0, 1 / 16), known(noise))
    assert settled[-1] == settled[-2]
    assert best / 2 <= settled[-1].global_batch <= 2 * best


def test_layout_changes_when_measurements_say_so() -> None:
    slow, fast = {CURRENT: 1.0}, {Plan(PIPE, 1, 16): 0.8}
    decision = COPUS.decide(situation(slow | fast, known(32.0)))
    assert decision.chosen == Plan(PIPE, 1, 16)
    assert decision.gain == pytest.approx(0.25, abs=0.01)
    assert decision.horizon_s == pytest.approx(100_000 / 16, rel=0.01)
    assert decision.reason.startswith("switch to dp1,pp4,mbs1,gbs16: gain 24.9 %")
    assert COPUS.decide(situation(slow | {Plan(PIPE, 1, 16): 1.2}, known(32.0))).chosen == CURRENT


def test_batch_and_layout_are_chosen_together() -> None:
    """Data parallel is faster at 16, pipelines at 32: only the pair is worth a move."""
    seconds = {CURRENT: 1.0, Plan(PIPE, 1, 16): 1.3, Plan(DATA, 1, 32): 2.0, Plan(PIPE, 1, 32): 1.3}
    assert COPUS.decide(situation(seconds, known(200.0))).chosen == Plan(PIPE, 1, 32)


def test_gain_needed_is_where_switching_and_staying_are_worth_the_same() -> None:
    needed = parse_switch_rule("amortised").needed
    for cost, horizon in ((1.4, 70.0), (30.0, 31.0), (0.0, 5.0)):
        assert (horizon - cost) * (1 + needed(np.array([cost]), horizon)[0]) == pytest.approx(horizon)
    assert (needed(np.array([5.0, 6.0]), 5.0) == math.inf).all()


def test_the_papers_rule_asks_a_fixed_gain_of_the_median_whatever_it_costs() -> None:
    policy = CopusPolicy(rule=parse_switch_rule("threshold:0.10"))
    for seconds, cost, switches in ((0.905, 1e3, True), (0.915, 1e-3, False)):
        decision = policy.decide(situation({CURRENT: 1.0, Plan(PIPE, 1, 16): seconds}, None, layout_cost=cost))
        assert decision.is_switch == switches
        assert "the threshold is 10.0 %" in decision.reason


def test_the_lower_quartile_of_the_gain_must_exceed_what_the_switch_costs() -> None:
    seconds = {CURRENT: 1.0, Plan(PIPE, 1, 16): 0.9}
    first = COPUS.decide(situation(seconds, None))
    even = first.gain_low * first.horizon_s / (1 + first.gain_low)  # gain_low = C / (H - C)
    assert COPUS.decide(situation(seconds, None, layout_cost=even * (1 - 1e-9))).is_switch
    assert not COPUS.decide(situation(seconds, None, layout_cost=even * (1 + 1e-9))).is_switch


def test_near_the_end_nothing_repays_a_switch() -> None:
    decision = COPUS.decide(situation({CURRENT: 1.0, Plan(PIPE, 1, 16): 0.5}, None, train_samples=1616))
    assert not decision.is_switch
    assert decision.gain_needed == math.inf
    assert "takes all of the" in decision.reason
    assert decision.to_json()["gain_needed"] is None


def test_a_plan_is_kept_for_the_dwell_time() -> None:
    state = situation({CURRENT: 1.0, Plan(PIPE, 1, 16): 0.5}, None)
    assert not COPUS.decide(replace(state, steps_since_switch=9)).is_switch
    assert COPUS.decide(replace(state, steps_since_switch=10)).is_switch


def test_unknown_noise_leaves_the_batch_but_not_the_layout() -> None:
    seconds = line(DATA, 1.0, 0.0) | line(PIPE, 0.5, 0.0)
    for noise in (None, NoiseEstimate(math.inf, math.nan, math.nan, 0.0, 1.0, 2.0), known(5.0)._replace(low=0.0)):
        decision = COPUS.decide(situation(seconds, noise))
        assert decision.chosen == Plan(PIPE, 1, 16)
        assert set(shares(decision, lambda plan: plan.global_batch != 16)) == {"the noise scale is not known yet"}
        assert all(score.efficiency is None and score.goodput is None for score in decision.candidates)


def test_an_open_upper_end_forbids_shrinking_and_grows_by_the_lower_end() -> None:
    seconds = line(DATA, 1.0, 1 / 16)
    opened = NoiseEstimate(math.inf, 0.5, math.inf, N=-0.1, S=1.0, n_eff=20.0)
    shrinking = COPUS.decide(situation(seconds, opened))
    assert shrinking.chosen == CURRENT
    assert all("no upper bound" in why for why in shares(shrinking, lambda plan: plan.global_batch < 16))
    assert COPUS.decide(situation(seconds, opened._replace(low=128.0))).chosen.global_batch == 32


def test_a_noise_scale_that_jumps_is_followed_a_factor_of_two_at_a_time_and_back() -> None:
    """The best batch of steps of 1 + B / 16 s is sqrt(32 noise): 64 at 128, 16 at 8."""
    seconds, plan, visited = line(DATA, 1.0, 1 / 16), CURRENT, []
    for noise in (8.0, 128.0, 128.0, 128.0, 8.0, 8.0, 8.0):
        plan = COPUS.decide(situation(seconds, known(noise), current=plan)).chosen
        visited.append(plan.global_batch)
    assert visited == [16, 32, 64, 64, 32, 16, 16]


def test_one_decision_changes_the_batch_by_a_factor_of_two_at_most() -> None:
    state = situation(line(DATA, 1.0, 0.0), known(1e6))
    decision = COPUS.decide(state)
    assert decision.chosen.global_batch == 32
    assert shares(decision, lambda plan: plan.global_batch == 64) == [
        "more than 2 x from global batch 16 in one decision"
    ]
    assert CopusPolicy(max_growth=4.0).decide(state).chosen.global_batch == 64


def test_doubt_about_noise_can_hold_back_a_batch_that_certainty_would_choose() -> None:
    seconds = {CURRENT: 1.0, Plan(DATA, 1, 32): 1.7}
    sure = COPUS.decide(situation(seconds, known(100.0)))
    unsure = COPUS.decide(situation(seconds, NoiseEstimate(100.0, 5.0, 2000.0, 1.0, 100.0, 20.0)))
    assert sure.is_switch
    assert not unsure.is_switch
    assert unsure.gain_low < sure.gain_low


def test_equal_batches_gain_the_same_whatever_the_noise() -> None:
    seconds = {CURRENT: 1.0, Plan(PIPE, 1, 16): 0.8}
    decisions = [COPUS.decide(situation(seconds, noise)) for noise in (None, known(1.0), known(1e6))]
    assert len({(decision.gain, decision.gain_low) for decision in decisions}) == 1


def test_a_plan_that_upstream_rejects_is_listed_with_its_reason_and_never_chosen() -> None:
    best = Plan(PIPE, 1, 16)
    state = situation({CURRENT: 1.0, best: 0.1}, None, rejected={best: "upstream says no"})
    decision = COPUS.decide(state)
    assert decision.chosen == CURRENT
    listed = next(score for score in decision.candidates if score.plan == best)
    assert (listed.feasible, listed.why_not, listed.throughput) == (False, "upstream says no", None)
    assert "no other plan" in decision.reason


def test_the_current_plan_needs_not_be_a_candidate() -> None:
    seconds = {CURRENT: 1.0, Plan(PIPE, 1, 16): 2.0}
    decision = COPUS.decide(situation(seconds, None, candidates=Candidates((Plan(PIPE, 1, 16),))))
    assert [score.plan for score in decision.candidates] == [CURRENT, Plan(PIPE, 1, 16)]


def test_goodput_is_throughput_times_efficiency() -> None:
    for score in COPUS.decide(situation(line(DATA, 1.0, 1 / 16), known(32.0))).candidates:
        assert score.throughput is not None
        assert score.efficiency is not None
        assert score.efficiency == pytest.approx(1 / (1 + score.plan.global_batch / 64), rel=0.01)
        assert score.goodput == score.throughput * score.efficiency


def test_the_reason_says_it_in_one_sentence_with_its_numbers() -> None:
    state = situation({CURRENT: 1.0, Plan(PIPE, 1, 16): 0.99}, None, layout_cost=1.4, train_samples=1600 + 70 * 16)
    reason = COPUS.decide(state).reason
    assert reason.startswith("stay: nearest is dp1,pp4,mbs1,gbs16: gain 1.0 % (quartiles 0.")
    assert ", needs 2.0 % to repay a 1.4 s switch in the 70 s left" in reason


def test_the_same_situation_gives_the_same_decision_and_plain_json() -> None:
    state = situation(line(DATA, 1.0, 1 / 16) | line(PIPE, 0.6, 1 / 12), known(64.0))
    again = replace(state, throughput=ThroughputModel.from_json(json.loads(json.dumps(state.throughput.to_json()))))
    texts = {json.dumps(COPUS.decide(each).to_json(), allow_nan=False) for each in (state, state, again)}
    assert len(texts) == 1


def in_doubt(seconds: Mapping[Plan, float], truth: Mapping[Plan, float]) -> list[Plan]:
    """The plans of a run that starts knowing ``seconds`` and measures ``truth`` wherever it goes."""
    state = situation(seconds, known(32.0), candidates=Candidates(tuple(truth)))
    visited = []
    for _ in range(12):
        state = replace(state, current=COPUS.decide(state).chosen)
        model = state.throughput
        for _ in range(20):
            model = model.observe(state.current, truth[state.current])
        state = replace(state, throughput=model, consumed_samples=state.consumed_samples + 320)
        visited.append(state.current)
    return visited


def test_a_layout_in_doubt_is_tried_once_and_left_if_it_is_slower() -> None:
    layouts = [DATA, PIPE, Layout(dp=2, pp=2), Layout(dp=2, tp=2)]
    truth = {Plan(layout, 1, 16): seconds for layout, seconds in zip(layouts, (0.5, 0.6, 0.55, 0.7), strict=True)}
    visited = in_doubt({CURRENT: 0.5}, truth)
    assert visited[-1] == CURRENT
    assert all(visited.count(plan) <= 1 for plan in truth if plan != CURRENT)
    assert len(set(visited)) > 1, "nothing was tried"


def test_a_layout_in_doubt_is_kept_if_it_is_faster() -> None:
    truth = {Plan(layout, 1, 16): seconds for layout, seconds in ((DATA, 0.5), (PIPE, 0.35), (Layout(dp=2, tp=2), 0.8))}
    assert in_doubt({CURRENT: 0.5}, truth)[-1] == Plan(PIPE, 1, 16)


def test_no_trial_where_there_is_no_time_for_it() -> None:
    plans = Candidates(tuple(Plan(layout, 1, 16) for layout in (DATA, PIPE)))
    late = situation({CURRENT: 0.5}, known(32.0), candidates=plans, train_samples=1600 + 16)
    assert not COPUS.decide(late).is_switch
    early = situation({CURRENT: 0.5}, known(32.0), candidates=plans)
    assert COPUS.decide(early).reason.startswith("try ")
