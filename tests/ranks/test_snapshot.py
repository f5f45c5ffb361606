"""A job taken back to a snapshot goes on bit for bit as if nothing had happened since, whatever was trained then."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from copus_ext.core.plan import Layout, Plan
from tests.ranks.harness import run_ranks

DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1 "
CASES = {
    "fp32 over tensors": (Plan(Layout(tp=2), 2, 8), DROPOUT),
    "bf16 with its optimizer shared out": (
        Plan(Layout(dp=2, distributed_optimizer=True), 2, 8),
        "--bf16 --use-distributed-optimizer --overlap-grad-reduce " + DROPOUT,
    ),
    "fp16 with a loss scale": (Plan(Layout(dp=2), 2, 8), "--fp16 --initial-loss-scale 65536 --loss-scale-window 2 "),
}


class Outcome(NamedTuple):
    """What three steps from a snapshot came to."""

    losses: list[float]
    as_at_first: bool  # weights and optimizer state, bit for bit
    counts: tuple[Any, ...]


def back_and_forth(plan: Plan, flags: str) -> list[list[Outcome]]:
    """From a snapshot before the first step, and from one after two: three steps, three times.

    Before the second and the third time, other steps are trained with larger batches.
    """
    from copus_ext.adapters.snapshot import Snapshot
    from tests.ranks.steps import build, train_steps
    from tests.ranks.tiny import raw_arguments, start_upstream

    raw = raw_arguments(flags)
    _, layouts, _ = start_upstream(raw, plan)
    job = build(layouts, raw, plan)
    found = []
    for steps_before in (0, 2):
        train_steps(job, layouts, steps_before)
        snapshot, start = Snapshot.take(job), steps_before * plan.global_batch
        found.append(outcomes(job, raw, layouts, snapshot, start))
        snapshot.restore(job)
    return found


def outcomes(job: Any, raw: Any, layouts: Any, snapshot: Any, start: int) -> list[Outcome]:
    from copus_ext.run.switch import Switcher, put_in_charge
    from tests.ranks.gathering import full_state, full_weights, same
    from tests.ranks.steps import train_steps

    first: dict[str, Any] = {}
    found = []
    for detour in (0, 2, 1):
        if detour:
            put_in_charge(job, layouts)
            larger = {"padded_vocab_size": 128, "lr": 2e-3}
            Switcher(raw, layouts).switch(job, job.plan.with_batch(16), larger)
            train_steps(job, layouts, detour, start)
        snapshot.restore(job)
        losses = train_steps(job, layouts, 3, start)
        state = full_state(job) | full_weights(job)
        first = first or state
        rates = [group["lr"] for group in job.optimizer.param_groups]
        counts = (job.plan, job.scheduler.num_steps, *rates, job.optimizer.get_loss_scale().item())
        found.append(Outcome(losses, same(first, state), counts))
    return found


@pytest.mark.parametrize("case", CASES)
def test_going_back_is_exact(case: str) -> None:
    plan, flags = CASES[case]
    for rank in run_ranks(2, back_and_forth, plan, flags):
        for undisturbed, *others in rank:
            assert len(set(undisturbed.losses)) == 3, "something was learned"
            assert undisturbed.counts[0] == plan
            assert others == [undisturbed, undisturbed]
