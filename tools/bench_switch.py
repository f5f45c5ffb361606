"""Measure what going from one layout to another costs: ``python tools/bench_switch.py --json OUT``.

Starts its own ranks, and takes GPTs with several optimizers on walks through layouts. Every switch is compared with
Megatron's distributed checkpoint written to and loaded from memory by the same processes, with a checkpoint on disk and
a new ``torchrun``, and with the bare transport of the bytes that it moves.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from copus_ext.bench.switch_restart import restart
from copus_ext.bench.switch_setting import KINDS, LAYOUTS, MODELS, QUICK_LAYOUTS, SIZES, Checkpoint, Walk
from copus_ext.bench.switch_summary import Restarted, Switched, summarise

_RANKS = 4
_QUICK_KINDS = ("adam-fp32", "adam-bf16-zero1")
_RESTARTED_KIND = "adam-fp32"  # each of whose switches is done by a restart as well
_RANK_FLAG = "--as-rank"


def main() -> int:
    """Start the ranks, or be one."""
    flags = _parser().parse_args()
    if flags.kinds is None:
        flags.kinds = list(_QUICK_KINDS if flags.quick else KINDS)
    if flags.sizes is None:
        flags.sizes = [] if flags.quick else list(SIZES)
    if flags.as_rank is None:
        return _launch(flags)
    from copus_ext.run.start import prepare_environment

    prepare_environment()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from megatron.patches import apply_all

    apply_all()
    result = _measure(flags)
    if int(os.environ["RANK"]) == 0:
        (flags.as_rank / "ranks.json").write_text(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the result goes (default: standard output)")
    parser.add_argument("--quick", action="store_true", help="two optimizers, three pairs of layouts, no larger models")
    parser.add_argument(
        "--kinds", type=partial(_names, known=KINDS), metavar="NAMES", help=f"optimizers: {', '.join(KINDS)} (all)"
    )
    parser.add_argument(
        "--sizes", type=partial(_names, known=SIZES), metavar="NAMES", help=f"larger models: {', '.join(SIZES)} (all)"
    )
    parser.add_argument("--model", choices=list(MODELS), default="30M", help="of the summary (default: 30M)")
    parser.add_argument("--laps", type=int, default=2, metavar="N", help="times through each walk (default: 2)")
    parser.add_argument("--transports", type=int, default=3, metavar="N", help="raw transports of a switch's bytes (3)")
    parser.add_argument("--ram", action="store_true", help="checkpoints in memory of the larger models, too")
    parser.add_argument("--no-restart", action="store_true", help="leave restarts out")
    parser.add_argument(_RANK_FLAG, type=Path, help=argparse.SUPPRESS)
    return parser


def _names(text: str, known: Iterable[str]) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := sorted(set(names) - set(known)):
        raise argparse.ArgumentTypeError(f"there is no {unknown[0]}; there are {', '.join(known)}")
    return names


def _launch(flags: argparse.Namespace) -> int:
    """One group of ranks for all that is done in one job, then the restarts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(_RANKS), __file__]
        command += [*sys.argv[1:], _RANK_FLAG, folder]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        status = subprocess.run(command, check=False, env=environment, stdout=subprocess.DEVNULL).returncode
        if status:
            return status
        found = json.loads((Path(folder) / "ranks.json").read_text())
        restarts = [_restart(flags, Checkpoint(**one)) for one in found.pop("checkpoints")]
    result = json.dumps(_put_together(found, restarts), indent=1)
    if flags.json:
        flags.json.write_text(result)
    else:
        print(result)
    return 0


def _measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Every walk, on this rank."""
    from copus_ext.bench.switch_bench import SwitchBench
    from copus_ext.bench.switch_checkpoint import HELP_GIVEN, folder_in_memory
    from copus_ext.bench.switch_walk import Effort, measure

    bench, disk = SwitchBench(_RANKS), None if flags.no_restart else flags.as_rank
    switches, larger, checkpoints = [], [], []
    with folder_in_memory() as memory:
        for walk in _walks(flags):
            restarted = disk if walk.kind.name == _RESTARTED_KIND else None
            found, saved = measure(bench, walk, Effort(flags.laps, flags.transports, memory, restarted))
            switches += [one.to_json() for one in found]
            checkpoints += [asdict(one) for one in saved]
        for name in flags.sizes:
            effort = Effort(2, flags.transports, memory) if flags.ram else Effort(1, flags.transports, None)
            larger.append(_size(SIZES[name], measure(bench, SIZES[name], effort)[0]))
    conditions = {**_conditions(flags), "help_given_to_upstream": HELP_GIVEN}
    return {"switches": switches, "sizes": larger, "checkpoints": checkpoints, "conditions": conditions}


def _walks(flags: argparse.Namespace) -> list[Walk]:
    layouts = QUICK_LAYOUTS if flags.quick else LAYOUTS
    return [Walk(MODELS[flags.model], KINDS[name], layouts) for name in flags.kinds]


def _size(walk: Walk, found: list[Switched]) -> dict[str, Any]:
    """A larger model: what it is, and every switch of it."""
    return {
        "model": walk.model.name,
        "parameters": walk.model.parameters,
        "kind": walk.kind.name,
        "layouts": list(walk.layouts),
        "gb_moved": [one.bytes_moved / 1e9 for one in found],
        "seconds": [one.wall_s for one in found],
        "summary": summarise(found, []),
        "switches": [one.to_json() for one in found],
    }


def _conditions(flags: argparse.Namespace) -> dict[str, Any]:
    """What the figures hold for."""
    import torch
    from megatron.core import __version__ as megatron_version

    model = MODELS[flags.model]
    return {
        "model": asdict(model) | {"parameters": model.parameters},
        "ranks": _RANKS,
        "cores": os.cpu_count(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "megatron": megatron_version},
        "laps": flags.laps,
        "transports": flags.transports,
        "preloaded": [Path(name).name for name in os.environ.get("LD_PRELOAD", "").split()],  # another allocator, say
        "load_average": os.getloadavg(),  # of the last 1, 5 and 15 minutes: four ranks on two cores alone make it 4
    }


def _restart(flags: argparse.Namespace, checkpoint: Checkpoint) -> Restarted:
    found = restart(MODELS[flags.model], checkpoint, _RANKS)
    print(f"restart {found.old} to {found.new}: {found.total_s:.1f} s", file=sys.stderr, flush=True)
    return found


def _put_together(found: dict[str, Any], restarts: list[Restarted]) -> dict[str, Any]:
    summary = summarise([Switched.from_json(one) for one in found["switches"]], restarts)
    listed = [asdict(one) | {"total_s": one.total_s} for one in restarts]
    return {"summary": summary, "sizes": found["sizes"], "switches": found["switches"], "restarts": listed} | found


if __name__ == "__main__":
    sys.exit(main())
