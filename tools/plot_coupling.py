"""How the fastest layout depends on the global batch, as a picture and as tables.

    python tools/plot_coupling.py --table profile.csv --out docs/coupling.svg --page docs/coupling.md

Predicts the four setups of the COPUS paper (arXiv 2604.26687), and draws beside them what was measured in the tables of
tools/profile_throughput.py. Nothing is run, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from copus_ext.core.cost.constants import FITTED
from copus_ext.core.cost.coupling import (
    DATA_SHEETS,
    EVERYTHING,
    SETUPS,
    Curves,
    Loss,
    Setup,
    best_kept,
    hardware_of,
    loss_of_keeping,
    measured,
    name_of,
    predict,
)
from copus_ext.core.cost.throughput_table import Subject, read_table
from copus_ext.core.errors import UserError
from copus_ext.core.files import write_whole
from copus_ext.core.plan import Layout
from copus_ext.core.report.svg import PALETTE, Band, Chart, Ribbon, Series, draw_chart, write_svg

_WIDTH, _HEIGHT, _GAP, _HEAD = 580, 330, 20, 62
_OTHERS, _BETWEEN = "#c4cad1", "#d9dde2"
_ALL_NAMED = 8  # layouts that a measured panel can tell apart by colour
_DODGE = 0.045  # doublings between the points of two layouts at one batch, where whiskers would hide each other
_TITLE = "Which layout is fastest depends on the global batch"
_READING = (
    "Sequences/s of every layout with its best micro-batch, relative to the fastest layout at that batch. Upright "
    "strokes: from the slowest to the fastest visit of a measured plan."
)
_BEGIN, _END = "<!-- tables of tools/plot_coupling.py -->", "<!-- end of tables -->"


@dataclass(frozen=True)
class Panel:
    """One picture: the curves, and for a published setup what it is a prediction for."""

    title: str
    curves: Curves
    setup: Setup | None = None

    @property
    def kind(self) -> str:
        """Where the numbers come from."""
        return "predicted" if self.setup else "measured"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw and print: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="SVG", help="the picture")
    parser.add_argument(
        "--table", action="append", default=[], metavar="CSV", help="what was measured; may be repeated"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="all numbers behind the picture")
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    parser.add_argument("--page", type=Path, metavar="MD", help="put the tables into this page, between its two marks")
    args = parser.parse_args(argv)
    try:
        panels = [_predicted_panel(setup) for setup in SETUPS] + [_measured_panel(path) for path in args.table]
        tables = tables_of(panels)
        if args.page:
            _renew(args.page, tables)
    except UserError as error:
        print(f"plot_coupling.py: {error}", file=sys.stderr)
        return 2
    write_svg(draw(panels), args.out)
    if args.json:
        write_whole(args.json, json.dumps([_as_json(panel) for panel in panels], indent=1, allow_nan=False) + "\n")
    if args.markdown:
        print(tables)
    return 0


def _predicted_panel(setup: Setup) -> Panel:
    return Panel(setup.name, predict(setup, hardware_of(setup)), setup)


def _measured_panel(path: str) -> Panel:
    table = read_table(path, "--table")
    curves = measured(table)
    if table.subject is None or not curves.batches:
        raise UserError(f"--table {path}: no global batch has two layouts with step times; measure more plans")
    return Panel(_subject_name(table.subject), curves)


def _subject_name(subject: Subject) -> str:
    model = subject.model
    return f"GPT of {model.layers} layers of {model.hidden}, {subject.ranks} ranks ({subject.device})"


# -- the picture


def draw(panels: Sequence[Panel]) -> str:
    """All panels on one sheet, two in a row; a last one without a neighbour takes the row."""
    drawn = []
    for number, panel in enumerate(panels):
        column, row = number % 2, number // 2
        alone = number == len(panels) - 1 and column == 0
        chart = chart_of(panel, 2 * _WIDTH + _GAP if alone else _WIDTH)
        x, y = _GAP / 2 + column * (_WIDTH + _GAP), _HEAD + row * (_HEIGHT + _GAP)
        drawn.append(f'<g transform="translate({x:g},{y:g})">{draw_chart(chart)}</g>')
    width, height = 2 * (_WIDTH + _GAP), _HEAD + math.ceil(len(panels) / 2) * (_HEIGHT + _GAP)
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    paper = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    font = 'font-family="system-ui, sans-serif"'
    head = (
        f'<text x="10" y="26" {font} font-size="18" font-weight="600" fill="#1b1f24">{_TITLE}</text>'
        f'<text x="10" y="46" {font} font-size="12" fill="#59636e">{_READING}</text>'
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img">{paper}{head}{"".join(drawn)}</svg>'


def chart_of(panel: Panel, width: int) -> Chart:
    """One panel: layouts that are told apart in colours, the others in grey behind them."""
    curves, colors = panel.curves, _colors(panel)
    rows = sorted(range(len(curves.layouts)), key=lambda row: curves.layouts[row] in colors)
    series, first_grey = [], True
    for place, row in enumerate(rows):
        series.append(_series(curves, row, colors, first_grey, place - len(rows) / 2 if not panel.setup else 0.0))
        first_grey = first_grey and curves.layouts[row] in colors
    shown = 100 * np.concatenate([np.ravel(curves.relative[row]) for row in rows if curves.layouts[row] in colors])
    floor = max(0.0, min(70.0, 10 * math.floor(float(np.nanmin(shown)) / 10 - 0.2)))
    ceiling = 103.0
    if panel.setup is None:
        top = np.nanmax(curves.speed, axis=0)
        ends = 100 * np.concatenate([np.ravel(curves.low / top), np.ravel(curves.high / top)])
        floor, ceiling = float(np.nanmin([*ends, floor])) - 3, float(np.nanmax([*ends, 100.0])) + 3
    return Chart(
        title=f"{panel.title}: {panel.kind}",
        x_label="global batch, sequences",
        y_label="% of the fastest",
        series=tuple(series),
        y_range=(floor, ceiling),
        log_x=True,
        x_range=(curves.batches[0] / math.sqrt(2), curves.batches[-1] * math.sqrt(2)),
        x_ticks=tuple(float(batch) for batch in curves.batches),
        ribbons=_ribbons(panel, colors),
        width=width,
        height=_HEIGHT,
    )


def _colors(panel: Panel) -> dict[Layout, str]:
    """Colours of the layouts that matter: the fastest of some batch, and those that were published; in a small
    measurement, all of them.
    """
    curves, published = panel.curves, panel.setup.published if panel.setup else ()
    matter = {curves.layouts[row] for row in curves.best} | set(published)
    if panel.setup is None and len(curves.layouts) <= _ALL_NAMED:
        matter = set(curves.layouts)
    ordered = [layout for layout in curves.layouts if layout in matter]
    return {layout: PALETTE[number % len(PALETTE)] for number, layout in enumerate(ordered)}


def _series(curves: Curves, row: int, colors: Mapping[Layout, str], first_grey: bool, aside: float) -> Series:
    layout, share = curves.layouts[row], 100 * curves.relative[row]
    if layout not in colors:
        return Series("others" if first_grey else "", curves.batches, share, _OTHERS, width=1.0)
    top = np.nanmax(curves.speed, axis=0)
    x = np.array(curves.batches) * 2.0 ** (_DODGE * aside)
    low, high = 100 * curves.low[row] / top, 100 * curves.high[row] / top
    thin = bool(np.isfinite(low).any())  # whiskers say more than the line through the points
    return Series(
        name_of(layout),
        x,
        share,
        colors[layout],
        low,
        high,
        width=1.0 if thin else 2.0,
        opacity=0.5 if thin else 1.0,
        dots=True,
        whiskers=True,
    )


def _ribbons(panel: Panel, colors: Mapping[Layout, str]) -> tuple[Ribbon, ...]:
    """Which layout is fastest where; and where it was published, what was measured at both ends."""
    curves, half = panel.curves, math.sqrt(2)
    own = Ribbon(
        panel.kind,
        tuple(
            Band(
                curves.batches[first] / half,
                curves.batches[last] * half,
                colors[curves.layouts[row]],
                name_of(curves.layouts[row]),
            )
            for row, first, last in curves.runs()
        ),
    )
    if panel.setup is None or not panel.setup.published:
        return (own,)
    small, *between, large = panel.setup.published
    start, end = curves.batches[0], curves.batches[-1]
    words = " → ".join(["", *map(name_of, between), "larger batches →"]).strip()
    cells = (
        Band(start / half, start * half, colors[small], name_of(small)),
        Band(start * half, end / half, _BETWEEN, words),
        Band(end / half, end * half, colors[large], name_of(large)),
    )
    return (Ribbon("paper", cells), own)


# -- the tables


def tables_of(panels: Sequence[Panel]) -> str:
    """What the picture says in numbers, as markdown."""
    predicted = [panel for panel in panels if panel.setup]
    errors = json.loads(FITTED.read_text()).get("errors", {})
    return "\n\n".join([_losses(panels), _against_paper(predicted), _variants(predicted), error_table(errors)])


def _losses(panels: Sequence[Panel]) -> str:
    rows = []
    for panel in panels:
        curves = panel.curves
        kept = [loss_of_keeping(curves, curves.best[0]), loss_of_keeping(curves, curves.best[-1]), best_kept(curves)]
        rows.append([panel.title, panel.kind, _runs(curves), *map(_loss, kept)])
    head = ["setup", "", "fastest layout at global batch", "kept from the smallest", "kept from the largest"]
    return _markdown([*head, "best one to keep"], rows)


def _against_paper(panels: Sequence[Panel]) -> str:
    rows = []
    for panel in panels:
        if panel.setup and panel.setup.published:
            curves, ends = panel.curves, (panel.setup.published[0], panel.setup.published[-1])
            cells = [_behind(curves, layout, column) for layout, column in zip(ends, (0, -1), strict=True)]
            rows.append([panel.title, f"`{name_of(ends[0])}`", cells[0], f"`{name_of(ends[1])}`", cells[1]])
    first, last = panels[0].curves.batches[0], panels[0].curves.batches[-1]
    head = ["setup", f"measured fastest at {first:,}", "predicted there"]
    return _markdown([*head, "measured fastest at large batches", f"predicted at {last:,}"], rows)


def _behind(curves: Curves, layout: Layout, column: int) -> str:
    """How the prediction ranks a layout at one batch."""
    if layout not in curves.layouts or math.isnan(curves.relative[curves.layouts.index(layout), column]):
        return "does not fit"
    row = curves.layouts.index(layout)
    if row == curves.best[column]:
        return "fastest, too"
    return f"{_percent(1 - curves.relative[row, column])} behind `{name_of(curves.layouts[curves.best[column]])}`"


def _variants(panels: Sequence[Panel]) -> str:
    rows = []
    for panel in panels:
        if panel.setup:
            for space in (DATA_SHEETS, EVERYTHING):
                curves = predict(panel.setup, hardware_of(panel.setup, space.own_figures), space)
                kept = [loss_of_keeping(curves, curves.best[0]), best_kept(curves)]
                rows.append([panel.title, space.name, _runs(curves), *map(_loss, kept)])
    head = ["setup", "chosen from", "fastest layout at global batch", "kept from the smallest", "best one to keep"]
    return _markdown(head, rows)


def error_table(errors: Mapping[str, Any]) -> str:
    """What cross-validation says of the predictions, as tools/fit_throughput.py writes it."""
    if not errors:
        return "These constants have not been cross-validated yet: how far step times are off is not known."
    told = {"unseen_layouts": "layouts", "unseen_sources": "publications"}
    rows = [
        [name, f"{errors[key]['points']}", _percent(errors[key]["median_error"]), _percent(errors[key]["p90_error"])]
        for key, name in told.items()
        if key in errors
    ]
    return _markdown(
        ["step times of published runs, predicted for unseen", "runs", "median error", "nine in ten within"], rows
    )


def _runs(curves: Curves) -> str:
    """``dp4,tp2`` (16 to 64), ``dp8`` (128 to 1,024)."""
    words = []
    for row, first, last in curves.runs():
        low, high = curves.batches[first], curves.batches[last]
        words.append(f"`{name_of(curves.layouts[row])}` ({low:,}{f' to {high:,}' if high > low else ''})")
    return ", ".join(words)


def _loss(loss: Loss) -> str:
    ends = "" if math.isnan(loss.low) or not loss.share else f" [{100 * loss.low:.0f}, {100 * loss.high:.0f}]"
    where = f" at {loss.batch:,}" if loss.share else ""
    missing = f"; not at {', '.join(f'{batch:,}' for batch in loss.missing)}" if loss.missing else ""
    return f"`{name_of(loss.layout)}`: {_percent(loss.share)}{ends}{where}{missing}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0095 or share == 0 else "under 1 %"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _renew(page: Path, tables: str) -> None:
    """Put the tables where the page has its two marks."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--page {page} can't be read: {error.strerror}") from None
    marked = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    if not marked.search(text):
        raise UserError(f"--page {page} has no place for the tables; write {_BEGIN} and {_END} on lines of their own")
    write_whole(page, marked.sub(lambda _: f"{_BEGIN}\n\n{tables}\n\n{_END}", text))


# -- numbers


def _as_json(panel: Panel) -> dict[str, Any]:
    curves = panel.curves
    return {
        "title": panel.title,
        "kind": panel.kind,
        "batches": curves.batches,
        "fastest": [str(curves.layouts[row]) for row in curves.best],
        "layouts": [
            {
                "layout": str(layout),
                "plans": [str(curves.plans[row, i]) if (row, i) in curves.plans else None for i in columns],
                "sequences_per_s": [_number(value) for value in curves.speed[row]],
                "low": [_number(value) for value in curves.low[row]],
                "high": [_number(value) for value in curves.high[row]],
            }
            for row, layout in enumerate(curves.layouts)
            for columns in [range(len(curves.batches))]
        ],
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
