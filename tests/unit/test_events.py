"""The event log: what is written comes back, whatever crash and resume do in between."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from copus_ext.core.events import EventLog, EventSink, NullEventLog, read_events


class Clock:
    """Time that passes when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def train(path: Path, start: int | None, until: int, checkpoint_every: int = 10, loss: float = 1.0) -> None:
    """An attempt at a run: a second a step, a checkpoint now and then, a decision after each checkpoint."""
    clock = Clock()
    with EventLog(path, clock, resumed_from=start) as log:
        log.write("run_start", start or 0, (start or 0) * 4)
        for iteration in range((start or 0) + 1, until + 1):
            clock.now += 1.0
            log.write("step", iteration, iteration * 4, loss=loss)
            if iteration % checkpoint_every == 0:
                log.write("checkpoint", iteration, iteration * 4)
                log.write("decision", iteration, iteration * 4, chosen="dp4,mbs1,gbs4")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    clock = Clock()
    with EventLog(tmp_path / "new" / "events.jsonl", clock) as log:
        log.write("run_start", 0, 0, world_size=4)
        clock.now += 2.5
        log.write("switch", 3, 48, **{"from": "dp4,mbs2,gbs16", "to": "pp4,mbs2,gbs16", "seconds": {"move": 0.25}})
    start, switch = read_events(tmp_path / "new" / "events.jsonl")
    assert start == {"event": "run_start", "time_s": 0, "iteration": 0, "consumed_samples": 0} | {
        "resumed_from": None,
        "world_size": 4,
    }
    assert (switch["time_s"], switch["iteration"], switch["consumed_samples"]) == (2.5, 3, 48)
    assert switch["seconds"] == {"move": 0.25}


def test_a_line_is_there_before_the_next_is_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", Clock())
    log.write("run_start", 0, 0)
    assert len(read_events(log.path)) == 1
    log.close()


def test_every_line_is_json_that_a_strict_reader_takes(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl", Clock()) as log:
        log.write("noise_scale", 1, 4, value=math.inf, low=np.float32(3.5), high=math.nan, nested=[{"x": -math.inf}])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    event = json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=refuse)
    assert (event["value"], event["low"], event["high"], event["nested"]) == (None, 3.5, None, [{"x": None}])


def test_an_unknown_event_is_refused(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl", Clock()) as log, pytest.raises(ValueError, match="unknown event 'stp'"):
        log.write("stp", 1, 4)


def test_a_resume_takes_back_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    train(path, None, until=17, loss=1.0)
    train(path, 10, until=25, loss=2.0)
    train(path, 20, until=23, loss=3.0)
    events = read_events(path)
    steps = [(e["iteration"], e["loss"]) for e in events if e["event"] == "step"]
    assert steps == [(i, 1.0 if i <= 10 else 2.0 if i <= 20 else 3.0) for i in range(1, 24)]
    # Decisions at 10 and 20 were made after the checkpoint that was loaded: those attempts did not live to use them.
    assert not [e for e in events if e["event"] == "decision"]
    assert [e["resumed_from"] for e in events if e["event"] == "run_start"] == [None, 10, 20]


def test_the_file_is_only_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    train(path, None, until=17)
    before = path.read_bytes()
    train(path, 10, until=12)
    assert path.read_bytes().startswith(before)


def test_without_a_logged_checkpoint_the_iteration_decides(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    train(path, None, until=17, checkpoint_every=100)
    train(path, 12, until=13, checkpoint_every=100)
    assert [e["iteration"] for e in read_events(path) if e["event"] == "step"] == list(range(1, 14))


def test_time_goes_on_where_the_earlier_attempt_stopped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    train(path, None, until=17)
    train(path, 10, until=12)
    times = [e["time_s"] for e in read_events(path) if e["event"] == "step"]
    assert times == [*range(1, 11), 18.0, 19.0]


def test_a_run_from_scratch_in_an_old_folder_is_a_new_run(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    train(path, None, until=9)
    train(path, None, until=5, loss=7.0)
    steps = [e for e in read_events(path) if e["event"] == "step"]
    assert [(e["time_s"], e["loss"]) for e in steps] == [(float(i), 7.0) for i in range(1, 6)]


def test_a_finished_run_that_is_extended_has_one_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for start in (None, 5):
        with EventLog(path, Clock(), resumed_from=start) as log:
            log.write("run_start", start or 0, 0)
            log.write("run_end", (start or 0) + 5, 0, status="done")
    assert [e["iteration"] for e in read_events(path) if e["event"] == "run_end"] == [10]


@pytest.mark.parametrize("torn", ['{"event": "step", "ti', '{"event": "step", "loss": "\u00e9'])
def test_a_torn_last_line_is_not_read_and_not_written_on(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "events.jsonl"
    train(path, None, until=10)
    whole = read_events(path)
    with path.open("ab") as file:
        file.write(torn.encode()[:-1])
    assert read_events(path) == whole
    train(path, 10, until=11)
    assert [e["iteration"] for e in read_events(path) if e["event"] == "step"] == list(range(1, 12))


def test_a_spoilt_line_in_the_middle_is_told_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("not json\n{}\n")
    with pytest.raises(ValueError, match=r"events\.jsonl:1: not JSON"):
        read_events(path)
    path.write_text('{"event": "step"}\n')
    with pytest.raises(ValueError, match=r"events\.jsonl:1: an event has"):
        read_events(path)


def test_ranks_that_do_not_write_leave_nothing(tmp_path: Path) -> None:
    sink: EventSink = NullEventLog()
    sink.write("step", 1, 4, loss=1.0)
    sink.close()
    assert not list(tmp_path.iterdir())
