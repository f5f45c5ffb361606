"""Charts whose pixels can be computed by hand, and a page that is complete, well formed and self-contained."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import NormalDist
from xml.etree import ElementTree

import numpy as np
import pytest

from copus_ext.core.efficiency.critical_ratio import CriticalRatio
from copus_ext.core.events import Event, EventLog
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.report.page import write_report
from copus_ext.core.report.ratio import critical_batch_at, ratio_story
from copus_ext.core.report.svg import Axis, Band, Chart, Series, draw_chart, draw_timeline, tick_label, write_svg

SVG = "{http://www.w3.org/2000/svg}"


def elements(svg: str, kind: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(SVG + kind))


def line_of(**series: object) -> str:
    """Path data of the one line of a chart."""
    chart = Chart("t", "x", "y", (Series("a", color="#000001", **series),))  # type: ignore[arg-type]
    (path,) = [path for path in elements(draw_chart(chart), "path") if path.get("fill") == "none"]
    return str(path.get("d"))


def corners(svg: str) -> list[tuple[float, float]]:
    """Corners of all shaded areas, in pixels."""
    points = " ".join(str(polygon.get("points")) for polygon in elements(svg, "polygon"))
    return [(float(x), float(y)) for x, y in (point.split(",") for point in points.split())]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.87), (-3, 12), (1e6, 3.7e6), (5.0, 5.001), (1e-9, 8e-9)])
def test_linear_ticks_are_round_evenly_spaced_and_inside(low: float, high: float) -> None:
    ticks = Axis(low, high, 0, 400).ticks(spacing=60)
    steps = np.diff(ticks)
    assert 3 <= len(ticks) <= 9
    assert low <= ticks[0] + 1e-9 * abs(high)
    assert ticks[-1] <= high * (1 + 1e-9)
    assert steps == pytest.approx(np.full(steps.size, steps[0]), rel=1e-6)
    assert re.fullmatch(r"[125]\.?0*e.*", f"{steps[0]:.3e}")


@pytest.mark.parametrize(("low", "high"), [(1, 1000), (0.3, 700), (1e-6, 1e9), (3, 40), (15, 18)])
def test_logarithmic_ticks_are_inside_and_enough(low: float, high: float) -> None:
    axis = Axis(low, high, 300, 0, log=True)
    ticks = axis.ticks(spacing=35)
    assert 3 <= len(ticks) <= 14
    assert all(low <= tick <= high for tick in ticks)
    assert axis([low, math.sqrt(low * high), high]) == pytest.approx([300, 150, 0])


@pytest.mark.parametrize(("value", "label"), [(0, "0"), (1500, "1.5k"), (2e6, "2M"), (0.05, "0.05"), (-3, "-3")])
def test_tick_labels_are_short(value: float, label: str) -> None:
    assert tick_label(value) == label


def test_a_value_that_is_not_finite_breaks_the_line() -> None:
    assert line_of(x=[0, 1, 2, 3, 4], y=[1, 2, math.nan, 2, 1]).count("M") == 2


def test_stairs_hold_a_value_until_its_step_is_done() -> None:
    assert re.fullmatch(r"M0\.0 \S+V\S+H\d+\.\d", line_of(x=[0, 1], y=[4, 8], stairs=True))


def test_a_long_line_is_thinned_and_keeps_its_spikes() -> None:
    values = np.zeros(100_000)
    values[[12_345, 77_777]] = 9.0, -9.0
    spiky, flat = line_of(x=np.arange(values.size), y=values), line_of(x=np.arange(values.size), y=0 * values)
    heights = {float(point.split()[1]) for point in spiky[1:].split("L")}
    assert len(heights) == 3
    assert max(spiky.count("L"), flat.count("L")) < 2000


def test_an_open_interval_shades_up_to_the_top_and_an_unknown_one_not_at_all() -> None:
    interval = Series("a", [0, 1, 2], [2, 2, 2], "#000001", low=[1, 1, math.nan], high=[3, math.inf, math.nan])
    chart = Chart("t", "x", "y", (interval,), y_range=(0.0, 4.0), width=600, height=300)
    points = corners(draw_chart(chart))
    assert len(points) == 4
    assert min(y for _, y in points) == 0.0
    assert max(x for x, _ in points) < 300


def test_an_outlined_interval_is_two_dashed_lines_with_a_gap_where_an_end_is_open() -> None:
    interval = Series("a", [0, 1, 2], [2, 2, 2], "#000001", low=[1, 1, 1], high=[3, math.inf, 3], outline=True)
    svg = draw_chart(Chart("t", "x", "y", (interval,), y_range=(0.0, 4.0)))
    low, high = [str(path.get("d")) for path in elements(svg, "path") if path.get("stroke-dasharray")]
    assert (low.count("M"), high.count("M")) == (1, 2)
    assert float(low.split()[1].split("L")[0]) > float(high.split()[1].split("M")[0])  # pixels grow downwards
    assert not corners(svg)


@pytest.mark.parametrize("y", [[], [5.0], [math.nan, math.nan], [3.0, 3.0]])
@pytest.mark.parametrize("log", [False, True])
def test_there_is_a_picture_whatever_the_data(y: list[float], log: bool) -> None:
    svg = draw_chart(Chart("t", "x", "y", (Series("a", list(range(len(y))), y, "#000001"),), log_y=log))
    numbers = [value for element in ElementTree.fromstring(svg).iter() for value in element.attrib.values()]
    assert not [value for value in numbers if "nan" in value or "inf" in value]


def test_text_cannot_become_markup(tmp_path: Path) -> None:
    write_svg(draw_timeline("<b>", "x", [("<plan>&", [Band(0, 1, "#000001")])]), tmp_path / "a.svg")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert "<plan>&" in [text.text for text in root.iter(SVG + "text")]


def test_bands_of_a_timeline_lie_to_scale() -> None:
    svg = draw_timeline(
        "t", "s", [("a", [Band(0, 1, "#000001"), Band(3, 4, "#000001")]), ("b", [Band(1, 3, "#000002")])]
    )
    starts = [float(str(rect.get("x"))) for rect in elements(svg, "rect")]
    widths = [float(str(rect.get("width"))) for rect in elements(svg, "rect")]
    assert starts[2] == pytest.approx(widths[0], abs=0.11)
    assert widths[2] == pytest.approx(2 * widths[0], abs=0.2)


class Page(HTMLParser):
    """What a page shows and what it refers to; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.shown: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


def log_run(folder: Path, reason: str) -> None:
    """A short run with a stay, a switch and a fault."""
    seconds = iter(range(10_000))
    small, large = "pp4,mbs1,gbs4", "dp4,mbs2,gbs32"
    with EventLog(folder / "events.jsonl", lambda: float(next(seconds))) as log:
        log.write("run_start", 0, 0, model="gpt", world_size=4, policy="copus")
        for iteration in range(1, 41):
            plan = small if iteration <= 20 else large
            samples = 4 * iteration if iteration <= 20 else 80 + 32 * (iteration - 20)
            loss = math.nan if iteration == 7 else 5.0 / iteration
            log.write("step", iteration, samples, loss=loss, plan=plan, step_time_s=0.5, tokens=64)
            high = math.inf if iteration < 10 else 60.0
            log.write("noise_scale", iteration, samples, value=30.0, low=20.0, high=high, N=0.1, S=3.0, n_eff=9.0)
            if iteration in (5, 10, 20):
                chosen = large if iteration == 20 else small
                best = {"plan": large, "throughput": 9.5, "efficiency": 0.5, "goodput": 4.75, "why_not": "too <big>"}
                numbers = {"gain": 0.132, "gain_low": 0.05, "gain_needed": None, "candidates": [best]}
                log.write("decision", iteration, samples, chosen=chosen, current=small, reason=reason, **numbers)
        log.write("switch", 20, 80, **{"from": small, "to": large}, seconds={"move": 0.25}, bytes_moved=8, exact=True)
        log.write("fault", 40, 720, kind="switch_failed", message="rank 3 has no memory")
        log.write("run_end", 40, 720, status="finished")


def test_the_page_is_complete_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    log_run(tmp_path, reason="gain 13 % > 5 % & worth <it>")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    shown = " ".join(page.shown)
    assert not page.open
    assert not page.links
    assert "script" not in page.tags
    assert page.tags.count("svg") == 9  # four charts, each with its plotting area, and the timeline
    for said in ("Run finished", "gain 13 % > 5 % & worth <it>", "+13.2 %", "stay, 2 x", "5-10", "too <big>"):
        assert said in shown
    for said in ("0.25 s (move 0.25)", "8 B", "rank 3 has no memory", "Global batch size and noise scale"):
        assert said in shown


def interval_of(distribution: NormalDist) -> list[float]:
    """Median and 95 % interval of what has that distribution in its logarithm."""
    return [math.exp(distribution.inv_cdf(share)) for share in (0.5, 0.025, 0.975)]


def test_the_critical_batch_of_normal_logarithms_is_that_of_their_sum() -> None:
    c, noise = NormalDist(0.7, 0.9), NormalDist(3.4, 0.3)
    decision = {"event": "decision", "c": interval_of(c)}
    scale = dict(zip(("value", "low", "high"), interval_of(noise), strict=True))
    assert critical_batch_at(decision, scale) == pytest.approx(interval_of(c + noise))
    value, low, high = critical_batch_at(decision, scale | {"high": None})
    assert [value, low] == pytest.approx(interval_of(c + noise)[:2])
    assert high == math.inf


@pytest.mark.parametrize(
    ("c", "noise"),
    [
        (None, {"value": 30.0, "low": 20.0, "high": 60.0}),
        ([2.0, 0.3, 12.0], None),
        ([2.0, 0.3, 12.0], {"value": None, "low": 20.0, "high": None}),
        ([2.0, 0.3, 12.0], {"value": 30.0, "low": None, "high": None}),
    ],
)
def test_the_critical_batch_is_unknown_where_c_or_the_noise_scale_is(
    c: list[float] | None, noise: dict[str, float | None] | None
) -> None:
    assert all(math.isnan(number) for number in critical_batch_at({"event": "decision", "c": c}, noise))


CHANGE = {"kind": "batch change", "batch_from": 4, "batch_to": 32, "log_ratio": -0.1, "log_sd": 0.3}
CHANGE |= {"c": 2.25, "low": 0.5, "high": 11.0}
FOUND = {"kind": "probe", "batch_from": 32, "batch_to": 128, "log_ratio": math.log(0.5), "log_sd": 0.1}
FOUND |= {"c": 3.25, "low": 1.5, "high": 8.0}
BRANCH = {"plan": "dp4,mbs2,gbs128", "samples": 2048, "seconds": 1.5}
BRANCH |= {name: FOUND[name] for name in ("batch_from", "batch_to", "log_ratio", "log_sd")}
SILENT = BRANCH | {"log_ratio": None, "log_sd": None, "seconds": 2.5}


def happened(event: str, **fields: object) -> Event:
    return {"event": event, "iteration": 7, "consumed_samples": 90, "time_s": 9.0, **fields}


def test_a_branch_and_what_came_of_it_are_one_lesson_in_either_order() -> None:
    pair = [happened("probe", **BRANCH), happened("critical_ratio", **FOUND)]
    for events in (pair, pair[::-1]):
        (lesson,) = ratio_story(events).lessons
        assert (lesson.seconds, lesson.after) == (1.5, (3.25, 1.5, 8.0))
    twice = ratio_story([*pair, *pair])
    assert (len(twice.lessons), len(twice.probes), twice.probe_seconds) == (2, 2, 3.0)


def test_free_observations_and_branches_that_say_nothing_stand_alone() -> None:
    story = ratio_story([happened("probe", **SILENT), happened("critical_ratio", **CHANGE)])
    assert [lesson.kind for lesson in story.lessons] == ["probe", "batch change"]
    assert (len(story.observations), len(story.probes), story.probe_seconds) == (1, 1, 2.5)
    unused = ratio_story([happened("probe", **BRANCH), happened("critical_ratio", **CHANGE)])
    assert [lesson.after is None for lesson in unused.lessons] == [True, False]


def test_c_at_the_start_is_what_the_run_began_with() -> None:
    prior = CriticalRatio()
    start = happened("run_start", knowledge={"critical_ratio": prior.to_json()})
    decided = happened("decision", c=[2.5, 0.5, 9.0])
    story = ratio_story([start, decided, happened("critical_ratio", **FOUND)])
    assert story.start == prior.interval(0)
    assert story.end == (3.25, 1.5, 8.0)
    assert ratio_story([decided]).start == (2.5, 0.5, 9.0)
    assert ratio_story([happened("run_start"), happened("decision")]).end is None


def log_learning_run(folder: Path) -> None:
    """A run that learns of c: decisions with what they know of it, a switch of the batch, and two branches."""
    seconds = iter(range(10_000))
    small, large, refused = "dp4,mbs1,gbs4", "dp4,mbs2,gbs32", Plan(Layout(pp=4), 1, 8)
    settings = {"policy": "copus", "objective": "goodput", "switch_rule": "amortised"}
    knowledge = {"critical_ratio": CriticalRatio().to_json()}
    with EventLog(folder / "events.jsonl", lambda: float(next(seconds))) as log:
        log.write("run_start", 0, 0, world_size=4, settings=settings, searches=True, knowledge=knowledge)
        for iteration in range(1, 41):
            plan = small if iteration <= 20 else large
            samples = 4 * iteration if iteration <= 20 else 80 + 32 * (iteration - 20)
            rates = {"rate_share": 1 - iteration / 50, "learning_rate": 1e-3 * (1 - iteration / 50)}
            log.write("step", iteration, samples, loss=5.0 / iteration, plan=plan, step_time_s=0.5, tokens=64, **rates)
            log.write("noise_scale", iteration, samples, value=30.0, low=20.0, high=60.0, N=0.1, S=3.0, n_eff=9.0)
            if iteration % 10 == 0:
                probe = None if iteration < 30 else {"plan": BRANCH["plan"], "samples": 2048}
                numbers = {"gain": 0.13, "gain_low": -0.02, "gain_high": 0.24, "unlisted": 400}
                plans = {"candidates": [{"plan": large}], "refused": [[refused.to_json(), "no <room>"]], "probe": probe}
                chosen = large if iteration == 20 else plan
                known = [2.0, 0.34, 11.7] if iteration < 40 else [3.25, 1.5, 8.0]
                fields = {"chosen": chosen, "current": plan, "reason": "", "c": known, **plans, **numbers}
                log.write("decision", iteration, samples, **fields)
                if iteration == 20:
                    log.write("switch", 20, 80, **{"from": small, "to": large}, seconds={"data": 0.25}, exact=True)
                    log.write("critical_ratio", 20, 80, **CHANGE)
                if iteration == 30:
                    log.write("probe", 30, samples, **BRANCH)
                    log.write("critical_ratio", 30, samples, **FOUND)
                if iteration == 40:
                    log.write("probe", 40, samples, **SILENT)
        log.write("run_end", 40, 720, status="finished")


def test_the_page_tells_what_was_learned_of_c(tmp_path: Path) -> None:
    log_learning_run(tmp_path)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    shown = " ".join(page.shown)
    assert not page.open
    assert page.tags.count("svg") == 13  # learning rate and c on top of what every run has
    for said in (
        "Global batch size, noise scale and critical batch",
        "c: 2 [0.34, 12] at the start, 3.2 [1.5, 8] at the end",
        "2 in 4.0 s",
        "1 said nothing",
        "x 0.50 [0.41, 0.61]",
        "32 -> 128",
        "after a batch change",
        "-2.0 to +24.0 %",
        "stay, probe",
        "1 of 401 candidates",
        "refused: dp1,pp4,mbs1,gbs8: no <room>",
    ):
        assert said in shown


def test_a_run_that_did_nothing_yet_has_a_page(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl", lambda: 0.0) as log:
        log.write("run_start", 0, 0)
    assert "Run not finished" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_folder_without_events_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path)
