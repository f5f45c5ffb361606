"""Switches of a run: what is made ready ahead of them, what is kept behind them, and that training does not notice."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from copus_ext.core.plan import Layout, Plan, parse_plan
from tests.ranks.harness import run_ranks

_BASE = Plan(Layout(dp=4), micro_batch=1, global_batch=8)
_OVERRIDES = {"padded_vocab_size": 128}


def _plan(words: str) -> Plan:
    return parse_plan(words, _BASE)


def _started(flags: str = "") -> tuple[Any, Any, Any]:
    """A switcher, the groups it uses, and a job of the base plan that has made two steps."""
    import torch

    from copus_ext.run.switch import Switcher
    from tests.ranks.steps import build, train_steps
    from tests.ranks.tiny import raw_arguments, start_upstream

    raw = raw_arguments(flags)
    _, layouts, _ = start_upstream(raw, _BASE)
    torch.manual_seed(raw.seed)
    job = build(layouts, raw, _BASE)
    train_steps(job, layouts, 2)
    return Switcher(raw, layouts), layouts, job


def _prepared() -> dict[str, Any]:
    from megatron.training import get_args

    from copus_ext.adapters.carry import RngState
    from copus_ext.adapters.snapshot import Snapshot
    from copus_ext.run import switch as module
    from tests.ranks.steps import train_steps

    switcher, layouts, job = _started("--hidden-dropout 0.1 ")
    job.args.train_iters = 5  # as a run sets it, to end a segment there
    snapshot = Snapshot.take(job)
    undisturbed = train_steps(job, layouts, 1, first_sample=16)
    snapshot.restore(job)
    with mock.patch.object(module, "build_job", wraps=module.build_job) as built:
        before = RngState.capture()
        switcher.prepare(job, _plan("tp2,pp2"), _OVERRIDES)
        in_charge = get_args() is job.args and RngState.capture().places == before.places
        disturbed = train_steps(job, layouts, 1, first_sample=16)
        rates = [_rates(job)]
        job, first = switcher.switch(job, _plan("tp2,pp2"), _OVERRIDES)
        rates.append(_rates(job))
        job, second = switcher.switch(job, _plan("dp4,gbs16"), _OVERRIDES)
        rates.append(_rates(job))
        job, third = switcher.switch(job, _plan("tp2,pp2,mbs2"), _OVERRIDES)
        rates.append(_rates(job))
        job, batch = switcher.switch(job, _plan("tp2,pp2,mbs1,gbs16"), _OVERRIDES)
        times_built = built.call_count
    return {
        "undisturbed": undisturbed,
        "disturbed": disturbed,
        "in charge": in_charge,
        "built": times_built,
        "rates": rates,
        "exact": [report.exact for report in (first, second, third)],
        "phases": sorted(batch.seconds),
        "plans": (job.plan, get_args().global_batch_size, get_args().micro_batch_size),
        "losses": train_steps(job, layouts, 1, first_sample=24),
    }


def _rates(job: Any) -> tuple[float, ...]:
    """Learning rates of the next step, with their bounds."""
    return tuple(sorted({group[name] for group in job.optimizer.param_groups for name in ("lr", "max_lr", "min_lr")}))


def test_what_is_made_ready_is_not_noticed_and_not_made_again() -> None:
    results = run_ranks(4, _prepared)
    for result in results:
        assert result["in charge"]
        assert result["disturbed"] == result["undisturbed"], "dropout masks included"
        assert result["built"] == 1, "tp2,pp2 ahead of the first switch; nothing else, though four switches followed"
        assert all(result["exact"])
        assert len(result["rates"]) == 4
        assert len(set(result["rates"])) == 1, "the schedule of the learning rate goes on, in new jobs and in kept ones"
        assert result["phases"] == ["prepare"]
        assert result["plans"] == (_plan("tp2,pp2,mbs1,gbs16"), 16, 1)
        assert result["losses"] == results[0]["losses"]


def _failing() -> tuple[str, bool, list[float], list[float]]:
    import torch.distributed as dist

    from copus_ext.run import switch as module
    from tests.ranks.steps import build, train_steps
    from tests.ranks.tiny import raw_arguments

    def without_room(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("no room for this model")
        return build_job(*args, **kwargs)

    switcher, layouts, job = _started()
    build_job = module.build_job
    plan = _plan("pp2,dp2")
    with mock.patch.object(module, "build_job", without_room), pytest.raises(module.SwitchFailed) as failure:
        switcher.prepare(job, plan, _OVERRIDES)
    switcher.prepare(job, plan, _OVERRIDES)  # not tried again, for it may never fit: nothing happens
    left_alone = plan.layout not in switcher._hollow
    after = train_steps(job, layouts, 2, first_sample=16)
    raw = raw_arguments()
    import torch

    torch.manual_seed(raw.seed)
    twin = build(layouts, raw, _BASE)
    return str(failure.value), left_alone, after, train_steps(twin, layouts, 4)[2:]


def test_what_cannot_be_made_ready_is_left_alone() -> None:
    for said, left_alone, after, twin in run_ranks(4, _failing):
        assert "rank 1: no room for this model" in said
        assert left_alone
        assert after == twin
