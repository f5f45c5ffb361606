"""Which layout is fastest at which batch: on curves made by hand, on tables, and on a model small enough to check."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import plot_coupling as tool
from copus_ext.core.cost.coupling import (
    DATA_SHEETS,
    EVERYTHING,
    SETUPS,
    Curves,
    Setup,
    best_kept,
    hardware_of,
    loss_of_keeping,
    measured,
    predict,
)
from copus_ext.core.cost.hardware import Hardware
from copus_ext.core.cost.hardware_file import load_hardware
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.throughput_table import Row, Subject, ThroughputTable, append_row
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.report.svg import Band, Chart, Ribbon, Series, draw_chart

SVG = "{http://www.w3.org/2000/svg}"
WIDE, DEEP, MIXED = Layout(dp=4), Layout(dp=1, pp=4), Layout(dp=2, pp=2)
MODEL = ModelShape(8, 1024, 16, 16, 4096, 1024, 512, param_bytes=2, flash_attention=True)
MACHINE = Hardware(
    flops=1e14,
    node_flops=4e14,
    memory_bandwidth=1e12,
    intra_node_bandwidth=1e11,
    inter_node_bandwidth=1e9,
    latency_s=1e-5,
    devices_per_node=4,
    memory_bytes=16 * 2**30,
    step_overhead_s=1e-3,
    layer_overhead_s=1e-4,
)
SMALL = Setup("small", MODEL, "none", 8, (8, 16, 32, 64))
SUBJECT = Subject(ModelShape(4, 512, 8, 8, 1408, 512, 64), 4, "CPU")


def curves(speed: list[list[float]], spread: float = math.nan) -> Curves:
    values = np.array(speed)
    layouts = (WIDE, MIXED, DEEP)[: len(speed)]
    return Curves((8, 16, 32), layouts, values, values * (1 - spread), values * (1 + spread), {})


def row(layout: Layout, batch: int, *seconds: float, micro_batch: int = 1, lap: int = 1) -> Row:
    return Row(Plan(layout, micro_batch, batch), lap, seconds)


def profile(folder: Path, *rows: Row) -> Path:
    path = folder / "profile.csv"
    for entry in rows:
        append_row(path, SUBJECT, entry)
    return path


# -- curves


def test_the_fastest_layout_of_every_batch_and_its_stretches() -> None:
    found = curves([[1.0, 2.0, 4.0], [2.0, 2.5, 3.0]])

    assert found.best == (1, 1, 0)
    assert found.runs() == [(1, 0, 1), (0, 2, 2)]
    np.testing.assert_allclose(found.relative, [[0.5, 0.8, 1.0], [1.0, 1.0, 0.75]])


def test_what_keeping_a_layout_costs_at_most() -> None:
    found = curves([[1.0, 2.0, 4.0], [2.0, 2.5, 3.0]])

    first, last = loss_of_keeping(found, 1), loss_of_keeping(found, 0)

    assert (first.layout, first.share, first.batch) == (MIXED, 0.25, 32)
    assert (last.layout, last.share, last.batch) == (WIDE, 0.5, 8)
    assert math.isnan(first.low)
    assert best_kept(found).layout == MIXED


def test_the_spread_of_both_layouts_is_in_a_measured_loss() -> None:
    lost = loss_of_keeping(curves([[1.0, 1.0, 1.0], [1.0, 1.0, 0.5]], spread=0.1), 1)

    assert lost.low == pytest.approx(1 - 0.55 / 0.9)
    assert lost.high == pytest.approx(1 - 0.45 / 1.1)


def test_a_layout_that_cannot_do_every_batch_is_not_the_one_to_keep() -> None:
    found = curves([[math.nan, 1.0, 1.0], [1.0, 0.9, 0.7]])

    assert loss_of_keeping(found, 0).missing == (8,)
    assert loss_of_keeping(found, 0).share == 0.0
    assert best_kept(found).layout == MIXED


# -- measured


def test_a_table_gives_each_layout_its_fastest_plan_and_the_range_of_its_visits() -> None:
    rows = [
        row(WIDE, 8, 2.0, 2.0, 2.0),
        row(WIDE, 8, 1.0, 1.0, 1.0, lap=2),
        row(WIDE, 8, 4.0, micro_batch=2),
        row(DEEP, 8, 4.0),
        Row(Plan(MIXED, 1, 8), 1, failure="no memory"),
    ]

    found = measured(ThroughputTable(SUBJECT, tuple(rows)))

    assert found.layouts == (WIDE, DEEP)
    np.testing.assert_allclose(found.speed, [[8 / 1.5], [2.0]])
    np.testing.assert_allclose([found.low[0, 0], found.high[0, 0]], [4.0, 8.0])
    assert np.isnan([found.low[1, 0], found.high[1, 0]]).all()  # one visit tells no spread
    assert found.plans[0, 0] == Plan(WIDE, 1, 8)


def test_batches_with_one_layout_are_left_out() -> None:
    found = measured(ThroughputTable(SUBJECT, (row(WIDE, 8, 1.0), row(DEEP, 8, 1.0), row(WIDE, 64, 1.0))))

    assert found.batches == (8,)


# -- predicted


def test_predicted_curves_hold_the_plans_of_the_restricted_search_only() -> None:
    found = predict(SMALL, MACHINE)

    assert found.batches == SMALL.batches
    assert {layout.world_size for layout in found.layouts} == {8}
    for (number, column), plan in found.plans.items():
        layout = plan.layout
        assert (layout.dp, layout.tp, layout.pp) == tuple(getattr(found.layouts[number], n) for n in ("dp", "tp", "pp"))
        assert plan.global_batch == found.batches[column]
        assert (layout.vpp, layout.cp, layout.recompute) == (1, 1, "none")
        assert not layout.distributed_optimizer
        assert not layout.sequence_parallel


def test_more_choice_is_never_slower() -> None:
    few, all_of_them = predict(SMALL, MACHINE), predict(SMALL, MACHINE, EVERYTHING)

    assert (np.nanmax(all_of_them.speed, axis=0) >= np.nanmax(few.speed, axis=0) * (1 - 1e-12)).all()


def test_small_batches_want_a_deeper_layout_on_slow_links() -> None:
    found = predict(SMALL, MACHINE)

    first, last = found.layouts[found.best[0]], found.layouts[found.best[-1]]

    assert first.dp < last.dp
    assert loss_of_keeping(found, found.best[0]).share > 0


@pytest.mark.parametrize(("setup", "billions"), list(zip(SETUPS, (3.2, 13.0, 32.8, 6.7), strict=True)))
def test_the_setups_are_what_the_paper_calls_them(setup: Setup, billions: float) -> None:
    assert setup.model.params / 1e9 == pytest.approx(billions, abs=0.06)
    assert f"{setup.gpus} " in setup.name
    assert {layout.world_size for layout in setup.published} == {setup.gpus}


def test_a_cluster_changes_figures_of_the_file_and_stays_consistent() -> None:
    own, plain = hardware_of(SETUPS[0]), hardware_of(SETUPS[0], DATA_SHEETS.own_figures)

    assert plain == load_hardware("h100")
    assert own.devices_per_node == 2
    assert own.node_flops == 2 * own.flops < plain.flops * 2
    assert own.reached == plain.reached


# -- drawing


def test_a_ribbon_lies_above_the_axis_that_it_speaks_of() -> None:
    bands = (Band(1, 4, "#000001", "left"), Band(4, 16, "#000002", "right"))
    chart = Chart(
        "t",
        "x",
        "y",
        (Series("", (1, 4, 16), (1, 2, 3), "#000003", (1, 2, math.nan), (2, 3, 4), dots=True, whiskers=True),),
        log_x=True,
        x_ticks=(1.0, 4.0, 16.0, 1024.0),
        x_range=(1, 16),
        ribbons=(Ribbon("row", bands),),
    )

    svg = ElementTree.fromstring(draw_chart(chart))

    first, second = (rect for rect in svg.iter(SVG + "rect"))
    assert float(first.get("width", "")) == pytest.approx(float(second.get("x", "")), abs=0.1)  # equal doublings
    texts = [element.text for element in svg.iter(SVG + "text")]
    assert {"left", "right", "row", "16", "1,024"} <= set(texts)
    strokes = [path.get("d", "") for path in svg.iter(SVG + "path") if path.get("stroke-width") == "1.4"]
    assert strokes[0].count("M") == 2  # the third point has no lower end


# -- the tool


def test_the_tool_draws_all_panels_and_renews_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(WIDE, 8, 1.0), row(DEEP, 8, 2.0), row(WIDE, 16, 3.0), row(DEEP, 16, 2.0)]
    table, page, out = profile(tmp_path, *rows), tmp_path / "page.md", tmp_path / "picture.svg"
    page.write_text(f"before\n{tool._BEGIN}\nold\n{tool._END}\nafter\n")
    flags = ["--table", str(table), "--out", str(out), "--page", str(page), "--json", str(tmp_path / "numbers.json")]

    assert tool.main([*flags, "--markdown"]) == 0
    once = page.read_text()
    assert tool.main(flags) == 0

    titles = [title.text for title in ElementTree.parse(out).getroot().iter(SVG + "title")]
    assert [str(title).rsplit(": ", 1)[1] for title in titles] == ["predicted"] * 4 + ["measured"]
    assert page.read_text() == once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "old" not in once
    printed = capsys.readouterr().out
    assert "`dp4` (8), `pp4` (16)" in printed
    assert "`dp4`: 33 % at 16" in printed
    assert json.loads((tmp_path / "numbers.json").read_text())[-1]["fastest"] == ["dp4", "dp1,pp4"]


def test_errors_are_told_where_they_are_known() -> None:
    known = {"points": 90, "median_error": 0.061, "p90_error": 0.2}

    assert "not been cross-validated" in tool.error_table({})
    assert tool.error_table({"unseen_layouts": known}).splitlines()[2:] == ["| layouts | 90 | 6 % | 20 % |"]


@pytest.mark.parametrize(
    ("rows", "page", "message"),
    [
        ([row(WIDE, 8, 1.0)], None, "no global batch has two layouts"),
        ([row(WIDE, 8, 1.0), row(DEEP, 8, 1.0)], "nothing marked", "has no place for the tables"),
    ],
)
def test_bad_input_is_one_line(
    rows: list[Row], page: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--table", str(profile(tmp_path, *rows)), "--out", str(tmp_path / "picture.svg")]
    if page is not None:
        (tmp_path / "page.md").write_text(page)
        flags += ["--page", str(tmp_path / "page.md")]

    assert tool.main(flags) == 2

    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "picture.svg").exists()
