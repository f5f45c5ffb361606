"""What published training runs say about the step time of another one: the closed form, its constants fitted, and how
far runs on the same GPU, with the same software or by the same people were off it.

ln(measured / closed form) of all points is one Gaussian process: deviations that points share with their GPU, their
software and their source, each of the last two also by component; among points of the same software two that change
slowly with plan and model, one of them anew for every GPU and precision; and one of each way to divide a model. How
large the last three are, and the noise, differs between publishers. A new point is predicted by conditioning on all
points that the fit has seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.cost.constants import FITTED, Constants, constants_from_json
from copus_ext.core.cost.error_kernel import Array, Features, explain, likeness
from copus_ext.core.cost.hardware import Hardware
from copus_ext.core.cost.hardware_file import file_of_gpu, load_hardware
from copus_ext.core.cost.memory import peak_bytes
from copus_ext.core.cost.plan_table import PlanTable
from copus_ext.core.cost.points import Point
from copus_ext.core.cost.step_time import step_times
from copus_ext.core.plan import Plan

POINTS = FITTED.with_name("points.csv")
_MICRO_BATCHES = (1, 2, 4)  # what a source that does not tell may have used
_MOST_CHUNKS = 12
Z90 = 1.6449  # quantile of a 90 % interval's upper end


@dataclass(frozen=True)
class PublishedKernel:
    """Standard deviations of ln(measured / closed form) by what points share; ``lengths`` as in :class:`ErrorKernel`,
    then doublings of the hidden size and of the sequence length.

    ``plan_scale`` and ``noise_scale``, by publisher: some programs are far from the closed form, some figures rounder
    than others. 1 for a publisher that nothing is known of.
    """

    gpu_sd: float = 0.05
    stack_sd: float = 0.06
    source_sd: float = 0.04
    stack_part_sd: float = 0.07
    source_part_sd: float = 0.04
    fp8_sd: float = 0.1  # of 8-bit products
    plan_sd: float = 0.12  # of plans of one software, wherever they run
    machine_plan_sd: float = 0.05  # of those on one GPU at one precision, on top
    layout_sd: float = 0.05  # of one way to divide one model, on top
    noise_sd: float = 0.02
    lengths: tuple[float, ...] = (1.0, 3.5, 1.5, 4.0, 12.0, 2.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0)
    plan_scale: dict[str, float] = field(default_factory=dict)
    noise_scale: dict[str, float] = field(default_factory=dict)

    def noise(self, points: Points) -> Array:
        """[n] standard deviations of the noise of points that are not odd."""
        return self.noise_sd * _by_publisher(self.noise_scale, points.labels("publisher"))


def _by_publisher(scales: dict[str, float], publishers: NDArray[np.str_]) -> Array:
    return np.array([scales.get(publisher, 1.0) for publisher in publishers.tolist()])


@dataclass(frozen=True)
class Expected:
    """The closed form at n points. Where a point leaves sizes open, the mean over what they may have been."""

    log_s: Array  # [n] logarithm of the step time in seconds
    shares: Array  # [n, parts]
    coordinates: Array  # [n, 12] of plan and model
    spread: Array  # [n] variance of log_s over what is open

    def take(self, rows: NDArray[np.int64]) -> Expected:
        """Some of the points."""
        return Expected(*(values[rows] for values in vars(self).values()))


def open_plans(point: Point) -> list[Plan]:
    """The plans that a point may have been measured with: one, where it tells all sizes."""
    stages, layers = point.layout.pp, point.model.layers
    chunks = [v for v in range(1, _MOST_CHUNKS + 1) if v == 1 or layers % (stages * v) == 0]
    plans = []
    for micro_batch in [point.micro_batch] if point.micro_batch else _MICRO_BATCHES:
        for vpp in [point.vpp] if point.vpp else chunks:
            if point.global_batch % (micro_batch * point.layout.dp):
                continue
            plan = point.plan(micro_batch, vpp)
            if point.vpp or vpp == 1 or plan.num_microbatches % stages == 0:
                plans.append(plan)
    return plans


def usable(points: Iterable[Point | None]) -> list[Point]:
    """Those that were measured and can be computed."""
    return [point for point in points if point is not None and point.step_time_s and open_plans(point)]


def hardware_of(point: Point) -> Hardware:
    """The machine that a point was measured on."""
    hardware = load_hardware(file_of_gpu(point.gpu))
    nic = point.inter_node_bandwidth
    return replace(hardware, inter_node_bandwidth=nic) if nic else hardware


class Points:
    """Points with what the constants do not change; those that share a model and a machine are computed at once."""

    def __init__(self, points: Sequence[Point]) -> None:
        """Points without any plan that fits their sizes are refused: see :func:`open_plans`."""
        self.points = tuple(points)
        self._groups: dict[tuple[Any, ...], list[int]] = {}
        for number, point in enumerate(points):
            key = (point.model, point.gpu, point.options, point.inter_node_bandwidth)
            self._groups.setdefault(key, []).append(number)
        self._plans = [open_plans(point) for point in points]
        self._tables = [self._table(rows) for rows in self._groups.values()]
        self._hardware = [hardware_of(points[rows[0]]) for rows in self._groups.values()]

    def _table(self, rows: list[int]) -> tuple[PlanTable, NDArray[np.int64]]:
        firsts = np.cumsum([0] + [len(self._plans[row]) for row in rows[:-1]])
        return PlanTable.of([plan for row in rows for plan in self._plans[row]]), firsts

    @cached_property
    def log_measured(self) -> Array:
        """[n] logarithms of the measured step times; not a number where there is none."""
        return np.log([point.step_time_s or np.nan for point in self.points])

    def labels(self, name: str) -> NDArray[np.str_]:
        """[n] ``gpu``, ``stack``, ``source``, ``publisher`` or ``division`` of each point."""
        return np.array([str(getattr(point, name)) for point in self.points])

    @cached_property
    def fp8(self) -> Array:
        """[n] 1 for points with 8-bit products."""
        return np.array([float(point.options.fp8) for point in self.points])

    def expected(self, constants: Constants) -> Expected:
        """The closed form with these constants."""
        found: Expected | None = None
        for rows, plans, hardware in zip(self._groups.values(), self._tables, self._hardware, strict=True):
            one = _expected(self.points[rows[0]], *plans, constants.of(hardware))
            if found is None:
                found = Expected(*(np.zeros((len(self.points), *np.shape(x)[1:])) for x in vars(one).values()))
            for name, values in vars(one).items():
                getattr(found, name)[rows] = values
        if found is None:
            raise ValueError("there are no points")
        return found

    def memory(self) -> Array:
        """[n] bytes on the fullest rank as computed; where sizes are open, the most of what they may have been."""
        found = np.zeros(len(self.points))
        for rows, (table, firsts) in zip(self._groups.values(), self._tables, strict=True):
            point = self.points[rows[0]]
            found[rows] = np.maximum.reduceat(peak_bytes(table, point.model, point.options), firsts)
        return found


def _expected(point: Point, table: PlanTable, firsts: NDArray[np.int64], hardware: Hardware) -> Expected:
    """Of the points whose plans are ``table``; those of each begin at one of ``firsts``."""
    model, options = point.model, point.options
    parts = step_times(table, model, hardware, options)
    features = Features.of(table, parts)
    log_s = np.log(parts.total)
    mean = _mean(log_s, firsts)
    of_model = np.tile(np.log2([model.hidden, model.seq]), (mean.size, 1))
    return Expected(
        log_s=mean,
        shares=_mean(features.shares, firsts),
        coordinates=np.hstack([_mean(features.coordinates, firsts), of_model]),
        spread=np.maximum(_mean(log_s**2, firsts) - mean**2, 0.0),
    )


def _mean(values: Array, firsts: NDArray[np.int64]) -> Array:
    """Means of runs of rows, each beginning where ``firsts`` says."""
    counts = np.diff(np.append(firsts, len(values)))
    return np.asarray((np.add.reduceat(values, firsts, axis=0).T / counts).T)


@dataclass(frozen=True)
class Prediction:
    """Of n points: median, 90 % interval and memory. The interval is one of the step time as it would be measured."""

    step_time_s: Array
    low_s: Array
    high_s: Array
    memory_bytes: Array


@dataclass(frozen=True)
class PublishedFit:
    """Constants and kernel, and how much each point that they were fitted to counts: 1, less for outliers.

    ``memory_bias``: by software, ln(measured / computed) memory; what its reports count beside tensors.
    """

    constants: Constants
    kernel: PublishedKernel
    weights: tuple[float, ...]
    memory_bias: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values; :func:`read_fit` is the inverse."""
        return asdict(self)

    def predict(self, known: Points, new: Points) -> Prediction:
        """What ``known`` points, those of the fit in its order, say about ``new`` ones."""
        old, fresh = known.expected(self.constants), new.expected(self.constants)
        weights = np.array(self.weights)
        noise = np.diag(self.kernel.noise(known) ** 2 / weights + old.spread)
        mean, variance = condition(
            covariance(self.kernel, known, old, known, old) + noise,
            covariance(self.kernel, known, old, new, fresh),
            np.diag(covariance(self.kernel, new, fresh, new, fresh)),
            known.log_measured - old.log_s,
        )
        log_s = fresh.log_s + mean
        sd = np.sqrt(variance + fresh.spread + noise_variance(self.kernel, weights, new))
        bias = np.array([self.memory_bias.get(stack, 0.0) for stack in new.labels("stack")])
        return Prediction(
            np.exp(log_s), np.exp(log_s - Z90 * sd), np.exp(log_s + Z90 * sd), new.memory() * np.exp(bias)
        )


@dataclass(frozen=True)
class Pairs:
    """What n points have in common with m others: [n, m], 1 where both are of the same, 0 elsewhere."""

    gpu: Array
    stack: Array
    source: Array
    machine: Array  # software, GPU and precision
    division: Array  # software, model and layout but for replicas
    fp8: Array  # 1 where both have 8-bit products
    publishers: tuple[NDArray[np.str_], NDArray[np.str_]]  # [n], [m]

    @classmethod
    def of(cls, left: Points, right: Points) -> Pairs:
        """Of two sets of points."""
        gpu, stack, source, division = (_same(left, right, name) for name in ("gpu", "stack", "source", "division"))
        return cls(
            gpu=gpu,
            stack=stack,
            source=source,
            machine=stack * gpu * (left.fp8[:, None] == right.fp8[None, :]),
            division=stack * division,
            fp8=np.outer(left.fp8, right.fp8),
            publishers=(left.labels("publisher"), right.labels("publisher")),
        )

    def take(self, rows: NDArray[np.int64]) -> Pairs:
        """Some of the points, where both sets are the same one."""
        shared = {name.name: getattr(self, name.name)[np.ix_(rows, rows)] for name in fields(self)[:-1]}
        return replace(self, **shared, publishers=(self.publishers[0][rows], self.publishers[1][rows]))


def _same(left: Points, right: Points, name: str) -> Array:
    labels = np.concatenate([left.labels(name), right.labels(name)])
    numbers = np.unique(labels, return_inverse=True)[1]  # quicker to compare than long names
    return np.asarray(1.0 * np.equal.outer(numbers[: len(left.points)], numbers[len(left.points) :]))


def covariance_terms(kernel: PublishedKernel, pairs: Pairs, a: Expected, b: Expected) -> dict[str, Array]:
    """[n, m] each: what the deviations that a standard deviation of ``kernel`` is of add to :func:`covariance`."""
    parts = a.shares @ b.shares.T
    matmul = np.outer(a.shares[:, 0], b.shares[:, 0])
    left, right = (_by_publisher(kernel.plan_scale, publishers) for publishers in pairs.publishers)
    scale = np.outer(left, right)
    alike = scale * likeness(a.coordinates, b.coordinates, kernel.lengths)
    return {
        "gpu_sd": kernel.gpu_sd**2 * pairs.gpu,
        "stack_sd": kernel.stack_sd**2 * pairs.stack,
        "source_sd": kernel.source_sd**2 * pairs.source,
        "stack_part_sd": kernel.stack_part_sd**2 * pairs.stack * parts,
        "source_part_sd": kernel.source_part_sd**2 * pairs.source * parts,
        "fp8_sd": kernel.fp8_sd**2 * pairs.fp8 * matmul,
        "plan_sd": kernel.plan_sd**2 * pairs.stack * alike,
        "machine_plan_sd": kernel.machine_plan_sd**2 * pairs.machine * alike,
        "layout_sd": kernel.layout_sd**2 * pairs.division * scale,
    }


def covariance(kernel: PublishedKernel, left: Points, a: Expected, right: Points, b: Expected) -> Array:
    """[n, m] covariance of ln(measured / closed form) between n points and m others, without their noise."""
    return np.asarray(sum(covariance_terms(kernel, Pairs.of(left, right), a, b).values()))


def noise_variance(kernel: PublishedKernel, weights: Array, new: Points) -> Array:
    """[n] of ln of times measured about what is expected, the odd ones included that ``weights`` are small for."""
    return np.asarray(kernel.noise(new) ** 2 * np.mean(1.0 / weights))


def condition(within: Array, across: Array, prior: Array, residual: Array) -> tuple[Array, Array]:
    """Mean [m] and variance [m] of a normal, given n others: ``within`` [n, n], ``across`` [n, m], ``prior`` [m]."""
    mean, explained = explain(within, across, residual)
    return mean, np.maximum(prior - np.sum(explained**2, axis=0), 0.0)


def read_fit(path: Path = FITTED) -> PublishedFit:
    """The fit that the package ships, or another one."""
    values = json.loads(path.read_text())
    kernel = PublishedKernel(**{**values["kernel"], "lengths": tuple(values["kernel"]["lengths"])})
    constants = constants_from_json(values["constants"])
    return PublishedFit(constants, kernel, tuple(values["weights"]), values["memory_bias"])
