"""Weights and optimizer state through walks over layouts of 4 ranks: every bit kept, with the least bytes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from copus_ext.core.plan import Layout, Plan, parse_plan
from tests.ranks.faults import (
    blind,
    cut_off_since_the_last_move,
    damage,
    miscopy,
    no_memory,
    no_memory_behind,
    no_memory_for_packing,
    slow_reader,
    unreadable,
    unreadable_weights,
)
from tests.ranks.harness import run_ranks, skip_without_packages
from tests.ranks.moving import equal, finish_gathers, is_hollow, moved, on_this_rank, seeded, start

_BASE = Plan(Layout(dp=4), micro_batch=1, global_batch=4)
_GATED = "--swiglu --group-query-attention --num-query-groups 2 --disable-bias-linear "
_EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather --disable-bias-linear "
    "--moe-router-load-balancing-type none --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
)
# Otherwise Muon's update depends on how matrices are cut, and is computed in bf16.
_MUON = "--optimizer muon --muon-tp-mode duplicated --muon-fp32-matmul-prec high "


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
    "fp32-context": Walk(_GATED, "cp2,dp2,zero1 cp4 tp2,cp2,zero1 pp2,cp2 cp2,dp2,zero1"),
    "bf16-context-experts": Walk(
        _EXPERTS + "--bf16 ", "cp2,dp2,ep2,zero1 dp4 cp4,ep4,zero1 pp2,cp2,ep2 cp2,dp2,ep2,zero1"
    ),
    "fp16": Walk("--fp16 --initial-loss-scale 1024 --loss-scale-window 2 ", "dp4 tp2,pp2,zero1 pp2,dp2 dp4"),
    "fp32-sgd": Walk("--optimizer sgd ", "dp4 tp2,pp2 pp2,dp2 tp4 dp4"),
    "fp32-muon": Walk(_MUON + _GATED, "dp4 tp2,dp2 pp4 tp2,pp2 pp2,vpp2,dp2 tp4 dp4"),
    "bf16-muon-experts": Walk(_MUON + _EXPERTS + "--bf16 ", "dp4 ep2,dp4 pp2,dp2,ep2 ep4,dp4 pp4 dp4"),
    "bf16-muon-in-layers": Walk(
        _MUON + _GATED + "--bf16 ",
        "dp4,zero1 tp2,dp2 pp2,dp2,zero1 tp4 cp2,dp2,zero1 dp4,zero1",
    ),
    "bf16-muon-experts-in-layers": Walk(
        _MUON + _EXPERTS + "--bf16 ", "ep2,dp4,zero1 dp4 pp2,dp2,ep2,zero1 ep2,dp4,zero1"
    ),
    "fp32-lion": Walk("--optimizer lion ", "dp4 tp2,pp2 dp4"),
}


def _walk(walk: Walk) -> dict[str, Any]:
    import torch

    from copus_ext.adapters.reshard import PlanCache
    from copus_ext.adapters.wire import TorchWire
    from tests.ranks.gathering import full_state, full_weights, same
    from tests.ranks.steps import train_steps

    plans = walk.parsed()
    raw, layouts = start(walk.flags, plans[0])
    twin, uninterrupted = (train_steps(seeded(layouts, raw, plan), layouts, 4)[2:] for plan in plans[1::-1])
    second = seeded(layouts, raw, plans[0])
    train_steps(second, layouts, 2)
    job = seeded(layouts, raw, plans[0])
    train_steps(job, layouts, 2)
    finish_gathers(job)
    state, weights, home = full_state(job), full_weights(job), on_this_rank(job)
    reports, kept, left, cache = [], [], {}, PlanCache()
    for number, plan in enumerate(plans[1:]):
        left[job.plan.layout] = job
        cache.wire = TorchWire() if number % 4 in (1, 2) else None
        parameters = _optimized(job)
        parameters[0].grad = torch.zeros_like(parameters[0])  # upstream makes such ones of half-precision gradients
        job, report = moved(
            job,
            plan,
            raw,
            layouts,
            left,
            plans=cache,
            chunk_bytes=None if number % 2 else 100_000,
            staged=number == 2 or None,
        )
        reports.append(report)
        kept.append(same(full_state(job), state) and same(full_weights(job), weights) and _buffers_are_whole(job))
        kept.append(parameters[0].grad is None)
    second, _ = moved(second, plans[1], raw, layouts, {})
    return {
        "kept": kept,
        "extra": [(report.peak_extra_bytes, report.state_bytes) for report in reports[::2]],  # in small rounds
        "bytes": [(report.bytes_moved, report.bytes_minimum) for report in reports],
        "home": equal(home, on_this_rank(job)),
        "twin": twin,
        "switched": train_steps(second, layouts, 2, first_sample=8),
        "uninterrupted": uninterrupted,
        "returned": train_steps(job, layouts, 2, first_sample=8),
        "rates": {group["lr"] for j in (second, job) for group in j.optimizer.param_groups},
        "scales": [float(j.optimizer.get_loss_scale()) for j in (second, job)],
    }


def _optimized(job: Any) -> list[Any]:
    from copus_ext.adapters.optimizer_shards import inner_optimizers

    groups = [group for wrapper in inner_optimizers(job.optimizer) for group in wrapper.optimizer.param_groups]
    return [parameter for group in groups for parameter in group["params"]]


def _buffers_are_whole(job: Any) -> bool:
    """Down to the padding, which no parameter reaches."""
    buffers = [b for chunk in job.model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    tensors = [t for buffer in buffers for t in (buffer.param_data, buffer.grad_data) if t is not None]
    return all(t.untyped_storage().nbytes() >= t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name", WALKS)
def test_walk_keeps_every_bit(name: str) -> None:
    skip_without_packages(WALKS[name].flags)
    results = run_ranks(4, _walk, WALKS[name])
    # Half precision rounds at every tensor-parallel cut; the state is bitwise the same all the while.
    tolerance = 1e-5 if "fp32" in name else 1e-3
    for result in results:
        assert all(result["kept"])
        assert result["home"]
        assert all(moved == least for moved, least in result["bytes"])
        assert any(moved for moved, _ in result["bytes"])
        assert all(extra <= 0.1 * state for extra, state in result["extra"])
        assert result["switched"] == pytest.approx(result["twin"], rel=tolerance)
        assert result["switched"] == pytest.approx(result["uninterrupted"], rel=tolerance)
        assert result["returned"] == result["uninterrupted"]
        assert len(result["rates"]) == 1
        assert result["scales"] == [4096.0 if name == "fp16" else 1.0] * 2


def _every_pair(world: int, flags: str, words: str) -> tuple[int, list[str]]:
    """How many ordered pairs of layouts there are, and those between which something was lost."""
    from copus_ext.adapters.reshard import PlanCache
    from copus_ext.adapters.wire import TorchWire
    from tests.ranks.gathering import full_state, full_weights, same
    from tests.ranks.steps import train_steps

    base = Plan(Layout(dp=world), micro_batch=1, global_batch=8)
    plans = [parse_plan(one, base) for one in words.split()]
    raw, layouts = start(flags, plans[0])
    job = seeded(layouts, raw, plans[0])
    train_steps(job, layouts, 1)
    state, weights = full_state(job), full_weights(job)
    left: dict[Layout, Any] = {}
    cache, pairs, differing = PlanCache(wire=TorchWire() if world == 4 else None), set(), []
    for number in _through_all_pairs(len(plans)):
        old, plan = job.plan, plans[number]
        left[old.layout] = job
        job, report = moved(job, plan, raw, layouts, left, plans=cache)
        pairs.add((old.layout, plan.layout))
        kept = same(full_state(job), state) and same(full_weights(job), weights)
        if not kept or report.bytes_moved != report.bytes_minimum:
            differing.append(f"{old.layout} to {plan.layout}")
    return len(pairs), differing


def _through_all_pairs(count: int) -> Iterator[int]:
    """Where to go from place 0, so that every place is left once for every other one."""
    for here in range(count):
        for there in range(here + 2, count):
            yield from (there, here)
        if here + 1 < count:
            yield here + 1
    yield from reversed(range(count - 1))


@pytest.mark.parametrize(
    ("world", "flags", "words"),
    [
        (4, "--bf16 ", "dp4,zero1 tp4 pp4 tp2,pp2 pp2,vpp2,dp2,zero1"),
        (8, "", "dp8,zero1 tp8 tp2,pp2,cp2"),
    ],
)
def test_every_pair_of_layouts(world: int, flags: str, words: str) -> None:
    for pairs, differing in run_ranks(world, _every_pair, world, flags, words):
        assert pairs == len(words.split()) * (len(words.split()) - 1)
        assert not differing


def _edges() -> dict[str, Any]:
    """What is not a walk: a job that never stepped, a cached plan, faults, refusals, random numbers."""
    from copus_ext.adapters import reshard as module
    from tests.ranks.gathering import full_state, same
    from tests.ranks.steps import build, train_steps

    plans = [parse_plan(words, _BASE) for words in ("tp2,dp2", "pp2,dp2,zero1")]
    raw, layouts = start("", plans[0])
    old = seeded(layouts, raw, plans[0])
    before = full_state(old)
    new, _ = moved(old, plans[1], raw, layouts, {})
    found: dict[str, Any] = {"fresh": same(full_state(new), before)}
    old, _ = moved(new, plans[0], raw, layouts, {plans[0].layout: old})
    train_steps(old, layouts, 1)
    layouts.activate(new.plan.layout, new.args)
    found["planned"] = _plans_there_and_back(module, old, new)
    found["refusals"] = _refusals(module, old, build(layouts, raw, plans[1], initialise_weights=False))
    found["random"] = _random_numbers(layouts, old, new)
    return found


def _plans_there_and_back(module: Any, old: Any, new: Any) -> list[int]:
    """How often a plan was made, after each of four moves."""
    cache, made = module.PlanCache(), []
    with mock.patch.object(module, "plan_transfer", wraps=module.plan_transfer) as planned:
        for _ in range(2):
            for source, target in ((old, new), (new, old)):
                module.reshard(source, target, plans=cache)
                made.append(planned.call_count)
    return made


def _refusals(module: Any, old: Any, new: Any) -> list[str]:
    """Each must be said on every rank, also where only one rank has the reason."""
    import torch.distributed as dist

    def refusing(job: Any, *, with_moments: bool) -> Any:
        if dist.get_rank() == 2:
            raise module.UnsupportedReshard("a strange tensor")
        return memory(job, with_moments=with_moments)

    memory = module.JobMemory
    said = []
    layer_wise = {"optimizer": "muon", "use_layer_wise_distributed_optimizer": True}  # in fp32
    offloaded = {"optimizer_cpu_offload": True}
    overlapped = {"bf16": True, "overlap_param_gather": True, **layer_wise}
    for changes in (
        {"bf16": True},
        {"padded_vocab_size": 64},
        offloaded,
        layer_wise,
        overlapped,
        {"optimizer": "soap"},
    ):
        with mock.patch.multiple(new.args, **changes), pytest.raises(module.UnsupportedReshard) as refusal:
            module.reshard(old, new)
        said.append(str(refusal.value))
    with mock.patch.object(module, "JobMemory", refusing), pytest.raises(module.UnsupportedReshard) as refusal:
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
    drawn["tp, dp rank"] = old.groups.tp.rank(), old.groups.dp.rank(), *draw()
    return drawn


def test_edges_of_a_reshard() -> None:
    results = run_ranks(4, _edges)
    for result in results:
        assert result["fresh"]
        assert result["planned"] == [1, 2, 2, 2]
        first_words = " ".join(said.split()[0] for said in result["refusals"])
        assert first_words == "bf16 padded_vocab_size the --optimizer the the rank"
        assert "--optimizer muon with --use-distributed-optimizer needs --bf16" in result["refusals"][3]
        assert "--optimizer muon with --overlap-param-gather" in result["refusals"][4]
        assert "--optimizer soap" in result["refusals"][5]
        assert "rank 2: a strange tensor" in result["refusals"][-1]
        drawn = result["random"]
        assert drawn["restored"] == drawn["same layout"] == drawn["first"] != drawn["next"]
        assert len({drawn[name] for name in ("first", "next", "at 7", "at 8")}) == 4
    places = [result["random"]["tp, dp rank"] for result in results]
    assert len({inside for *_, inside, _ in places}) == 4  # every rank has masks of its own ...
    assert len({(dp, outside) for _, dp, _, outside in places}) == 2  # ... but for what a pair computes alike
    assert len({outside for *_, outside in places}) == 2


def _faults(flags: str, words: str, staged: bool, by_messages: bool) -> list[tuple[str, bool, bool]]:
    """Moves that fail in one round after the other: what is said, and whether the old job is as it was."""
    import torch

    from copus_ext.adapters.reshard import MoveFailed, PlanCache
    from copus_ext.adapters.wire import TorchWire, open_wire
    from tests.ranks.steps import build, train_steps

    plans = [parse_plan(one, _BASE) for one in words.split()]
    raw, layouts = start(flags, plans[0])
    twin = train_steps(seeded(layouts, raw, plans[0]), layouts, 3)
    job = seeded(layouts, raw, plans[0])
    train_steps(job, layouts, 2)
    before, seen = on_this_rank(job), []
    faults = [(no_memory, (0, 1, 4)), (damage, (0, 1, 4)), (no_memory_behind, (0,)), (no_memory_for_packing, (0,))]
    faults += [(miscopy, (0, 1))]
    if not by_messages and open_wire(torch.device("cpu")).name == "memory":
        faults += [(unreadable, (0, 3)), (blind, (0, 3)), (cut_off_since_the_last_move, (0,))]
    for fault, rounds in faults:
        for at in rounds:
            new = build(layouts, raw, plans[1], initialise_weights=False)
            options = {"chunk_bytes": 100_000, "staged": staged}
            cache = PlanCache(wire=TorchWire() if by_messages else open_wire(torch.device("cpu")))
            with fault(at), pytest.raises(MoveFailed) as failure:
                moved(job, plans[1], raw, layouts, {plans[1].layout: new}, plans=cache, **options)
            seen.append((str(failure.value), equal(before, on_this_rank(job)), is_hollow(new)))
    after = train_steps(job, layouts, 1, first_sample=8)
    seen.append(("trains on", after == twin[2:], True))
    return seen


@pytest.mark.parametrize(
    ("flags", "words", "staged", "by_messages"),
    [
        ("", "tp2,dp2 pp4", False, False),
        ("--bf16 ", "dp4,zero1 tp2,pp2", False, True),
        ("--bf16 ", "pp4 dp2,tp2,zero1", True, False),
    ],
)
def test_a_fault_brings_everything_back(flags: str, words: str, staged: bool, by_messages: bool) -> None:
    for seen in run_ranks(4, _faults, flags, words, staged, by_messages):
        for said, as_it_was, hollow in seen:
            assert as_it_was, said
            assert hollow, said
        assert [said for said, *_ in seen[:3]] == ["rank 2: out of memory"] * 3
        assert all("checksums differ" in said for said, *_ in seen[3:6])
        assert [said for said, *_ in seen[6:8]] == ["rank 2: out of memory"] * 2
        assert all("rank 1: copies differ: " in said for said, *_ in seen[8:10])
        assert {said for said, *_ in seen[10:-2]} <= {"rank 1: not permitted"}
        assert {said for said, *_ in seen[14:-1]} <= {"rank 0: not permitted"}


def _while_one_is_slow(words: str) -> list[bool]:
    from tests.ranks.gathering import full_state, same
    from tests.ranks.steps import train_steps

    plans = [parse_plan(one, _BASE) for one in words.split()]
    raw, layouts = start("", plans[0])
    job = seeded(layouts, raw, plans[0])
    train_steps(job, layouts, 2)
    state, kept = full_state(job), []
    for plan in plans[1:]:
        with slow_reader():
            job, _ = moved(job, plan, raw, layouts, {}, chunk_bytes=100_000)
        kept.append(same(full_state(job), state))
    return kept


def test_what_a_slow_rank_has_not_read_yet_stays() -> None:
    for kept in run_ranks(4, _while_one_is_slow, "tp2,dp2 pp4 tp4 dp2,pp2,zero1"):
        assert all(kept)


def _weights_on_the_way(flags: str, words: str) -> list[bool]:
    import torch

    from copus_ext.adapters.reshard import PlanCache
    from copus_ext.adapters.wire import open_wire
    from tests.ranks.gathering import full_weights, same
    from tests.ranks.steps import train_steps

    plans = [parse_plan(one, _BASE) for one in words.split()]
    raw, layouts = start(flags, plans[0])
    job = seeded(layouts, raw, plans[0])
    train_steps(job, layouts, 2)
    weights, seen = full_weights(job), []
    reads = open_wire(torch.device("cpu")).name == "memory"
    for readable in (True, False):
        for plan in (*plans[1:], plans[0]):
            cache = PlanCache()
            with contextlib.nullcontext() if readable else unreadable_weights(), _gathers() as gathers:
                job, _ = moved(job, plan, raw, layouts, {}, plans=cache)
            by_messages = not (reads and readable)
            seen.append(same(full_weights(job), weights) and bool(gathers.call_count) == by_messages)
            seen.append((cache.wire is None) == (reads and not readable))
    return seen


def _gathers() -> Any:
    """Upstream's gathers of weights, counted."""
    from megatron.core.distributed import DistributedDataParallel

    sync = DistributedDataParallel.start_param_sync
    return mock.patch.object(DistributedDataParallel, "start_param_sync", autospec=True, side_effect=sync)


@pytest.mark.parametrize("flags", ["", _EXPERTS])
def test_weights_of_other_ranks_come_the_way_of_the_rest_or_by_messages(flags: str) -> None:
    for kept in run_ranks(4, _weights_on_the_way, "--bf16 " + flags, "dp4,zero1 pp2,vpp2,dp2,zero1 dp2,tp2,zero1"):
        assert kept == [True] * 12


def _census(flags: str) -> list[int]:
    """Live models before a switch, with both jobs, and after the old one was released."""
    from megatron.core.models.gpt import GPTModel

    from copus_ext.adapters.reshard import reshard
    from tests.ranks.steps import build, train_steps

    def alive() -> int:
        gc.collect()
        return sum(isinstance(thing, GPTModel) for thing in gc.get_objects())

    plans = [parse_plan(words, _BASE) for words in ("dp4,zero1", "tp2,pp2,zero1")]
    raw, layouts = start(flags, plans[0])
    job = seeded(layouts, raw, plans[0])
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


def _foreseen(flags: str, words: str, chunk_bytes: int) -> list[tuple[int, int]]:
    """Of each move: bytes that it was said to take in between, beyond those held when it begins, and that it took."""
    import torch.distributed as dist

    from copus_ext.adapters import reshard as module
    from copus_ext.adapters.staging import extra_bytes
    from tests.ranks.steps import train_steps

    begun: list[tuple[int, int]] = []
    ledgers: list[Any] = []

    class Watched(module.Ledger):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            ledgers.append(self)

    def foreseeing(plan: Any, old: Any, new: Any) -> bool:
        begun.append((extra_bytes(plan, old, new, dist.get_rank()), ledgers[-1].held))
        ledgers[-1].peak = ledgers[-1].held
        return False

    first, *others = (parse_plan(word, _BASE) for word in words.split())
    raw, layouts = start(flags, first)
    job = seeded(layouts, raw, first)
    train_steps(job, layouts, 1)
    with mock.patch.multiple(module, Ledger=Watched, has_to_be_staged=foreseeing):
        for plan in others:
            job, _ = moved(job, plan, raw, layouts, {}, chunk_bytes=chunk_bytes)
    return [(extra, ledger.peak - held) for (extra, held), ledger in zip(begun, ledgers, strict=True)]


@pytest.mark.parametrize("flags", ["", "--bf16 "])
def test_what_a_move_takes_in_between_is_foreseen(flags: str) -> None:
    """On a GPU it decides whether there is room for it; packing may take less than a round has."""
    chunk_bytes = 2**17
    for seen in run_ranks(4, _foreseen, flags, "dp4 tp2,pp2 dp4,zero1 pp4 dp2,tp2,zero1", chunk_bytes):
        for foreseen, taken in seen:
            assert taken <= max(0, foreseen) <= taken + chunk_bytes


def _decisions() -> list[bool]:
    """Of 100 bytes that a move takes: where rank 2 has 10 of them, and where all have more."""
    import torch
    import torch.distributed as dist

    from copus_ext.adapters import staging

    start("", _BASE)
    side: Any = SimpleNamespace(memory=SimpleNamespace(device=torch.device("cuda")))
    decided = []
    for short in (2, None):
        free = 10 if dist.get_rank() == short else 1000
        with mock.patch.multiple(staging, extra_bytes=lambda *_: 100, free_bytes=lambda _, free=free: free):
            decided.append(staging.has_to_be_staged(mock.Mock(), side, side))
    return decided


def test_all_ranks_go_through_host_memory_where_one_is_short() -> None:
    assert run_ranks(4, _decisions) == [[True, False]] * 4
