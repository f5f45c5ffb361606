"""How long it takes to plan a move on many ranks: ``python tools/bench_planning.py [--ranks 8,64,512]``; prints JSON.

Every rank plans a move alone, for all ranks (docs/reshard.md). So what one process takes here, from the two layouts to
the rounds of a move, is what every rank of a job of that size takes; no rank of it has to be there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

from copus_ext.core.plan import Layout, Plan, parse_plan
from copus_ext.core.reshard.transfer import Holding

_PER_NODE = 8
_WEIGHT_AND_GRADIENT = 2 + 4  # bytes of a parameter
_MODELS = {  # layers, hidden, heads, query groups, width of the gated MLP
    "7B": (32, 4096, 32, 8, 14336),
    "70B": (80, 8192, 64, 8, 28672),
}
_LAYOUTS = {"7B": ("tp2,sp,zero1", "tp4,pp2,sp,zero1"), "70B": ("tp8,pp4,sp,zero1", "tp4,pp8,sp,zero1")}
_VOCABULARY = 128_256
_RANKS = (32, 128, 512)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default=",".join(map(str, _RANKS)), metavar="NUMBERS")
    parser.add_argument("--models", default=",".join(_MODELS), metavar="NAMES")
    flags = parser.parse_args()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from copus_ext.run.start import prepare_environment

    prepare_environment()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from megatron.patches import apply_all

    apply_all()
    from copus_ext.bench.workbench import Workbench

    bench = Workbench(_flags(), Plan(Layout(), 1, 1))
    found = [
        _planned(bench, model, int(ranks)) for model in flags.models.split(",") for ranks in flags.ranks.split(",")
    ]
    print(json.dumps(found, indent=1))


def _flags() -> list[str]:
    return (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 64 --max-position-embeddings 64 "
        "--position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear --bf16 "
        "--group-query-attention --num-query-groups 1 --untie-embeddings-and-output-weights "
        "--train-samples 4096 --lr 1e-3 --micro-batch-size 1 --global-batch-size 1 --eval-iters 0"
    ).split()


def _planned(bench: Any, name: str, ranks: int) -> dict[str, Any]:
    """Seconds by part, and how much there is to plan."""
    import torch

    from copus_ext.adapters.arguments import arguments_for
    from copus_ext.adapters.blueprint import holdings_of_layout
    from copus_ext.adapters.checksum import Checksums
    from copus_ext.core.reshard.streaming import default_limit, stream
    from copus_ext.core.reshard.transfer import plan_transfer

    layers, hidden, heads, groups, ffn = _MODELS[name]
    vars(bench.raw).update(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        padded_vocab_size=_VOCABULARY,
    )
    base = Plan(Layout(dp=ranks), 1, 2 * ranks)
    plans = [parse_plan(words, base) for words in _LAYOUTS[name]]
    marks = [time.perf_counter()]
    sides = []
    for plan in plans:
        args = arguments_for(bench.raw, plan, padded_vocab_size=_VOCABULARY, world_size=ranks)
        sides.append(holdings_of_layout(plan, args, with_moments=True))
        marks.append(time.perf_counter())
    old, new = sides
    transfers = plan_transfer(old, new, ranks_per_node=_PER_NODE)
    marks.append(time.perf_counter())
    limit = default_limit(old, new, _room_bytes(old, plans))
    rounds = stream(transfers, old, new, limit).rounds
    marks.append(time.perf_counter())
    Checksums(transfers.keys, new, 2, torch.device("cpu"))
    marks.append(time.perf_counter())
    names = ("holdings_before_s", "holdings_after_s", "transfers_s", "rounds_s", "checksums_s")
    seconds = {name: round(b - a, 3) for name, a, b in zip(names, marks, marks[1:], strict=False)}
    return {
        "model": name,
        "ranks": ranks,
        "from": str(plans[0].layout),
        "to": str(plans[1].layout),
        "total_s": round(marks[-1] - marks[0], 3),
        **seconds,
        "transfers": len(transfers.transfers),
        "rounds": len(rounds),
        "round_mib": round(limit / 2**20, 1),
        "bytes_moved": transfers.bytes_moved,
        "bytes_minimum": transfers.bytes_minimum,
    }


def _room_bytes(held: Sequence[Sequence[Holding]], plans: Sequence[Plan]) -> int:
    """Weights in bf16 and gradients in fp32 of a rank, where it has most of them: they are not moved."""
    sharded = {(h.key, h.box): h.box.volume for side in held for h in side if h.key.startswith("moments:")}
    return _WEIGHT_AND_GRADIENT * sum(sharded.values()) // min(plan.layout.tp * plan.layout.pp for plan in plans)


if __name__ == "__main__":
    main()
