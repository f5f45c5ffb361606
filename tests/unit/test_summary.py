"""The summary of a run whose events are written out here, so that every number can be checked by hand."""

from __future__ import annotations

import pytest

from copus_ext.core.events import Event
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.report.summary import format_summary, summarise

SMALL, LARGE = "pp4,mbs1,gbs4", "dp4,mbs2,gbs32"


def event(event: str, iteration: int, time_s: float, **fields: object) -> Event:
    return {"event": event, "iteration": iteration, "consumed_samples": 4 * iteration, "time_s": time_s, **fields}


def step(iteration: int, loss: float | None, plan: str, seconds: float) -> Event:
    return event("step", iteration, iteration, loss=loss, plan=plan, step_time_s=seconds, tokens=100)


def run() -> list[Event]:
    """Twenty steps with losses 20, 19, ... 1; the second half under another plan and twice as fast."""
    steps = [step(i, 21.0 - i, SMALL if i <= 10 else LARGE, 0.5 if i <= 10 else 0.25) for i in range(1, 21)]
    changed = event("decision", 10, 10.5, chosen=LARGE, current=SMALL, reason="gain 13.2 %, 0.6 % repays the switch")
    switch = event("switch", 10, 10.9, seconds={"build": 0.25, "move": 0.125}, bytes_moved=2_500_000, exact=True)
    return [
        event("run_start", 0, 0.0, world_size=4, policy="copus", resumed_from=None),
        event("eval", 0, 0.1, loss=20.5),
        *steps[:10],
        event("noise_scale", 5, 5.0, value=None, low=3.25, high=None, N=-0.1, S=2.0, n_eff=4.0),
        event("decision", 5, 5.0, chosen=SMALL, current=SMALL, reason="stay"),
        changed,
        switch | {"from": SMALL, "to": LARGE, "bytes_minimum": 2_000_000},
        *steps[10:],
        event("noise_scale", 20, 20.0, value=33.0, low=25.0, high=48.0, N=0.1, S=3.3, n_eff=40.0),
        event("eval", 20, 25.0, loss=0.75),
        event("run_end", 20, 25.0, status="finished"),
    ]


def test_numbers_are_those_of_the_events() -> None:
    summary = summarise(run())
    assert (summary.status, summary.iteration, summary.consumed_samples, summary.seconds) == ("finished", 20, 80, 25.0)
    assert (summary.losses[0], summary.losses[-1]) == (20.0, 1.0)
    assert [(use.plan, use.steps, use.tokens_per_second) for use in summary.plans] == [
        (SMALL, 10, 200.0),
        (LARGE, 10, 400.0),
    ]
    assert summary.tokens_per_second == pytest.approx(2000 / 7.5)
    assert (len(summary.changes), summary.stays, len(summary.switches)) == (1, 1, 1)


def test_the_text_tells_what_happened() -> None:
    text = format_summary(summarise(run(), "runs/demo/events.jsonl"))
    for said in (
        "Run finished: 20 steps, 80 sequences, 25.0 s, 4 ranks, policy copus",
        "20.0000 -> 1.0000   (mean of the first 10 steps 15.5000, of the last 10 5.5000)",
        "20.5000 -> 0.7500",
        "267 tokens/s in steps, 80 with everything between them",
        "open [3.25, open] at step 5 -> 33 [25, 48] at step 20",
        "2: 1 change, 1 to stay",
        "step 10: pp4,mbs1,gbs4 -> dp4,mbs2,gbs32",
        "gain 13.2 %, 0.6 % repays the switch",
        "step 10: 0.38 s, 2.5 MB moved where 2 MB had to be, exact",
        "faults      none",
        "runs/demo/events.jsonl",
    ):
        assert said in text


def test_it_fits_a_terminal() -> None:
    events = run()
    long = event("decision", 20, 20.0, chosen=SMALL, current=LARGE, reason="because " * 60)
    fault = event("fault", 20, 20.0, kind="switch_failed", message="rank 3: " + "no memory left " * 30)
    text = format_summary(summarise([*events, long, fault], "events.jsonl"))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert text.isascii()


def test_a_switch_that_was_not_exact_stands_out() -> None:
    events = [e | {"exact": False} if e["event"] == "switch" else e for e in run()]
    assert "NOT EXACT" in format_summary(summarise(events))


def test_faults_and_resumes_are_told() -> None:
    fault = event("fault", 20, 20.0, kind="not_finite", message="a gradient norm on rank 3")
    resumed = event("run_start", 20, 20.0, resumed_from=20)
    text = format_summary(summarise([*run(), fault, resumed]))
    assert "step 20: not_finite" in text
    assert "a gradient norm on rank 3" in text
    assert "resumed     from step 20" in text


def test_losses_that_are_not_finite_are_counted_and_not_averaged() -> None:
    summary = summarise([step(1, 2.0, SMALL, 0.5), step(2, None, SMALL, 0.5), step(3, 1.0, SMALL, 0.5)])
    assert summary.losses == (2.0, 1.0)
    assert "1 step without a finite loss" in format_summary(summary)


def test_plans_are_named_alike_however_they_are_logged() -> None:
    plan = Plan(Layout(dp=4), micro_batch=2, global_batch=32)
    stay = event("decision", 3, 3.0, chosen=plan.to_json(), current=str(plan), reason="stay")
    assert summarise([stay]).stays == 1


def test_a_run_that_was_cut_short_is_summed_up_too() -> None:
    text = format_summary(summarise([event("run_start", 0, 0.0)]))
    assert text.startswith("Run not finished: 0 steps")


def test_no_events_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"no events in x\.jsonl"):
        summarise([], "x.jsonl")


def test_gradients_that_did_not_go_on_after_a_switch_stand_out() -> None:
    checks = [event("switch_check", 35, 30.0, z_n=0.4, z_s=-0.2, suspect=False)]
    assert "before and after: 1, none suspect" in format_summary(summarise([*run(), *checks]))
    checks.append(event("switch_check", 60, 40.0, z_n=0.4, z_s=-5.25, suspect=True))
    text = format_summary(summarise([*run(), *checks]))
    assert "before and after: 2, 1 suspect" in text
    assert "step 60: +0.4 and -5.2 sigma" in text


def learned(time_s: float, kind: str, c: tuple[float, float, float]) -> Event:
    told = {"kind": kind, "batch_from": 4, "batch_to": 32, "log_ratio": -0.5, "log_sd": 0.1}
    return event("critical_ratio", 10, time_s, **told, **dict(zip(("c", "low", "high"), c, strict=True)))


def test_what_was_learned_of_c_is_told() -> None:
    known = event("decision", 5, 5.0, chosen=SMALL, current=SMALL, reason="stay", c=[2.0, 0.34, 11.7])
    free = [learned(11.0, "batch change", (2.5, 0.5, 11.0)), learned(12.0, "batch change", (2.25, 0.5, 11.0))]
    branch = {"plan": LARGE, "batch_from": 4, "batch_to": 32, "log_sd": 0.1, "seconds": 0.25}
    probes = [event("probe", 15, 20.0, **branch, log_ratio=ratio) for ratio in (None, -0.5)]
    text = format_summary(summarise([known, *free, *probes, learned(20.0, "probe", (3.5, 1.5, 8.0)), *run()[-1:]]))
    assert "  c           2 [0.34, 12] -> 3.5 [1.5, 8] by 2 batch changes, 1 probe\n" in text
    assert "  probes      2 in 0.5 s, 2.0 % of the run; 1 said nothing\n" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_a_run_that_learned_nothing_of_c_does_not_speak_of_it() -> None:
    known = event("decision", 5, 5.0, chosen=SMALL, current=SMALL, reason="stay", c=[2.0, 0.34, 11.7])
    lines = format_summary(summarise([*run(), known])).splitlines()
    assert not [line for line in lines if line.startswith(("  c  ", "  probes"))]


def test_policy_and_objective_are_those_of_the_settings() -> None:
    settings = {"policy": "copus", "objective": "paper", "switch_rule": "threshold:0.10"}
    start = event("run_start", 0, 0.0, world_size=4, policy="copus", settings=settings)
    weighed = event("decision", 5, 5.0, chosen=SMALL, current=SMALL, reason="stay", gain=0.1)
    text = format_summary(summarise([start, weighed]))
    assert "policy copus\n  objective   paper, switch rule threshold:0.10" in text
    ramp = start | {"policy": "cbs", "settings": settings | {"policy": "cbs:from=8"}}
    text = format_summary(summarise([ramp, weighed | {"gain": None}]))
    assert "policy cbs:from=8" in text
    assert "objective" not in text
