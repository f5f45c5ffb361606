"""What measuring the noise scale costs: seconds, bytes read, memory; per estimator and layout, in one process group."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from copus_ext.adapters.job import Job
from copus_ext.adapters.noise.gradient_noise import GradientNoise
from copus_ext.adapters.noise.norm_layers import NormLayers
from copus_ext.adapters.noise.taps import Tap
from copus_ext.bench.workbench import Workbench, memory_of_state, state_tensors

_RESAMPLES = 2000


@dataclass(frozen=True)
class Cost:
    """Of one estimator under one plan. Per cent of a step's time or of a rank's weights, gradients, optimizer state.

    ``own_pct`` is the collector's own time: on a CPU of processor time, which others on the same cores don't change;
    ``wait_ms`` is what its reductions waited for other ranks. ``overhead_pct`` is the difference of the medians of
    steps with and without it, taken by turns, with its 95 % interval: on shared cores mostly noise.
    """

    plan: str
    estimator: str
    step_ms: float
    own_pct: float
    own_ms: float
    wait_ms: float
    overhead_pct: float
    overhead_low_pct: float
    overhead_high_pct: float
    bytes_read_per_step: int
    extra_bytes: int
    extra_memory_pct: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class _Stopwatch:
    """Seconds inside wrapped methods. On an accelerator it waits for their kernels: rather more than they cost."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.wall_s = 0.0
        self._depth = 0

    def timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, with its time added; what it calls itself is not counted twice."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return method(*args, **kwargs)
            self._depth = 1
            _wait_for_kernels()
            start, busy = time.perf_counter(), _busy_seconds()
            try:
                return method(*args, **kwargs)
            finally:
                _wait_for_kernels()
                self.wall_s += time.perf_counter() - start
                self.busy_s += _busy_seconds() - busy
                self._depth = 0

        return wrapper


def measure_cost(bench: Workbench, job: Job, estimator: str, pairs: int) -> Cost:
    """Collective over all ranks; every rank gets the mean over ranks."""
    batch = job.plan.global_batch
    samples = [list(range(number * batch, (number + 1) * batch)) for number in range(2 * pairs + 8)]
    bench.step(job, samples[-1])
    own_s, step_busy_s, wait_s, read, extra = _account(bench, job, estimator, samples[-8:])
    off, on = _by_turns(bench, job, estimator, samples[: 2 * pairs])
    difference, low, high = _difference_of_medians(on, off)
    step_s = float(np.median(off))
    return Cost(
        plan=str(job.plan),
        estimator=GradientNoise.of_job(job, estimator).grouping.estimator,
        step_ms=1e3 * step_s,
        own_pct=100 * own_s / step_busy_s,
        own_ms=1e3 * own_s,
        wait_ms=1e3 * wait_s,
        overhead_pct=100 * difference / step_s,
        overhead_low_pct=100 * low / step_s,
        overhead_high_pct=100 * high / step_s,
        bytes_read_per_step=read,
        extra_bytes=extra,
        extra_memory_pct=100 * extra / memory_of_state(job),
    )


def _by_turns(
    bench: Workbench, job: Job, estimator: str, samples: list[list[int]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Seconds of steps without and with the collector, taken by turns; which comes first alternates."""
    noise = GradientNoise.of_job(job, estimator)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(0, len(samples), 2):
        for turn in (0, 1):
            measured = (number // 2 + turn) % 2 == 0
            with noise if measured else contextlib.nullcontext():
                dist.barrier()
                start = time.perf_counter()
                norm = bench.step(job, samples[number + turn]).grad_norm
                if measured:
                    noise.step(norm)
                _wait_for_kernels()
                seconds[measured].append(time.perf_counter() - start)
    noise.flush()
    return _mean_over_ranks(seconds[False]), _mean_over_ranks(seconds[True])


def _account(
    bench: Workbench, job: Job, estimator: str, samples: list[list[int]]
) -> tuple[float, float, float, int, int]:
    """Of a step: busy seconds of the collector and in all, seconds it waits, gradient bytes read; bytes kept."""
    watch, held = _Stopwatch(), 0
    reads: list[int] = []
    with _watched(watch):
        noise = GradientNoise.of_job(job, estimator)
        _count_reads(noise, reads)
        with noise:
            dist.barrier()
            start = _busy_seconds()
            for batch in samples:
                noise.step(bench.step(job, batch).grad_norm)
                held = max(held, extra_bytes(noise, job))
            noise.flush()
            busy_s = _busy_seconds() - start
    of_step = _mean_over_ranks([watch.busy_s, busy_s, watch.wall_s - watch.busy_s]) / len(samples)
    largest = torch.tensor([sum(reads) // len(samples), held], device=torch.cuda.current_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(of_step[0]), float(of_step[1]), float(of_step[2]), int(largest[0]), int(largest[1])


@contextlib.contextmanager
def _watched(watch: _Stopwatch) -> Iterator[None]:
    """What training calls of a collector runs under the clock; not a norm that is taken in place of upstream's own."""
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (GradientNoise, "step"),
            (GradientNoise, "flush"),
            (GradientNoise, "_begin"),
            (Tap, "accumulated"),
            (Tap, "about_to_reduce"),
            (NormLayers, "take"),
        ):
            stack.enter_context(mock.patch.object(owner, name, watch.timed(getattr(owner, name))))
        yield


def _count_reads(noise: GradientNoise, reads: list[int]) -> None:
    """Have the bytes of every gradient that is read put into ``reads``."""
    collector, params = noise.collector, noise.collector.params
    read = collector.read

    def counted(index: int, number: int) -> None:
        reads.append(params[index].main_grad.nbytes)
        read(index, number)

    collector.read = counted  # type: ignore[method-assign]


def extra_bytes(noise: GradientNoise, job: Job) -> int:
    """Bytes of the tensors that a collector keeps for itself, found by following its references."""
    known = {t.untyped_storage().data_ptr() for t in state_tensors(job)}
    found: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[Any] = [noise.collector]
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, torch.nn.Module | torch.nn.Parameter | type):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
        elif type(value).__module__.startswith("copus_ext.adapters.noise"):
            stack += vars(value).values()
    return sum(size for pointer, size in found.items() if pointer not in known)


def _mean_over_ranks(seconds: list[float]) -> Any:
    values = torch.tensor(seconds, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(values)
    return (values / dist.get_world_size()).cpu().numpy()


def _difference_of_medians(on: Any, off: Any) -> tuple[float, float, float]:
    """median(on) - median(off), with its 95 % bootstrap interval."""
    random = np.random.default_rng(0)
    picks = random.integers(0, len(on), (2, _RESAMPLES, len(on)))
    differences = np.median(on[picks[0]], axis=1) - np.median(off[picks[1]], axis=1)
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(np.median(on) - np.median(off)), float(low), float(high)


def _busy_seconds() -> float:
    """A clock of work done: the processor's on a CPU, whose cores others use as well; the wall's on an accelerator."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def _wait_for_kernels() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
