"""The search: Megatron's rules, nothing dropped that could be best, and every plan accounted for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from copus_ext.core.cost.candidates import infeasible_reason
from copus_ext.core.cost.hardware_file import load_hardware
from copus_ext.core.cost.known_models import KNOWN_MODELS
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import RunOptions
from copus_ext.core.cost.plan_table import PlanTable
from copus_ext.core.cost.search import MORE_RECOMPUTE, SearchResult, SearchSpace, objections, search_plans
from copus_ext.core.cost.step_time import step_times
from copus_ext.core.plan import RECOMPUTE_CHOICES, Layout, Plan

MODEL = ModelShape(
    layers=12,
    hidden=1024,
    heads=16,
    kv_heads=4,
    ffn=4096,
    vocab=32768,
    seq=2048,
    gated=True,
    param_bytes=2,
    flash_attention=True,
)
MOE = replace(MODEL, experts=8, experts_per_token=2, moe_ffn=2048)
H100 = load_hardware("h100")
OPTIONS = RunOptions(overlap_grad_reduce=True, overlap_param_gather=True)
RANKS = 16


def bytes_of(table: PlanTable, model: ModelShape, options: RunOptions) -> Any:
    """A memory model of this test: less with every split and every recompute, more with the micro-batch."""
    split = table.tp * table.pp * np.where(table.distributed_optimizer, 2.0, 1.0)
    activations = table.micro_batch / (table.tp * table.cp) * (1 + 2.0 - table.recompute)
    return 2**30 * (40 / split + 8 * activations)


def search(space: SearchSpace, model: ModelShape = MODEL, ranks: int = RANKS) -> SearchResult:
    return search_plans(model, H100, ranks, space, OPTIONS, bytes_of)


def brute_force(model: ModelShape, ranks: int, batches: tuple[int, ...], mbs: tuple[int, ...]) -> list[Plan]:
    """Every plan that :func:`infeasible_reason` has nothing against, the slow way."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    found = []
    for tp, pp, cp in product(sizes, repeat=3):
        if ranks % (tp * pp * cp) or tp > H100.devices_per_node:
            continue
        choices = product(range(1, 13), range(1, 9), (False, True), RECOMPUTE_CHOICES, mbs, batches)
        for vpp, ep, zero1, recompute, micro, batch in choices:
            dp = ranks // (tp * pp * cp)
            if batch % (micro * dp):
                continue
            layout = Layout(dp, tp, pp, vpp, cp, ep, tp > 1, zero1, recompute)
            if infeasible_reason(plan := Plan(layout, micro, batch), model) is None:
                found.append(plan)
    return found


def test_the_rules_are_those_of_infeasible_reason() -> None:
    """Both ways, on random models and layouts of sizes that often do not divide."""
    random = np.random.default_rng(1)

    def pick(*values: int) -> int:
        return int(random.choice(values))

    seen = set()
    for _ in range(60):
        experts = pick(0, 0, 4, 6)
        model = ModelShape(
            layers=pick(4, 6, 12),
            hidden=64,
            heads=pick(4, 6, 8),
            kv_heads=pick(1, 2, 4, 6),
            ffn=pick(64, 96, 36),
            vocab=pick(512, 516),
            seq=pick(16, 24, 36),
            experts=experts,
            moe_ffn=pick(32, 36) if experts else 0,
        )
        plans = []
        for _ in range(40):
            layout = Layout(
                dp=pick(1, 2, 3, 4),
                tp=pick(1, 1, 2, 3, 4, 8),
                pp=pick(1, 2, 3, 4),
                vpp=pick(1, 1, 2, 3),
                cp=pick(1, 1, 2, 4),
                ep=pick(1, 1, 2, 3, 4),
                sequence_parallel=bool(pick(0, 1, 1)),
            )
            plans.append(Plan(layout, micro := pick(1, 2), layout.dp * micro * pick(1, 2, 3, 4, 6)))
        against = objections(PlanTable.of(plans), model)
        refused = np.any([holds for _, holds in against], axis=0)
        assert [infeasible_reason(plan, model) is not None for plan in plans] == refused.tolist()
        seen |= {reason for reason, holds in against if holds.any()}
        seen |= {"allowed"} if not refused.all() else set()
    assert len(seen) == len(against) + 1, "every rule and an allowed plan came up"


@pytest.mark.parametrize("model", [MODEL, MOE], ids=["dense", "experts"])
def test_the_fastest_plan_of_all_is_found(model: ModelShape) -> None:
    ranks, batches, mbs = 8, (16, 24), (1, 2, 4)
    found = search(SearchSpace(batches, micro_batches=mbs), model, ranks)
    plans = brute_force(model, ranks, batches, mbs)
    assert found.candidates == len(plans)
    table = PlanTable.of(plans)
    fits = bytes_of(table, model, OPTIONS) <= 0.9 * H100.memory_bytes
    assert 0 < fits.sum() < len(plans)
    seconds = step_times(table, model, H100, OPTIONS).total
    assert {str(plan) for plan in found.table.plans()} <= {str(plans[row]) for row in np.flatnonzero(fits)}
    for batch in batches:
        rows = np.flatnonzero(fits & (table.global_batch == batch))
        (best,) = found.best(batch)
        assert found.parts.total[best] == pytest.approx(seconds[rows].min(), rel=1e-12)


@pytest.mark.parametrize("model", [MODEL, MOE], ids=["dense", "experts"])
def test_every_plan_is_timed_or_ruled_out_for_one_reason(model: ModelShape) -> None:
    found = search(SearchSpace((16, 24), sequence_parallel=(False, True)), model)
    assert sum(found.ruled_out.values()) + len(found.table) == found.considered
    assert list(found.ruled_out.values()) == sorted(found.ruled_out.values(), reverse=True)
    names = {str(plan) for plan in found.table.plans()}
    assert len(names) == len(found.table), "each plan once"


def test_plans_recompute_no_more_than_they_must() -> None:
    found = search(SearchSpace((32,)))
    assert np.all(found.memory <= 0.9 * H100.memory_bytes)
    recomputing = found.table.take(np.flatnonzero(found.table.recompute > 0))
    assert len(recomputing)
    less = replace(recomputing, recompute=recomputing.recompute - 1)
    assert np.all(bytes_of(less, MODEL, OPTIONS) > 0.9 * H100.memory_bytes)
    assert found.ruled_out[MORE_RECOMPUTE] > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_recomputing_never_makes_a_step_shorter(overlap: bool) -> None:
    """What leaving out plans that recompute more than they must rests on."""
    options = RunOptions(overlap_grad_reduce=overlap, overlap_param_gather=overlap, tp_comm_overlap=overlap)
    for model, hardware in product((MODEL, MOE), (H100, load_hardware("mi210"))):
        tables = [search(SearchSpace((64,), recompute=(choice,)), model).table for choice in RECOMPUTE_CHOICES]
        table = tables[-1]  # recomputing everything, most fit
        steps = [
            step_times(replace(table, recompute=np.full(len(table), level)), model, hardware, options).total
            for level in range(len(RECOMPUTE_CHOICES))
        ]
        for faster, slower in pairwise(steps):
            assert np.all(faster <= slower * (1 + 1e-12))


def test_tensor_parallelism_beyond_a_node_is_for_those_who_ask() -> None:
    assert search(SearchSpace((32,))).table.tp.max() == 8
    assert search(SearchSpace((32,), tp_across_nodes=True)).table.tp.max() == 16
    assert set(search(SearchSpace((32,), tp=(16,))).table.tp) == {16}


def test_what_is_named_is_what_is_looked_at() -> None:
    space = SearchSpace(
        (24,),
        tp=(2, 1),
        pp=(2,),
        vpp=(3,),
        cp=(1,),
        micro_batches=(3,),
        recompute=("full",),
        distributed_optimizer=(True,),
    )
    found = search(space, ranks=4)
    assert [str(plan) for plan in found.table.plans()] == [
        "dp2,pp2,vpp3,zero1,recompute-full,mbs3,gbs24",
        "dp1,tp2,pp2,vpp3,sp,zero1,recompute-full,mbs3,gbs24",
    ]


def test_sequence_parallel_says_nothing_without_tensor_parallel() -> None:
    found = search(SearchSpace((16,), sequence_parallel=(False, True)))
    single = found.table.take(found.table.tp == 1)
    assert not single.sequence_parallel.any()
    split = found.table.take(found.table.tp > 1)
    assert split.sequence_parallel.any()
    assert not split.sequence_parallel.all()


def test_where_nothing_fits_the_smallest_plan_is_named() -> None:
    large = replace(MODEL, layers=120)

    def too_much(table: PlanTable, model: ModelShape, options: RunOptions) -> Any:
        return 2**40 + bytes_of(table, model, options)

    def nothing(table: PlanTable, model: ModelShape, options: RunOptions) -> Any:
        return 0 * table.tp

    found = search_plans(large, H100, RANKS, SearchSpace((16, 32)), OPTIONS, too_much)
    assert not len(found.table)
    assert not len(found.best(16))
    assert any(reason.startswith("does not fit: needs 1,0") for reason in found.ruled_out)
    table, needed = found.smallest[16]
    assert table.plan(0).global_batch == 16
    assert needed == too_much(table, large, OPTIONS)[0]
    everything = search_plans(large, H100, RANKS, SearchSpace((16,), recompute=("full",)), OPTIONS, nothing).table
    assert needed == too_much(everything, large, OPTIONS).min()


def test_a_batch_that_no_plan_has() -> None:
    found = search(SearchSpace((7,), cp=(1,), pp=(1,), tp=(1,)))
    assert not len(found.table)
    assert found.smallest == {}
    assert found.candidates == 0


def test_embedding_and_loss_may_count_as_layers() -> None:
    """126 layers on 16 stages, as Llama 3.1 405B was trained."""
    known = KNOWN_MODELS["llama3.1-405b"]
    model = replace(known.shape, vocab=129024)
    space = SearchSpace((2048,), pp=(16,), tp=(8,), cp=(1,))
    assert search_plans(model, H100, 4096, space, OPTIONS, bytes_of).candidates == 0
    found = search_plans(model, H100, 4096, replace(space, counted_as_layers=2), OPTIONS, bytes_of)
    assert set(found.table.vpp) == {1, 2, 4, 8}


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_known_models_are_as_large_as_their_names_say(name: str) -> None:
    shape = KNOWN_MODELS[name].shape
    size = name.rpartition("-")[2]
    billions = {"8x7b": 46.7, "124m": 0.124}.get(size) or float(size.removesuffix("b"))
    assert shape.params / 1e9 == pytest.approx(billions, rel=0.08)
    assert KNOWN_MODELS[name].source
