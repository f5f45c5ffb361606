"""The online correction, on worlds whose truth is known: the closed form with other multipliers, and noise on top."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from copus_ext.core.cost.constants import fitted_constants
from copus_ext.core.cost.hardware import Hardware
from copus_ext.core.cost.hardware_file import load_hardware
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.points import read_points
from copus_ext.core.cost.published import POINTS, hardware_of, open_plans, usable
from copus_ext.core.cost.sweep_replay import (
    Sweep,
    errors_after,
    errors_left_out,
    predicted_best,
    regret_after,
    visit_errors,
)
from copus_ext.core.cost.throughput import ThroughputModel
from copus_ext.core.cost.throughput_table import ThroughputTable
from copus_ext.core.plan import Layout, Plan
from copus_ext.core.planner.space import Space
from replay_sweeps import measured_sweep, measured_table, prior_of

MODEL = ModelShape(32, 4096, 32, 8, 14336, 128256, 4096, gated=True, tied=False, param_bytes=2, flash_attention=True)
BASE = Plan(Layout(dp=32, sequence_parallel=True, distributed_optimizer=True), 1, 64)
H100 = load_hardware("h100")
PLANS = tuple(plan for plan in Space(mbs=(1, 2, 4), batches=(64, 256)).plans(BASE, MODEL) if plan.layout.tp <= 8)


def world(hardware: Hardware, noise: float, seed: int) -> Sweep:
    """What would be measured on ``hardware``, while H100s at their usual are expected."""
    generator = np.random.default_rng(seed)
    truth = ThroughputModel(MODEL, hardware).predict(PLANS).step_time_s
    seconds = truth * np.exp(noise * generator.standard_normal(len(PLANS)))
    return Sweep("world", ThroughputModel(MODEL, H100), PLANS, tuple(seconds.tolist()))


def other_machine(seed: int) -> Hardware:
    """H100s whose speeds and links are each off by some 20 %."""
    draws = np.exp(0.2 * np.random.default_rng(seed).standard_normal(5))
    names = ("flops", "node_flops", "memory_bandwidth", "intra_node_bandwidth", "inter_node_bandwidth")
    values = dict(zip(names, draws.tolist(), strict=True)) | {"node_flops": float(draws[0])}
    return replace(H100, **{name: getattr(H100, name) * factor for name, factor in values.items()})


@pytest.mark.parametrize("seed", range(4))
def test_after_four_plans_the_others_are_known_within_three_percent(seed: int) -> None:
    sweep = world(other_machine(seed), noise=0.01, seed=seed)
    before = np.abs(sweep.prior.predict(PLANS).step_time_s / np.array(sweep.seconds) - 1.0)
    errors, held = errors_after(sweep, observations=4, first=predicted_best(sweep))
    assert np.median(errors) < 0.03
    assert np.median(errors) < np.median(before)
    assert np.mean(held) > 0.85


@pytest.mark.parametrize("seed", range(4))
def test_three_probes_find_a_plan_next_to_the_best(seed: int) -> None:
    sweep = world(other_machine(10 + seed), noise=0.01, seed=seed)
    assert regret_after(sweep, probes=3, first=predicted_best(sweep)) < 0.02
    worst = int(np.argmax(sweep.per_sequence))
    assert regret_after(sweep, probes=3, first=worst) < 0.05


def test_published_sweeps_are_known_after_four_plans() -> None:
    """The sweep over 47 layouts of vTrain, with all its noise, and 20 of a larger model."""
    for name, limit in (("vtrain-39.1b", 0.05), ("vtrain-175.0b", 0.03)):
        points = [point for point in usable(read_points(POINTS)) if point.row["sweep"] == name]
        times = {open_plans(point)[0]: point.step_time_s or 0.0 for point in points}
        hardware = fitted_constants().of(hardware_of(points[0]))
        prior = ThroughputModel(points[0].model, hardware, options=points[0].options)
        sweep = Sweep(name, prior, tuple(times), tuple(times.values()))
        errors, held = errors_after(sweep, observations=4, first=predicted_best(sweep))
        assert np.median(errors) < limit
        assert np.mean(held) > 0.75
        assert np.median(errors_left_out(sweep)) < 0.04, "more plans make it worse: odd ones are taken at their word"
        assert regret_after(sweep, probes=3, first=predicted_best(sweep)) < 0.02


def cpu_table(name: str) -> tuple[ThroughputTable, ThroughputModel]:
    """Visits that were measured on CPU cores, and what was expected of these."""
    data = Path(__file__).parents[1] / "data"
    table = measured_table(str(data / name))
    return table, prior_of(table, str(data / "cpu_4_ranks.toml"))


def known_visits(prior: ThroughputModel, table: ThroughputTable) -> tuple[float, float]:
    """Of visits to plans visited before: median error of what was predicted, and how many its intervals held."""
    errors = [e for e in visit_errors(prior, [(row.plan, row.step_times_s) for row in table.rows]) if e.known]
    held = [error.is_within(0.9) for error in errors]
    return float(np.median([abs(error.log_ratio) for error in errors])), float(np.mean(held))


CPU_TABLES = ["cpu_sweep_4_ranks.csv", "cpu_sweep_4_ranks_later.csv"]


@pytest.mark.parametrize("table", CPU_TABLES)
def test_a_measured_sweep_on_cpu_cores_is_known_after_four_plans(table: str) -> None:
    measured, prior = cpu_table(table)
    sweep = measured_sweep(table, prior, measured)
    replays = [errors_after(sweep, observations=4, first=first) for first in range(len(sweep.plans))]
    assert np.mean([np.median(errors) for errors, _ in replays]) < 0.03
    assert np.mean([np.mean(held) for _, held in replays]) > 0.85
    regrets = [regret_after(sweep, probes=3, first=first) for first in range(len(sweep.plans))]
    assert np.mean(regrets) < 0.01
    assert max(regrets) < 0.05


@pytest.mark.parametrize("table", CPU_TABLES)
def test_the_drift_of_a_real_machine_explains_what_visits_to_a_plan_differ_by(table: str) -> None:
    measured, prior = cpu_table(table)
    error, held = known_visits(prior, measured)
    error_without, held_without = known_visits(replace(prior, kernel=replace(prior.kernel, drift_sd=0.0)), measured)
    assert error < 0.85 * error_without
    assert held > held_without + 0.1


def test_a_machine_that_is_as_expected_leaves_nothing_to_correct() -> None:
    sweep = world(H100, noise=0.0, seed=0)
    errors, held = errors_after(sweep, observations=1, first=0)
    assert errors.max() < 1e-6
    assert held.all()


def test_odd_layouts_are_not_taken_at_their_word_about_their_neighbours() -> None:
    """A fifth of them take longer or shorter than anything tells: the one left out is not off for that."""
    sweep, generator = world(H100, noise=0.0, seed=0), np.random.default_rng(0)
    ways = [(plan.layout, plan.micro_batch) for plan in sweep.plans]
    factors = {way: math.exp(0.2 * generator.standard_normal()) if generator.random() < 0.2 else 1.0 for way in ways}
    odd = np.array([factors[way] for way in ways])
    sweep = replace(sweep, seconds=tuple(np.array(sweep.seconds) * odd))
    believing = replace(sweep.prior, kernel=replace(sweep.prior.kernel, own_sd=0.0))
    doubting, believed = (errors_left_out(replace(sweep, prior=prior)) for prior in (sweep.prior, believing))
    assert doubting.shape == (len(sweep.plans),)
    assert np.median(doubting[odd == 1.0]) < 0.7 * np.median(believed[odd == 1.0])
