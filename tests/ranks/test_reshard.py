"""Weights and optimizer state through walks over layouts of 4 ranks: every bit kept, with the least bytes."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest

from copus_ext.core.plan import Layout, Plan, parse_plan
from tests.ranks.harness import run_ranks

_BASE = Plan(Layout(dp=4), micro_batch=1, global_batch=4)
_GATED = "--swiglu --group-query-attention --num-query-groups 2 --disable-bias-linear "
_EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather --disable-bias-linear "
    "--moe-router-load-balancing-type none --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
)


@dataclass(frozen=True)
class Walk:
    """Layouts that one model goes through, one after the other; the first comes again at the end."""

    flags: str
    plans: str

    def parsed(self) -> list[Plan]:
        return [parse_plan(words, _BASE) for words in self.plans.split()]


WALKS = {
    "fp32-tied": Walk(
        "",
        "dp4 tp2,dp2 pp4 tp2,pp2,zero1 dp4,zero1 pp2,vpp2,dp2,zero1 tp4 "
        "pp2,dp2 tp2,dp2,zero1 pp2,dp2,zero1 tp2,pp2 dp4",
    ),
    "fp32-untied-swiglu-gqa": Walk(
        _GATED + "--untie-embeddings-and-output-weights --overlap-grad-reduce --overlap-param-gather ",
        "pp2,dp2,zero1 tp4,zero1 dp4,zero1 tp2,pp2,zero1 pp2,vpp2,dp2,zero1 tp2,dp2,zero1 pp4,zero1 pp2,dp2,zero1",
    ),
    "bf16-swiglu-gqa": Walk(
        _GATED + "--bf16 ",
        "tp2,dp2 dp4,zero1 pp4 tp4,zero1 pp2,vpp2,dp2 tp2,pp2,zero1 dp4 pp2,dp2,zero1 tp2,dp2,zero1 tp2,dp2",
    ),
    "bf16-experts": Walk(_EXPERTS + "--bf16 ", "dp4 ep2,dp4,zero1 pp2,dp2,ep2 ep4,dp4,zero1 pp4 ep4,dp4 dp4"),
    "fp16": Walk("--fp16 --initial-loss-scale 1024 --loss-scale-window 2 ", "dp4 tp2,pp2,zero1 pp2,dp2 dp4"),
    "fp32-sgd": Walk("--optimizer sgd ", "dp4 tp2,pp2 pp2,dp2 tp4 dp4"),
}


def _start(flags: str, plan: Plan) -> tuple[Any, Any]:
    """Upstream up, and random numbers the same for every job that is built."""
    import torch

    from tests.ranks.tiny import raw_arguments, start_upstream

    torch.compiler.set_stance("force_eager")
    gc.freeze()
    raw = raw_arguments(flags)
    _, layouts, _ = start_upstream(raw, plan)
    return raw, layouts


def _seeded(layouts: Any, raw: Any, plan: Plan) -> Any:
    import torch

    from tests.ranks.steps import build

    torch.manual_seed(raw.seed)
    return build(layouts, raw, plan)


def _walk(walk: Walk) -> dict[str, Any]:
    from copus_ext.adapters.carry import carry_scheduler
    from copus_ext.adapters.reshard import PlanCache, reshard
    from tests.ranks.gathering import full_state, full_weights, same
    from tests.ranks.steps import build, train_steps

    plans = walk.parsed()
    raw, layouts = _start(walk.flags, plans[0])
    twin = train_steps(_seeded(layouts, raw, plans[1]), layouts, 4)
    job = first = _seeded(layouts, raw, plans[0])
    train_steps(job, layouts, 2)
    reports, kept, cache = [], [], PlanCache()
    for number, plan in enumerate(plans[1:]):
        new = build(layouts, raw, plan, initialise_weights=False)
        chunk_bytes = 100_000 if number % 2 else 256 * 2**20
        reports.append(reshard(job, new, plans=cache, chunk_bytes=chunk_bytes))
        carry_scheduler(job, new)
        if number == 0:  # not earlier: gathers of updated weights were pending, and a reshard finishes them
            state, weights, second = full_state(first), full_weights(first), new
        kept.append(same(full_state(new), state) and same(full_weights(new), weights))
        job = new
    return {
        "exact": [report.exact for report in reports],
        "kept": kept,
        "bytes": [(report.bytes_moved, report.bytes_minimum) for report in reports],
        "home": _same_on_this_rank(first, job),
        "twin": twin[2:],
        "switched": train_steps(second, layouts, 2, first_sample=8),
        "uninterrupted": train_steps(first, layouts, 2, first_sample=8),
        "returned": train_steps(job, layouts, 2, first_sample=8),
        "rates": {group["lr"] for j in (first, second, job) for group in j.optimizer.param_groups},
        "scales": [float(j.optimizer.get_loss_scale()) for j in (first, second, job)],
    }


def _same_on_this_rank(left: Any, right: Any) -> bool:
    """Every tensor that a job keeps, without gathering."""
    import torch

    from copus_ext.adapters.job_state import job_state

    pairs = zip(*(job_state(job, with_moments=True).pieces for job in (left, right)), strict=True)
    kept = [torch.equal(a, b) for p, q in pairs for a, b in zip(p.tensors, q.tensors, strict=True)]
    models = zip(left.model, right.model, strict=True)
    kept += [torch.equal(a, b) for m, n in models for a, b in zip(m.parameters(), n.parameters(), strict=True)]
    return all(kept)


@pytest.mark.parametrize("name", WALKS)
def test_walk_keeps_every_bit(name: str) -> None:
    results = run_ranks(4, _walk, WALKS[name])
    # Half precision rounds at every tensor-parallel cut; the state is bitwise the same all the while.
    tolerance = 1e-5 if "fp32" in name else 1e-3
    for result in results:
        assert all(result["exact"])
        assert all(result["kept"])
        assert result["home"]
        assert all(moved == least for moved, least in result["bytes"])
        assert any(moved for moved, _ in result["bytes"])
        assert result["switched"] == pytest.approx(result["twin"], rel=tolerance)
        assert result["switched"] == pytest.approx(result["uninterrupted"], rel=tolerance)
        assert result["returned"] == result["uninterrupted"]
        assert len(result["rates"]) == 1
        assert result["scales"] == [4096.0 if name == "fp16" else 1.0] * 3


def _edges() -> dict[str, Any]:
    """What is not a walk: a job that never stepped, a cached plan, damage, refusals, random numbers."""
    from copus_ext.adapters import reshard as module
    from tests.ranks.gathering import full_state, same
    from tests.ranks.steps import build, train_steps

    plans = [parse_plan(words, _BASE) for words in ("tp2,dp2", "pp2,dp2,zero1")]
    raw, layouts = _start("", plans[0])
    old = _seeded(layouts, raw, plans[0])
    new = build(layouts, raw, plans[1], initialise_weights=False)
    found: dict[str, Any] = {"fresh": module.reshard(old, new).exact and same(full_state(new), full_state(old))}
    train_steps(old, layouts, 1)
    before = full_state(old)
    layouts.activate(new.plan.layout, new.args)
    cache = module.PlanCache()
    found["cached"] = [_plans_again(module, old, new, cache) for _ in range(2)]
    found["untouched"] = same(full_state(old), before)
    found["damage"] = _with_damage(module, old, new)
    found["refusals"] = _refusals(module, old, new)
    found["random"] = _random_numbers(layouts, old, new)
    return found


def _plans_again(module: Any, old: Any, new: Any, cache: Any) -> tuple[bool, bool]:
    with mock.patch.object(module, "plan_transfer", wraps=module.plan_transfer) as planned:
        exact = module.reshard(old, new, plans=cache).exact
    return exact, planned.called


def _with_damage(module: Any, old: Any, new: Any) -> tuple[bool, tuple[str, ...]]:
    """One bit of one element, flipped on its way."""
    import torch

    def damaging(transfers: Any, before: Any, after: Any, chunk_bytes: int) -> None:
        exchange(transfers, before, after, chunk_bytes)
        after[0].tensors[0].view(torch.int32)[5] ^= 1

    exchange = module.exchange
    with mock.patch.object(module, "exchange", damaging):
        report = module.reshard(old, new)
    return report.exact, report.differing


def _refusals(module: Any, old: Any, new: Any) -> list[str]:
    """Each must be said on every rank, also where only one rank has the reason."""
    import torch.distributed as dist

    def refusing(job: Any, *, with_moments: bool) -> Any:
        if dist.get_rank() == 2:
            raise module.UnsupportedReshard("a strange tensor")
        return job_state(job, with_moments=with_moments)

    job_state = module.job_state
    said = []
    for changes in ({"bf16": True}, {"padded_vocab_size": 64}, {"optimizer_cpu_offload": True}):
        with mock.patch.multiple(new.args, **changes), pytest.raises(module.UnsupportedReshard) as refusal:
            module.reshard(old, new)
        said.append(str(refusal.value))
    with mock.patch.object(module, "job_state", refusing), pytest.raises(module.UnsupportedReshard) as refusal:
        module.reshard(old, new)
    return [*said, str(refusal.value)]


def _random_numbers(layouts: Any, old: Any, new: Any) -> dict[str, Any]:
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from copus_ext.adapters.carry import RngState

    def draw() -> tuple[float, float]:
        with get_cuda_rng_tracker().fork():
            inside = float(torch.rand((), device="cuda"))
        return inside, float(torch.rand((), device="cuda"))

    layouts.activate(old.plan.layout, old.args)
    state = RngState.capture()
    drawn: dict[str, tuple[float, ...]] = {"first": draw(), "next": draw()}
    state.restore()
    drawn["restored"] = draw()
    state.restore_for(old, iteration=7)
    drawn["same layout"] = draw()
    layouts.activate(new.plan.layout, new.args)
    for iteration in (7, 8):
        state.restore_for(new, iteration)
        drawn[f"at {iteration}"] = draw()
    layouts.activate(old.plan.layout, old.args)
    replace(state, places=()).restore_for(old, iteration=9)
    drawn["tp rank"] = old.groups.tp.rank(), *draw()
    return drawn


def test_edges_of_a_reshard() -> None:
    results = run_ranks(4, _edges)
    for result in results:
        assert result["fresh"]
        assert result["untouched"]
        assert result["cached"] == [(True, True), (True, False)]
        exact, differing = result["damage"]
        assert not exact
        assert differing
        assert [said.split()[0] for said in result["refusals"]] == ["bf16", "padded_vocab_size", "the", "rank"]
        assert "rank 2: a strange tensor" in result["refusals"][-1]
        drawn = result["random"]
        assert drawn["restored"] == drawn["same layout"] == drawn["first"] != drawn["next"]
        assert len({drawn[name] for name in ("first", "next", "at 7", "at 8")}) == 4
    tensor_parallel = {result["random"]["tp rank"] for result in results}
    inside, outside = ({draws[n] for draws in tensor_parallel} for n in (1, 2))
    assert len(tensor_parallel) == len(inside) == 2  # each rank of a pair has masks of its own ...
    assert len(outside) == 1  # ... but for what both compute alike


def _census(flags: str) -> list[int]:
    """Live models before a switch, with both jobs, and after the old one was released."""
    from megatron.core.models.gpt import GPTModel

    from copus_ext.adapters.reshard import reshard
    from tests.ranks.steps import build, train_steps

    def alive() -> int:
        gc.collect()
        return sum(isinstance(thing, GPTModel) for thing in gc.get_objects())

    plans = [parse_plan(words, _BASE) for words in ("dp4,zero1", "tp2,pp2,zero1")]
    raw, layouts = _start(flags, plans[0])
    job = _seeded(layouts, raw, plans[0])
    counts = [alive()]
    for plan in (plans[1], plans[0]):
        train_steps(job, layouts, 1)
        new = build(layouts, raw, plan, initialise_weights=False)
        reshard(job, new)
        counts.append(alive())
        job.release()
        job = new
        del new
        counts.append(alive())
    return counts


@pytest.mark.parametrize("flags", ["", "--overlap-grad-reduce --overlap-param-gather"])
def test_released_job_is_gone(flags: str) -> None:
    for counts in run_ranks(4, _census, flags):
        assert counts == [1, 2, 1, 2, 1]
