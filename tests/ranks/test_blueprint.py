"""What a layout's ranks are said to hold, against jobs that are really built for it."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any
from unittest import mock

import pytest

from copus_ext.core.plan import Layout, Plan, parse_plan
from copus_ext.core.reshard.geometry import Box, subtract_all
from copus_ext.core.reshard.transfer import Holding
from tests.ranks.harness import run_ranks, skip_without_packages

_BASE = Plan(Layout(dp=4), micro_batch=1, global_batch=8)
_DENSE = "dp4 dp2,tp2 tp4 pp4 tp2,pp2 pp2,vpp2,dp2 cp2,tp2"
_ZERO1 = " ".join(f"{words},zero1" for words in _DENSE.split())
_GATED = "--swiglu --group-query-attention --num-query-groups 2 --disable-bias-linear "
_EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather --disable-bias-linear "
    "--moe-router-load-balancing-type none --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
)

KINDS = {  # flags, plans
    "fp32-tied": ("", f"{_DENSE} {_ZERO1}"),
    "bf16-untied-gated-grouped": (_GATED + "--untie-embeddings-and-output-weights --bf16 ", f"{_DENSE} {_ZERO1}"),
    "bf16-tied-in-buckets": (
        "--bf16 --position-embedding-type learned_absolute --overlap-grad-reduce --ddp-bucket-size 20000 ",
        f"{_ZERO1} tp2,pp2",
    ),
    "bf16-experts": (
        _EXPERTS + "--bf16 ",
        "dp4 ep4,dp4 ep2,pp2,dp2 ep2,tp2,dp2,sp "
        "dp4,zero1 ep2,dp4,zero1 ep4,dp4,zero1 ep2,pp2,dp2,zero1 ep2,tp2,dp2,sp,zero1",
    ),
    "fp32-uncut-experts-in-buckets": (
        _EXPERTS + "--expert-tensor-parallel-size 1 --overlap-grad-reduce --ddp-num-buckets 5 ",
        "ep2,dp4,zero1 ep2,pp2,dp2,zero1 ep4,tp2,dp2,sp,zero1 ep2,tp2,dp2,sp ep4,cp2,dp2,zero1",
    ),
    "fp16-sgd": ("--fp16 --optimizer sgd ", "tp2,pp2 dp4"),
    "bf16-muon-experts": ("--optimizer muon --bf16 " + _EXPERTS, "dp4 ep4,dp4 ep2,pp2,dp2 tp2,pp2 ep2,tp2,dp2,sp"),
    "bf16-muon-in-layers": (
        "--optimizer muon --bf16 " + _GATED,
        "dp4,zero1 pp2,vpp2,dp2,zero1 tp4,zero1 cp2,dp2,zero1",
    ),
    "bf16-muon-experts-in-layers": (
        "--optimizer muon --bf16 " + _EXPERTS,
        "dp4,zero1 ep2,dp4,zero1 ep4,dp4,zero1 ep2,tp2,dp2,sp,zero1",
    ),
    "bf16-lion-in-layers": ("--optimizer lion --bf16 ", "dp4,zero1 tp2,dp2,zero1"),
    "fp32-muon-and-lion": ("--optimizer muon --muon-scalar-optimizer lion " + _GATED, "tp2,dp2 pp2,vpp2,dp2"),
    "fp32-sgd-without-momentum": ("--optimizer sgd --sgd-momentum 0 ", "tp2,pp2"),
}


def _upstream() -> dict[str, Any]:
    """What upstream and torch keep for the whole process."""
    import logging
    import random

    import numpy as np
    import torch
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.training import global_vars
    from megatron.training.models import dist_utils

    trackers = get_cuda_rng_tracker().get_states()
    return {
        "modules": [dict(vars(m)) for m in (parallel_state, global_vars, num_microbatches_calculator, dist_utils)],
        "functions": [dict(vars(m)) for m in (torch.distributed, torch.cuda)],
        "random": (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()),
        "trackers": {name: state.tolist() for name, state in trackers.items()},
        "defaults": (torch.get_default_device(), torch.get_default_dtype(), logging.root.manager.disable),
    }


def _against_jobs(flags: str, plans: str) -> list[str]:
    """What was wrong, on this rank. Every layout is described while the one before it is the active one."""
    import torch

    from copus_ext.adapters.arguments import arguments_for
    from copus_ext.adapters.blueprint import holdings_of_layout
    from copus_ext.adapters.job_state import job_state
    from tests.ranks.steps import build
    from tests.ranks.tiny import raw_arguments, start_upstream

    torch.compiler.set_stance("force_eager")
    raw = raw_arguments(flags)
    start_plan, *_ = walk = [parse_plan(words, _BASE) for words in plans.split()]
    _, layouts, _ = start_upstream(raw, start_plan)
    wrong = []
    for number, plan in enumerate(walk):
        args, before = arguments_for(raw, plan, padded_vocab_size=128), _upstream()
        cases = (True,) if number % 4 else (True, False)
        told = {moments: holdings_of_layout(plan, args, with_moments=moments) for moments in cases}
        if _upstream() != before:
            wrong.append(f"{plan}: something else of upstream was changed")
        job = build(layouts, raw, plan)
        for moments in reversed(cases):
            real = _gathered(job_state(job, with_moments=moments).holdings)
            wrong += [f"{plan}: {said}" for said in _differences(told[moments], real)]
    return wrong


def _gathered(mine: list[Holding]) -> list[list[Holding]]:
    import torch.distributed as dist

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _differences(told: list[list[Holding]], real: list[list[Holding]]) -> list[str]:
    wrong = [_first(t, r) for t, r in zip(told, real, strict=True) if t != r]
    if len({id(holdings) for holdings in told}) != len({tuple(holdings) for holdings in real}):
        wrong.append("ranks that hold the same do not share a list")
    return wrong


def _first(told: list[Holding], real: list[Holding]) -> str:
    pairs = zip(told, real, strict=False)
    return next((f"told {t}, is {r}" for t, r in pairs if t != r), f"{len(told)} were told, {len(real)} are")


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_holds_what_it_was_said_to(kind: str) -> None:
    skip_without_packages(KINDS[kind][0])
    assert run_ranks(4, _against_jobs, *KINDS[kind]) == [[]] * 4


def _of_other_sizes() -> list[tuple[str, dict[str, Any]]]:
    """Layouts of more and of fewer ranks than there are, of which none is ever made."""
    from copus_ext.adapters import blueprint
    from copus_ext.adapters.arguments import arguments_for
    from tests.ranks.tiny import raw_arguments, start_upstream

    raw = raw_arguments("--bf16 --position-embedding-type learned_absolute ")
    start_upstream(raw, _BASE)
    found = []
    for world_size, words in ((8, "dp8,zero1"), (8, "dp2,tp2,pp2,zero1"), (8, "tp4,pp2"), (2, "dp2,zero1"), (2, "tp2")):
        plan = parse_plan(words, Plan(Layout(dp=world_size), 1, 8))
        args = arguments_for(raw, plan, padded_vocab_size=128, world_size=world_size)
        with mock.patch.object(blueprint, "state_of", wraps=blueprint.state_of) as described:
            cover = _covered(blueprint.holdings_of_layout(plan, args, with_moments=True))
        devices = {placed.tensor.device.type for call in described.call_args_list for placed in call.args[0]}
        found.append((words, {**cover, "devices": devices}))
    return found


def _covered(ranks: list[list[Holding]]) -> dict[str, Any]:
    """Elements of all logical tensors, how many of them nobody holds, and how many are held in all."""
    boxes: defaultdict[str, list[Box]] = defaultdict(list)
    for holding in (h for holdings in ranks for h in holdings):
        boxes[holding.key].append(holding.box)
    whole = {k: tuple(map(max, zip(*(b.end for b in parts), strict=True))) for k, parts in boxes.items()}
    missing = [rest for k, n in whole.items() for rest in subtract_all(Box((0,) * len(n), n), boxes[k])]
    return {
        "ranks": len(ranks),
        "weights": sum(math.prod(n) for k, n in whole.items() if k.startswith("weight:")),
        "moments": sum(math.prod(n) for k, n in whole.items() if k.startswith("moments:")),
        "missing": missing,
        "held": sum(b.volume for parts in boxes.values() for b in parts),
    }


def test_layouts_of_other_sizes_are_described_whole() -> None:
    hidden, ffn, vocab, positions = 64, 256, 128, 32
    attention = (3 * hidden * hidden + 3 * hidden) + (hidden * hidden + hidden)
    layer = attention + (ffn * hidden + ffn) + (hidden * ffn + hidden) + 4 * hidden
    elements = (vocab + positions) * hidden + 4 * layer + 2 * hidden
    results = run_ranks(4, _of_other_sizes)
    for words, cover in results[0]:
        assert cover["ranks"] == (2 if words in ("dp2,zero1", "tp2") else 8)
        assert cover["weights"] == cover["moments"] == elements
        assert not cover["missing"]
        assert cover["devices"] == {"meta"}
    held = {words: cover["held"] for words, cover in results[0]}
    assert held["dp8,zero1"] == held["dp2,zero1"] == 2 * elements  # sharded: nothing is held twice
    assert held["tp2"] > 2 * elements  # norms and some biases are
    assert results[1:] == results[:-1]


def _failures() -> list[str]:
    from copus_ext.adapters import blueprint
    from copus_ext.adapters.arguments import arguments_for
    from tests.ranks.tiny import raw_arguments, start_upstream

    raw = raw_arguments()
    start_upstream(raw, _BASE)
    plan = parse_plan("tp2", Plan(Layout(dp=2), 1, 8))
    args, before, said = arguments_for(raw, plan, padded_vocab_size=128, world_size=2), _upstream(), []
    with (
        mock.patch.object(blueprint, "placed_tensors", side_effect=RuntimeError("half way")),
        pytest.raises(RuntimeError),
    ):
        blueprint.holdings_of_layout(plan, args, with_moments=True)
    said.append("as it was" if _upstream() == before else "changed")
    args.optimizer_cpu_offload = True
    with pytest.raises(blueprint.UnsupportedReshard) as refusal:
        blueprint.holdings_of_layout(plan, args, with_moments=True)
    return [*said, str(refusal.value)]


def test_a_failure_leaves_upstream_as_it_was() -> None:
    for untouched, refusal in run_ranks(1, _failures):
        assert untouched == "as it was"
        assert "--optimizer-cpu-offload" in refusal
