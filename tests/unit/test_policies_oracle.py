"""The replayed truth of a recorded run: what is read from its events, and what is decided by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copus_ext.core.errors import UserError
from copus_ext.core.events import EventLog
from copus_ext.core.noise.noise_scale import NoiseEstimate
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.policy import PolicySettings
from copus_ext.core.planner.registry import make_policy
from copus_ext.core.policies.copus import CopusPolicy
from copus_ext.core.policies.oracle import WIDTH, OraclePolicy, Truth, read_truth
from tests.unit.situations import CURRENT, DATA, PIPE, situation

Step = tuple[str, float, float | None, float | None]  # plan, seconds, N, S


def record(folder: Path, steps: Sequence[Step], **noise: Any) -> str:
    """``events.jsonl`` of a run with these steps, the noise scale told every fourth step and at the end."""
    consumed, told = 0, []
    with EventLog(folder / "events.jsonl", clock=lambda: 0.0) as log:
        log.write("run_start", 0, 0, world_size=4)
        for iteration, (plan, seconds, signal, scatter) in enumerate(steps, start=1):
            consumed += int(plan.partition("gbs")[2])
            log.write("step", iteration, consumed, plan=plan, step_time_s=seconds)
            told.append([iteration, signal, scatter, "more"])
            if iteration % 4 == 0 or iteration == len(steps):
                log.write("noise_scale", iteration, consumed, steps=told, **noise)
                told = []
    return str(folder)


def oracle(folder: str, **options: float) -> OraclePolicy:
    words = "".join(f",{name}={value}" for name, value in options.items())
    policy = make_policy(PolicySettings(f"oracle:run={folder}{words}"), CURRENT)
    assert isinstance(policy, OraclePolicy)
    return policy


def test_the_noise_scale_is_a_centred_average_over_samples(tmp_path: Path) -> None:
    """Against a loop over all pairs of steps; a step counts by its batch, and steps that say nothing are left out."""
    draw = np.random.default_rng(0)
    texts = ["dp4,mbs1,gbs16"] * 40 + ["dp4,mbs1,gbs32"] * 40
    values = draw.normal((1.0, 50.0), (0.5, 10.0), (80, 2)).tolist()
    values[7] = [None, 3.0]
    truth = read_truth(record(tmp_path, [(text, 1.0, *row) for text, row in zip(texts, values, strict=True)]), CURRENT)
    batches = [16] * 40 + [32] * 40
    after = np.cumsum(batches)
    rows = [(after[k], batches[k], *values[k]) for k in range(80) if None not in values[k]]
    half = WIDTH / 2 * (after[-1] - after[0])
    for index, (here, *_) in enumerate(rows):
        near = [row for row in rows if abs(row[0] - here) <= half]
        weight = sum(row[1] for row in near)
        assert truth.samples[index] == here
        assert truth.N[index] == pytest.approx(sum(row[1] * row[2] for row in near) / weight)
        assert truth.S[index] == pytest.approx(sum(row[1] * row[3] for row in near) / weight)


def test_step_times_are_medians_without_the_first_two_after_each_change(tmp_path: Path) -> None:
    other = "dp1,pp4,mbs1,gbs16"
    times = [(str(CURRENT), 9.0), (str(CURRENT), 8.0), (str(CURRENT), 1.0), (str(CURRENT), 1.2), (str(CURRENT), 7.0)]
    times += [(other, 6.0), (other, 6.0), (other, 0.5), (str(CURRENT), 4.0), (str(CURRENT), 4.0), (str(CURRENT), 1.1)]
    truth = read_truth(record(tmp_path, [(plan, seconds, 1.0, 8.0) for plan, seconds in times]), CURRENT)
    assert dict(truth.step_times) == {CURRENT: pytest.approx(1.15), Plan(PIPE, 1, 16): 0.5}


def test_plans_come_back_as_they_were(tmp_path: Path) -> None:
    """What events do not name is off, whatever the flags say; but at tp 1 sequence parallelism is as in the flags."""
    flags = Plan(Layout(dp=4, sequence_parallel=True, distributed_optimizer=True, recompute="full"), 1, 16)
    plans = [
        Plan(Layout(dp=2, tp=2, sequence_parallel=True), 1, 16),
        Plan(Layout(dp=2, tp=2, distributed_optimizer=True), 1, 16),
        Plan(Layout(dp=4, sequence_parallel=True, recompute="selective"), 1, 16),
    ]
    steps = [(str(plan), 1.0, 1.0, 8.0) for plan in plans for _ in range(3)]
    assert [plan for plan, _ in read_truth(record(tmp_path, steps), flags).step_times] == plans


def test_noise_is_interpolated_without_doubt() -> None:
    samples, signal, scatter = np.array([100.0, 200.0]), np.array([1.0, 2.0]), np.array([10.0, 40.0])
    policy = OraclePolicy(Truth(samples, signal, scatter, ()))
    assert policy.noise_after(150) == NoiseEstimate(25 / 1.5, 25 / 1.5, 25 / 1.5, 1.5, 25.0, math.inf)
    assert policy.noise_after(0) == NoiseEstimate(10.0, 10.0, 10.0, 1.0, 10.0, math.inf)
    assert OraclePolicy(Truth(samples, -signal, scatter, ())).noise_after(150) is None


def test_it_decides_as_copus_would_if_nothing_were_in_doubt(tmp_path: Path) -> None:
    """32 sequences in 1.7 s against 16 in 1 s: 1.88 x the speed, for (1 + 16/200) / (1 + 32/200) of the worth.

    COPUS itself knows no noise scale yet, so it keeps the batch. The throughput model pulls measured times a little
    towards its closed form, hence the tolerance.
    """
    larger = Plan(DATA, 1, 32)
    steps = [(str(CURRENT), 1.0, 1.0, 100.0)] * 8 + [(str(larger), 1.7, 1.0, 100.0)] * 8
    state = situation({CURRENT: 1.0, larger: 1.7}, None)
    assert not CopusPolicy().decide(state).is_switch
    decision = oracle(record(tmp_path, steps)).decide(state)
    assert decision.chosen == larger
    assert decision.gain == pytest.approx(32 / 1.7 / 16 * (1 + 16 / 200) / (1 + 32 / 200) - 1, abs=0.01)
    assert decision.gain_high - decision.gain_low < 0.02
    assert decision.reason.endswith("; by the record the noise scale is 100 sequences, c 2")


def test_c_decides_what_a_batch_is_worth(tmp_path: Path) -> None:
    folder = record(tmp_path, [(str(CURRENT), 1.0, 1.0, 8.0)] * 8)
    state = situation({CURRENT: 1.0, Plan(DATA, 1, 32): 1.7}, None)
    assert oracle(folder, c=100).decide(state).chosen.global_batch == 32
    assert not oracle(folder, c=0.5).decide(state).is_switch


def test_a_record_that_cannot_be_replayed_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --copus-policy oracle:run=DIR"):
        make_policy(PolicySettings("oracle"), CURRENT)
    cases: list[tuple[Sequence[Step], dict[str, str], str]] = [
        ([], {}, "no steps whose noise scale was measured"),
        ([(str(CURRENT), 1.0, None, None)], {}, "no steps whose noise scale was measured"),
        ([(str(CURRENT), 1.0, 1.0, 1.0)], {"estimator": "layernorm"}, "another estimator"),
        ([("dp8,mbs1,gbs16", 1.0, 1.0, 1.0)], {}, "had other ranks"),
    ]
    for number, (steps, noise, says) in enumerate(cases):
        folder = tmp_path / str(number)
        record(folder, steps, **noise)
        with pytest.raises(UserError, match=says):
            oracle(str(folder))
    with pytest.raises(UserError, match="has no events to replay") as caught:
        oracle(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)
