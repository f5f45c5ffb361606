"""The table of measured step times: what is written is read, and what is not a table is told in one line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from copus_ext.core.cost.hardware import shared_cpu
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.cost.throughput_table import (
    COLUMNS,
    Row,
    Subject,
    ThroughputTable,
    append_row,
    read_table,
    spread,
    visits,
)
from copus_ext.core.errors import UserError
from copus_ext.core.plan import Layout, Plan

MODEL = ModelShape(layers=4, hidden=256, heads=8, kv_heads=8, ffn=1024, vocab=256, seq=64, gated=True)
SUBJECT = Subject(MODEL, 4, "4 ranks a node, CPU with 2 cores", "optimizer=adam overlap_grad_reduce")
DATA = Plan(Layout(dp=4), 1, 8)
EVERYTHING = Layout(2, 2, 2, 2, 2, 2, sequence_parallel=True, distributed_optimizer=True, recompute="full")
ROWS = (
    Row(DATA, 1, (0.25, 0.5, 0.125), 3 * 2**30),
    Row(Plan(EVERYTHING, 2, 16), 1, failure='no room, says "upstream",\nin two lines'),
    Row(Plan(Layout(pp=4, sequence_parallel=True), 2, 32), 1, (1.0,)),  # a wish that str(plan) leaves out
    Row(DATA, 2, (1e-3,)),
)
FLAG = "--copus-throughput-table"


def written(folder: Path, rows: tuple[Row, ...] = ROWS) -> Path:
    path = folder / "deep" / "table.csv"
    for row in rows:
        append_row(path, SUBJECT, row)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    table = read_table(written(tmp_path), FLAG)
    assert table.subject == SUBJECT
    assert table.rows[0] == ROWS[0]
    assert table.rows[1].plan == ROWS[1].plan
    assert table.failed() == {ROWS[1].plan: 'no room, says "upstream", in two lines'}
    assert table.rows[2:] == ROWS[2:]
    assert table.step_times() == {DATA: (0.25, 0.5, 0.125, 1e-3), ROWS[2].plan: (1.0,)}


def test_columns_say_what_a_row_amounts_to(tmp_path: Path) -> None:
    first = written(tmp_path).read_text().splitlines()[1]
    assert first.startswith('"dp4,mbs1,gbs8",4,1,1,1,1,1,0,0,none,1,8,1,0.25,0.185325,3,3221225472,,0.25 0.5 0.125,')
    assert math.isnan(ROWS[1].step_time_s)
    assert math.isnan(ROWS[1].step_time_sd_s)


def test_a_torn_line_does_not_count_and_goes_with_the_next_row(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole, rows = path.read_bytes(), read_table(path, FLAG).rows
    for cut in (1, 30, len(whole) - 10):  # the last within the head
        path.write_bytes(whole[:-cut])
        kept = read_table(path, FLAG).rows
        assert kept == rows[: max(0, whole[:-cut].count(b"\n") - 1)]
        append_row(path, SUBJECT, ROWS[3])
        assert read_table(path, FLAG).rows == (*kept, ROWS[3])
    path.write_bytes(b"")
    assert read_table(path, FLAG) == ThroughputTable(None, ())


def test_visits_go_round_layouts_and_leave_out_what_is_done() -> None:
    two, pipe = DATA.with_batch(16), Plan(Layout(pp=4), 1, 8)
    plans = [two, pipe, DATA, two, pipe.with_batch(4)]
    empty = ThroughputTable(None, ())
    lap = [pipe.with_batch(4), pipe, DATA, two]
    assert visits(plans, 2, pipe.layout, empty) == [*((plan, 1) for plan in lap), *((plan, 2) for plan in lap)]
    assert visits(plans, 1, Layout(tp=4), empty) == [(plan, 1) for plan in [DATA, two, pipe.with_batch(4), pipe]]
    begun = ThroughputTable(SUBJECT, (Row(DATA, 1, (1.0,)), Row(pipe, 1, failure="no room")))
    assert visits([DATA, pipe, two], 3, DATA.layout, begun) == [(two, 1), (DATA, 2), (two, 2), (DATA, 3), (two, 3)]


def test_a_model_is_seeded_as_if_it_had_taken_the_steps(tmp_path: Path) -> None:
    table = read_table(written(tmp_path), FLAG)
    prior = ThroughputModel(MODEL, shared_cpu(cores=2, ranks=4, memory_bytes=24e9))
    first = prior
    for seconds in (0.25, 0.5, 0.125):
        first = first.observe(DATA, seconds)
    between = first.later().observe(ROWS[2].plan, 1.0)
    assert table.seed(prior) == between.later().observe(DATA, 1e-3).after_a_break(), "visit by visit"
    without = first.later(1.0).observe(DATA, 1e-3).after_a_break()
    assert table.seed(prior, known={ROWS[2].plan}) == without, "time that passed is none of a visit"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(SUBJECT, model=replace(MODEL, hidden=512)), "hidden 256, not 512"),
        (replace(SUBJECT, model=replace(MODEL, experts=8)), "experts its default, not 8"),
        (replace(SUBJECT, model=replace(MODEL, gated=False)), "gated True, not its default"),
        (replace(SUBJECT, ranks=8), "ranks 4, not 8"),
        (replace(SUBJECT, device="8 ranks a node, NVIDIA H200"), "CPU with 2 cores, not 8 ranks a node, NVIDIA H200"),
        (replace(SUBJECT, options=""), "options optimizer=adam overlap_grad_reduce, not none"),
    ],
)
def test_a_table_of_something_else_is_refused(tmp_path: Path, other: Subject, said: str) -> None:
    table = read_table(written(tmp_path), FLAG)
    table.check(SUBJECT, FLAG)
    with pytest.raises(UserError, match=f"^{FLAG}: was measured with .*{said}; measure with the flags of this run$"):
        table.check(other, FLAG)


@pytest.mark.parametrize(
    ("number", "change", "said"),
    [
        (0, ("mbs,", "size,"), "line 1: lacks the column mbs"),
        (0, ("mbs,gbs,", "gbs,mbs,"), "line 1: has other columns"),
        (1, (",0.25 0.5 0.125", ""), f"line 2: has {len(COLUMNS) - 1} values, not {len(COLUMNS)}"),
        (1, ("0.25 0.5 0.125", "0.25 -1"), "line 2: a step takes a positive number of seconds"),
        (1, ("0.25 0.5 0.125", "soon"), "line 2: could not convert"),
        (1, ("0.25 0.5 0.125", ""), "line 2: a row has either step_times_s or a failure"),
        (1, (",1,8,1,", ",2,8,1,"), "line 2: the plan is dp4,mbs1,gbs8, and its columns say dp4,mbs2,gbs8"),
        (1, ("layers=4", "legs=4"), "line 2: a model has no legs"),
        (1, ("layers=4 ", ""), "line 2: .*layers"),
        (4, ("vocab=256", "vocab=512"), "line 5: has vocab 512, not 256 in line 2; one table holds one model"),
    ],
)
def test_what_is_no_table_is_told_with_its_line(
    tmp_path: Path, number: int, change: tuple[str, str], said: str
) -> None:
    path = written(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    assert change[0] in lines[number]
    lines[number] = lines[number].replace(*change, 1)
    path.write_text("".join(lines))
    with pytest.raises(UserError, match=f"^{FLAG} .*table.csv, {said}") as refusal:
        read_table(path, FLAG)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{FLAG} .*none.csv: there is no such file"):
        read_table(tmp_path / "none.csv", FLAG)
    with pytest.raises(UserError, match=f"^{FLAG} .*: can't be read"):
        read_table(tmp_path, FLAG)


def test_the_spread_tells_scatter_of_steps_from_scatter_of_laps() -> None:
    def lap(number: int, median: float) -> Row:
        return Row(DATA, number, (0.9 * median, median, 1.1 * median))

    found = spread(ThroughputTable(SUBJECT, (lap(1, 1.0), lap(2, math.exp(0.2)))))
    assert found.within_visits == pytest.approx(0.14826)
    assert found.between_laps == pytest.approx(0.2 / math.sqrt(2))
    assert math.isnan(spread(ThroughputTable(SUBJECT, (lap(1, 1.0),))).between_laps)
    assert math.isnan(spread(ThroughputTable(None, ())).within_visits)
