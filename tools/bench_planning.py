"""How long it takes to plan a move on many ranks: ``python tools/bench_planning.py [--ranks 32,128,512]``; prints JSON.

Every rank plans a move alone, for all ranks (docs/reshard.md). So what one process takes here, from the two layouts to
the rounds of a move, is what every rank of a job of that size takes; no rank of it has to be there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys

_MODELS = ("8B", "70B")
_RANKS = (32, 128, 512)  # multiples of 32, which the layouts of the larger model take


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=_numbers, default=list(_RANKS), metavar="NUMBERS", help="(32,128,512)")
    parser.add_argument("--models", nargs="+", choices=_MODELS, default=list(_MODELS))
    flags = parser.parse_args()
    if "70B" in flags.models and any(ranks % 32 for ranks in flags.ranks):
        parser.error("--ranks: give multiples of 32 for 70B")
    from copus_ext.run.start import prepare_environment

    prepare_environment()
    from megatron.patches import apply_all

    apply_all()
    from copus_ext.bench.planning import planned, planning_bench

    with contextlib.redirect_stdout(sys.stderr):  # upstream tells what it does
        bench = planning_bench()
        found = [planned(bench, model, ranks) for model in flags.models for ranks in flags.ranks]
    print(json.dumps(found, indent=1))


def _numbers(text: str) -> list[int]:
    numbers = [int(number) for number in text.split(",")]
    if any(number < 8 or number % 8 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: give multiples of 8")
    return numbers


if __name__ == "__main__":
    main()
