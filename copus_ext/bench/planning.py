"""Planning the move of a large model on many ranks, of which none has to be there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from copus_ext.adapters.arguments import arguments_for
from copus_ext.adapters.blueprint import holdings_of_layout
from copus_ext.adapters.checksum import Checksums
from copus_ext.adapters.phases import Phases
from copus_ext.bench.workbench import Workbench
from copus_ext.core.plan import Layout, Plan, parse_plan
from copus_ext.core.reshard.streaming import default_limit, stream
from copus_ext.core.reshard.transfer import Holding, plan_transfer

MODELS = {  # layers, hidden, heads, query groups, width of the gated MLP
    "8B": (32, 4096, 32, 8, 14336),
    "70B": (80, 8192, 64, 8, 28672),
}
_LAYOUTS = {"8B": ("tp2,sp,zero1", "tp4,pp2,sp,zero1"), "70B": ("tp8,pp4,sp,zero1", "tp4,pp8,sp,zero1")}
_VOCABULARY = 128_256
_PER_NODE = 8
_WEIGHT_AND_GRADIENT = 2 + 4  # bytes of a parameter


def planning_bench() -> Workbench:
    """Upstream, brought up for one rank and a small model; :func:`planned` makes it a large one."""
    return Workbench(_flags(), Plan(Layout(), 1, 1))


def planned(bench: Workbench, name: str, ranks: int) -> dict[str, Any]:
    """Plan the move of a model of ``MODELS`` on so many ranks: seconds by part, and how much there was to plan."""
    attributes = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
    vars(bench.raw).update(zip(attributes, MODELS[name], strict=True))
    plans = [parse_plan(words, Plan(Layout(dp=ranks), 1, 2 * ranks)) for words in _LAYOUTS[name]]
    phases = Phases()
    with phases("holdings"):
        old, new = (_holdings(bench, plan) for plan in plans)
    with phases("transfers"):
        transfers = plan_transfer(old, new, ranks_per_node=_PER_NODE)
    with phases("rounds"):
        limit = default_limit(old, new, _room_bytes(old, plans))
        rounds = stream(transfers, old, new, limit).rounds
    with phases("checksums"):
        Checksums(transfers.keys, new, 2, torch.device("cpu"))
    return {
        "model": name,
        "ranks": ranks,
        "from": str(plans[0].layout),
        "to": str(plans[1].layout),
        "total_s": round(sum(phases.seconds.values()), 3),
        "seconds": {part: round(seconds, 3) for part, seconds in phases.seconds.items()},
        "transfers": len(transfers.transfers),
        "rounds": len(rounds),
        "round_mib": round(limit / 2**20, 1),
        "bytes_moved": transfers.bytes_moved,
        "bytes_minimum": transfers.bytes_minimum,
    }


def _holdings(bench: Workbench, plan: Plan) -> list[list[Holding]]:
    args = arguments_for(bench.raw, plan, padded_vocab_size=_VOCABULARY, world_size=plan.layout.world_size)
    return holdings_of_layout(plan, args, with_moments=True)


def _room_bytes(held: Sequence[Sequence[Holding]], plans: Sequence[Plan]) -> int:
    """Weights in bf16 and gradients in fp32 of a rank, where it has most of them: they are not moved."""
    sharded = {(h.key, h.box): h.box.volume for side in held for h in side if h.key.startswith("moments:")}
    return _WEIGHT_AND_GRADIENT * sum(sharded.values()) // min(plan.layout.tp * plan.layout.pp for plan in plans)


def _flags() -> list[str]:
    return (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 64 --max-position-embeddings 64 "
        "--position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear --bf16 "
        "--group-query-attention --num-query-groups 1 --untie-embeddings-and-output-weights "
        "--train-samples 4096 --lr 1e-3 --micro-batch-size 1 --global-batch-size 1 --eval-iters 0"
    ).split()
