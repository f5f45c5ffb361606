"""Predict step time and memory of training runs from a table of their sizes.

    python tools/predict_throughput.py --points RUNS.csv --out PREDICTED.csv

Reads the columns of copus_ext/published/points.csv (measurements, where there are any, are not looked at) and writes
the same rows with four more: ``predicted_step_time_s``, the ends ``low`` and ``high`` of a 90 % interval, and
``predicted_mem_gb``, in 10^9 bytes on the fullest rank. They stay empty in rows that tell too little.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from copus_ext.core.cost.points import Point, read_points, read_rows
from copus_ext.core.cost.published import POINTS, Points, open_plans, read_fit, usable
from copus_ext.core.errors import UserError

_NEW = ("predicted_step_time_s", "low", "high", "predicted_mem_gb")


def predictions(points: Sequence[Point | None]) -> list[dict[str, str]]:
    """The four new columns of every row."""
    possible = [number for number, point in enumerate(points) if point is not None and open_plans(point)]
    found = [dict.fromkeys(_NEW, "") for _ in points]
    if not possible:
        return found
    known = Points(usable(read_points(POINTS)))
    predicted = read_fit().predict(
        known, Points([point for point in points if point is not None and open_plans(point)])
    )
    columns = (predicted.step_time_s, predicted.low_s, predicted.high_s, predicted.memory_bytes / 1e9)
    for place, number in enumerate(possible):
        found[number] = {name: f"{column[place]:.6g}" for name, column in zip(_NEW, columns, strict=True)}
    return found


def main() -> int:
    """Predict and write; 2 where the input can't be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", required=True, metavar="CSV")
    parser.add_argument("--out", required=True, type=Path, metavar="CSV")
    args = parser.parse_args()
    try:
        rows, new = read_rows(args.points), predictions(read_points(args.points))
        write(args.out, rows, new)
    except UserError as error:
        print(f"predict_throughput.py: {error}", file=sys.stderr)
        return 2
    empty = sum(not row[_NEW[0]] for row in new)
    print(f"{len(new) - empty} of {len(new)} rows predicted" + (f", {empty} tell too little" if empty else ""))
    return 0


def write(path: Path, rows: Sequence[dict[str, str]], new: Sequence[dict[str, str]]) -> None:
    """All rows with their new columns."""
    names = [*(rows[0] if rows else ()), *(name for name in _NEW if not rows or name not in rows[0])]
    try:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows({**row, **more} for row, more in zip(rows, new, strict=True))
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; give a path that can be written") from None


if __name__ == "__main__":
    sys.exit(main())
