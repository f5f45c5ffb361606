"""Measure what the noise scale costs and how right it is: ``python tools/bench_noise_scale.py --json OUT``.

Starts its own ranks. Cost: a GPT of 13 million parameters on four ranks of a CPU, or one of 1.3 billion in bf16 on the
GPUs there are; steps with and without a collector by turns. Error: a small GPT on the source text of Python's standard
library, against gradients of single sequences, at several points of its training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

_RANK_FLAG = "--as-rank"
_TRAINING = "--train-samples 1000000 --lr 1e-3 --min-lr 1e-3 --weight-decay 0.0 --clip-grad 1.0 --seed 1234"
_ON_CPU = (
    "--num-layers 4 --hidden-size 512 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64 "
    "--position-embedding-type rope --swiglu --ffn-hidden-size 1408 --normalization RMSNorm --disable-bias-linear "
    "--hidden-dropout 0 --attention-dropout 0 "
)
_ON_GPU = (
    "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 "
    "--position-embedding-type rope --swiglu --ffn-hidden-size 5632 --normalization RMSNorm --disable-bias-linear "
    "--hidden-dropout 0 --attention-dropout 0 --bf16 --untie-embeddings-and-output-weights "
)
_SMALL = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 "
)
# Steps to a 20 % interval at three points of the training of another small model, as measured while this was designed.
_DESIGN = {"dp-groups": [52, 13, 16], "slices": [41, 11, 13], "layernorm": [49, 17, 25], "adam": [21, 11, 13]}


def main() -> int:
    """Start the ranks, or be one."""
    flags = _parser().parse_args()
    if flags.as_rank is None:
        return _launch(flags)
    from copus_ext.run.start import prepare_environment

    prepare_environment()
    from megatron.patches import apply_all

    apply_all()
    result = _measure_cost(flags) if flags.as_rank == "cost" else _measure_error(flags)
    if int(os.environ["RANK"]) == 0:
        flags.json.write_text(json.dumps(result, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="where the result goes")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="ranks to start (default: 4)")
    parser.add_argument(
        "--pairs", type=int, default=8, metavar="N", help="pairs of steps with and without (default: 8)"
    )
    parser.add_argument("--global-batch", type=int, default=32, metavar="N", help="sequences in a step (default: 32)")
    parser.add_argument(
        "--checkpoints",
        type=lambda text: [int(word) for word in text.split(",")],
        default=[20, 100, 300],
        metavar="STEPS",
        help="steps of training after which the error is measured (default: 20,100,300)",
    )
    parser.add_argument("--pool", type=int, default=1536, metavar="N", help="single sequences compared with (1536)")
    parser.add_argument("--shuffles", type=int, default=4, metavar="N", help="times the pool is gone through (4)")
    parser.add_argument(_RANK_FLAG, choices=("cost", "error"), help=argparse.SUPPRESS)
    return parser


def _launch(flags: argparse.Namespace) -> int:
    """One group of ranks for the cost, one for the error; then put both together."""
    parts: dict[str, Any] = {}
    for part in ("cost", "error"):
        out = flags.json.with_suffix(f".{part}.tmp")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(flags.ranks), __file__]
        command += [*sys.argv[1:], "--json", str(out), _RANK_FLAG, part]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        status = subprocess.run(command, check=False, env=environment, stdout=subprocess.DEVNULL).returncode
        if status:
            return status
        parts[part] = json.loads(out.read_text())
    result = _put_together(parts["cost"], parts["error"])
    flags.json.write_text(json.dumps(result, indent=1))
    for part in parts:
        flags.json.with_suffix(f".{part}.tmp").unlink()
    print(json.dumps(result["summary"]))
    return 0


def _measure_cost(flags: argparse.Namespace) -> dict[str, Any]:
    """Every estimator on the first layout, the default one on all."""
    import torch

    from copus_ext.bench.noise_cost import measure_cost
    from copus_ext.bench.workbench import Workbench
    from copus_ext.core.plan import Layout, Plan

    on_gpu, ranks = torch.cuda.is_available(), flags.ranks
    layouts = [Layout(dp=ranks // pp, pp=pp) for pp in (1, 2, 4) if ranks % pp == 0]
    micro_batch = 2
    plans = [Plan(layout, micro_batch, flags.global_batch) for layout in layouts]
    model = _ON_GPU if on_gpu else _ON_CPU
    sizes = f" --micro-batch-size {micro_batch} --global-batch-size {flags.global_batch}"
    bench = Workbench((model + _TRAINING + sizes).split(), plans[0])
    found = []
    for number, plan in enumerate(plans):
        job = bench.job(plan)
        estimators = ("auto", "slices", "sketch", "layernorm", "adam") if number == 0 else ("auto",)
        found += [{"asked_for": name} | measure_cost(bench, job, name, flags.pairs).to_json() for name in estimators]
        job.release()
        del job
    return {"device": "cuda" if on_gpu else "cpu", "ranks": ranks, "model": model.strip(), "found": found}


def _measure_error(flags: argparse.Namespace) -> dict[str, Any]:
    """Train the small GPT, and stop now and then to measure."""
    from copus_ext.bench.noise_error import measure_accuracy
    from copus_ext.bench.workbench import Workbench
    from copus_ext.core.plan import Layout, Plan

    plan = Plan(Layout(dp=flags.ranks), 2, 32)
    bench = Workbench((_SMALL + _TRAINING + " --micro-batch-size 2 --global-batch-size 32").split(), plan)
    job, found = bench.job(plan), []
    for step in range(max(flags.checkpoints) + 1):
        if step in flags.checkpoints:
            pool = range(10**7, 10**7 + flags.pool)
            accuracy = measure_accuracy(bench, job, pool, flags.shuffles)
            found.append({"step": step, "estimators": {name: one.to_json() for name, one in accuracy.items()}})
        bench.step(job, range(step * 32, (step + 1) * 32))
    return {"model": _SMALL.strip(), "pool": flags.pool, "checkpoints": found}


def _put_together(cost: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    """The figures by estimator, and in short those of what ``auto`` takes: on the first layout, and on the others."""
    default, *others = [one for one in cost["found"] if one["asked_for"] == "auto"]
    estimators: dict[str, dict[str, Any]] = {}
    for name in error["checkpoints"][0]["estimators"]:
        figures = [point["estimators"][name] for point in error["checkpoints"]]
        estimators[name] = {
            "noise_scale": [one["noise_scale"] for one in figures],
            "truth": [one["truth"] for one in figures],
            "rel_error": [one["rel_error"] for one in figures],
            "standard_error": [one["standard_error"] for one in figures],
            "reads": [one["reads"] for one in figures],
            "steps_to_20pct": [one["steps_to_20pct"] for one in figures],
            "steps_to_20pct_in_design": _DESIGN.get(name),
            "cost": [one for one in cost["found"] if name in (one["asked_for"], one["estimator"])],
        }
    summary = _in_short("default", [default], estimators)
    if others:
        summary |= _in_short("with_pipelines", others, estimators)
    return {"summary": summary, "estimators": estimators, "cost": cost, "error": error}


def _in_short(prefix: str, rows: list[dict[str, Any]], estimators: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The worst cost of these layouts, and the median error over the checkpoints, of the estimator they have."""
    name = rows[0]["estimator"]
    return {
        f"{prefix}_estimator": name,
        f"{prefix}_overhead_pct": max(one["own_pct"] for one in rows),
        f"{prefix}_extra_memory_pct": max(one["extra_memory_pct"] for one in rows),
        f"{prefix}_rel_error": statistics.median(estimators[name]["rel_error"]),
        f"{prefix}_steps_to_20pct": statistics.median(estimators[name]["steps_to_20pct"]),
    }


if __name__ == "__main__":
    sys.exit(main())
