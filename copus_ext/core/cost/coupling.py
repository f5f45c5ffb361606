"""How the fastest layout depends on the global batch: of setups that were published, and of measured tables.

A layout here is a pair of tensor and pipeline parallel sizes; whatever else a plan has (micro-batch, and what the
search is allowed beside it) is chosen anew for every global batch, so that all that is compared is the layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.cost.hardware import Hardware
from copus_ext.core.cost.hardware_file import load_hardware
from copus_ext.core.cost.known_models import llama
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import RunOptions
from copus_ext.core.cost.search import SearchSpace, search_plans
from copus_ext.core.cost.throughput_table import Row, ThroughputTable
from copus_ext.core.plan import Layout, Plan

Array = NDArray[np.float64]

_VOCAB_MULTIPLE = 128 * 8  # Megatron's default for tp up to 8: one vocabulary for all layouts
_TP = (1, 2, 4, 8)


def name_of(layout: Layout) -> str:
    """As in a plan; a single replica goes without saying where something else is said."""
    return str(layout).removeprefix("dp1,")


@dataclass(frozen=True)
class Setup:
    """A model on a number of devices, and the layouts that were measured to be fastest there, from small batches on.

    ``figures`` replace those of the hardware's file: what is known of the cluster's own links and cards.
    """

    name: str
    model: ModelShape
    hardware: str
    gpus: int
    batches: tuple[int, ...]
    published: tuple[Layout, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A name for what may be chosen beside tp, pp and the micro-batch; and whether the setup's own figures count."""

    name: str
    own_figures: bool = True
    everything: bool = False


AS_PUBLISHED = Variant("tp, pp, mbs")
DATA_SHEETS = Variant("tp, pp, mbs, on the hardware of the data sheets", own_figures=False)
EVERYTHING = Variant("vpp, sp, zero1, recompute as well", everything=True)


@dataclass(frozen=True)
class Curves:
    """Sequences/s of the fastest plan of each of L layouts at each of B global batches.

    ``speed`` [L, B] is nan where a layout has no plan. Its ends ``low`` and ``high`` are nan where it was not measured
    at least twice. ``plans`` has the plan behind every speed.
    """

    batches: tuple[int, ...]
    layouts: tuple[Layout, ...]
    speed: Array
    low: Array
    high: Array
    plans: Mapping[tuple[int, int], Plan]  # by row and column

    @property
    def relative(self) -> Array:
        """[L, B] speed as a share of the fastest at that batch."""
        return np.asarray(self.speed / np.nanmax(self.speed, axis=0))

    @property
    def best(self) -> tuple[int, ...]:
        """Row of the fastest layout at each batch."""
        return tuple(int(row) for row in np.nanargmax(self.speed, axis=0))

    def runs(self) -> list[tuple[int, int, int]]:
        """Stretches of batches with the same fastest layout: its row, first and last column."""
        found = []
        for row, columns in groupby(range(len(self.batches)), key=lambda column: self.best[column]):
            stretch = list(columns)
            found.append((row, stretch[0], stretch[-1]))
        return found


@dataclass(frozen=True)
class Loss:
    """What one layout loses at most by being kept over all batches, as a share of the fastest's speed, and where.

    ``low`` and ``high`` are its ends with the spread of the measurements (nan where there is none). ``missing`` are
    batches that the layout cannot do or was not measured at.
    """

    layout: Layout
    share: float
    batch: int
    low: float
    high: float
    missing: tuple[int, ...]


def loss_of_keeping(curves: Curves, row: int) -> Loss:
    """The largest loss of a layout that is kept."""
    lost = 1.0 - curves.relative[row]
    column = int(np.nanargmax(lost))
    rival = curves.best[column]
    low = 1.0 - float(curves.high[row, column] / curves.low[rival, column])
    high = 1.0 - float(curves.low[row, column] / curves.high[rival, column])
    missing = tuple(batch for batch, share in zip(curves.batches, lost, strict=True) if math.isnan(share))
    return Loss(curves.layouts[row], float(lost[column]), curves.batches[column], low, high, missing)


def best_kept(curves: Curves) -> Loss:
    """The layout whose largest loss is smallest, of those that can do every batch; of all, where none can."""
    losses = [loss_of_keeping(curves, row) for row in range(len(curves.layouts))]
    whole = [loss for loss in losses if not loss.missing]
    return min(whole or losses, key=lambda loss: (len(loss.missing), loss.share))


# -- predicted


def hardware_of(setup: Setup, own_figures: bool = True) -> Hardware:
    """The hardware of a setup, with its own figures or as the package's file has it."""
    hardware = load_hardware(setup.hardware)
    if not own_figures:
        return hardware
    figures: dict[str, Any] = dict(setup.figures)
    devices = int(figures.pop("devices_per_node", hardware.devices_per_node))
    flops = figures.pop("flops", hardware.flops)
    return replace(hardware, flops=flops, devices_per_node=devices, node_flops=flops * devices, **figures)


def predict(setup: Setup, hardware: Hardware, space: Variant = AS_PUBLISHED) -> Curves:
    """The search's fastest plan of every layout at every batch of a setup."""
    model = replace(setup.model, vocab=math.ceil(setup.model.vocab / _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE)
    asked = SearchSpace(global_batches=setup.batches, tp=_TP, cp=(1,), ep=(1,))
    if not space.everything:
        asked = replace(
            asked, vpp=(1,), recompute=("none",), sequence_parallel=(False,), distributed_optimizer=(False,)
        )
    options = RunOptions(overlap_grad_reduce=True, overlap_param_gather=True)
    found = search_plans(model, hardware, setup.gpus, asked, options)
    seconds = found.parts.total
    fastest: dict[tuple[Layout, int], tuple[Plan, float]] = {}
    for row in np.argsort(seconds, kind="stable"):
        plan = found.table.plan(int(row))
        fastest.setdefault((_pair(plan.layout), plan.global_batch), (plan, float(seconds[row])))
    speeds = {key: (plan.global_batch / time, math.nan, math.nan) for key, (plan, time) in fastest.items()}
    return _curves(speeds, {key: plan for key, (plan, _) in fastest.items()})


def _pair(layout: Layout) -> Layout:
    """What counts as the layout here: tp, pp, and dp, which follows from them."""
    return Layout(dp=layout.dp, tp=layout.tp, pp=layout.pp)


def _curves(
    speeds: Mapping[tuple[Layout, int], tuple[float, float, float]], plans: Mapping[tuple[Layout, int], Plan]
) -> Curves:
    """Curves of (speed, low, high) by layout and batch."""
    layouts = tuple(sorted({layout for layout, _ in speeds}, key=lambda layout: (layout.tp * layout.pp, layout.tp)))
    batches = tuple(sorted({batch for _, batch in speeds}))
    nothing = (math.nan, math.nan, math.nan)
    cells = np.array([[speeds.get((layout, batch), nothing) for batch in batches] for layout in layouts])
    speed, low, high = (cells.reshape(len(layouts), len(batches), 3)[:, :, part] for part in range(3))
    placed = {(layouts.index(layout), batches.index(batch)): plan for (layout, batch), plan in plans.items()}
    return Curves(batches, layouts, speed, low, high, placed)


# -- measured


def measured(table: ThroughputTable) -> Curves:
    """The fastest measured plan of every layout at every batch: median of its steps, and the range of its visits.

    Batches at which only one layout was measured say nothing about layouts, and are left out.
    """
    visits: dict[Plan, list[Row]] = {}
    for row in table.rows:
        if row.step_times_s:
            visits.setdefault(row.plan, []).append(row)
    fastest: dict[tuple[Layout, int], tuple[float, float, float]] = {}
    plans: dict[tuple[Layout, int], Plan] = {}
    for plan, rows in visits.items():
        key, speeds = (_pair(plan.layout), plan.global_batch), _speeds(rows)
        if key not in fastest or speeds[0] > fastest[key][0]:
            fastest[key], plans[key] = speeds, plan
    compared = {batch for _, batch in fastest if len({layout for layout, other in fastest if other == batch}) > 1}
    return _curves(
        {key: value for key, value in fastest.items() if key[1] in compared},
        {key: value for key, value in plans.items() if key[1] in compared},
    )


def _speeds(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Sequences/s of a plan by the median of all its steps; and of its slowest and fastest visit, if there are two."""
    batch = rows[0].plan.global_batch
    steps = [seconds for row in rows for seconds in row.step_times_s]
    medians = [row.step_time_s for row in rows] if len(rows) > 1 else [math.nan]
    return batch / float(np.median(steps)), batch / max(medians), batch / min(medians)


# -- the setups of arXiv 2604.26687


# The paper's section 6.1 has cards in NVLink pairs, PCIe between pairs, and 350 Gbit/s between nodes. What it leaves
# open is our choice: the PCIe card of NVIDIA's data sheet (756 TFLOP/s, 2 TB/s, an NVLink bridge of 600 GB/s both
# ways), PCIe 5 with 64 GB/s one way, and the 350 Gbit/s as the whole node's, which eight cards share.
_H100_PAIRS = {"flops": 756e12, "memory_bandwidth": 2.0e12, "intra_node_bandwidth": 300e9, "devices_per_node": 2}
_H100_PCIE = {**_H100_PAIRS, "inter_node_bandwidth": 64e9}
_H100_NETWORK = {**_H100_PAIRS, "inter_node_bandwidth": 350e9 / 8 / 8}
# Infinity Fabric of 200 GB/s within a NUMA domain (taken as both ways together) and 25 GB/s between nodes of eight.
_MI210_NETWORK = {"intra_node_bandwidth": 100e9, "inter_node_bandwidth": 25e9 / 8, "devices_per_node": 4}

_SEQ = 2048
_BATCHES = tuple(2**power for power in range(4, 11))  # all runs start at 16; the largest static baseline is 1,024

# Models, devices, sequence length: section 6.1 of arXiv 2604.26687 (v1). Fastest layouts: those of its two CBS
# baselines in table 1, tuned for batch 16 and for large batches (6.1); the one between, of the 3B model: section 6.3.
# Sizes of models: their released configurations.
SETUPS = (
    Setup(
        "Llama 3.2 3B, 8 H100",
        llama(28, 3072, 24, 8, 8192, 128256, _SEQ, tied=True),
        "h100",
        8,
        _BATCHES,
        (Layout(dp=2, pp=4), Layout(dp=4, pp=2), Layout(dp=8)),
        _H100_PCIE,
    ),
    Setup(
        "Llama 2 13B, 16 H100",
        llama(40, 5120, 40, 40, 13824, 32000, _SEQ),
        "h100",
        16,
        _BATCHES,
        (Layout(tp=2, pp=8), Layout(dp=4, pp=4)),
        _H100_NETWORK,
    ),
    Setup(
        "Qwen 2.5 32B, 32 H100",
        llama(64, 5120, 40, 8, 27648, 152064, _SEQ),
        "h100",
        32,
        _BATCHES,
        (Layout(tp=2, pp=16), Layout(dp=2, tp=2, pp=8)),
        _H100_NETWORK,
    ),
    Setup(
        "Llama 2 7B, 32 MI210",
        llama(32, 4096, 32, 32, 11008, 32000, _SEQ),
        "mi210",
        32,
        _BATCHES,
        (Layout(dp=2, tp=4, pp=4), Layout(dp=8, pp=4)),
        _MI210_NETWORK,
    ),
)
