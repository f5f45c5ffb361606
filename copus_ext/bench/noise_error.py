"""How right the noise scale of a step is: against gradients of single sequences, and in steps to a 20 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from copus_ext.adapters.job import Job
from copus_ext.adapters.noise.adam import AdamFactors
from copus_ext.adapters.noise.gradient_noise import GradientNoise
from copus_ext.adapters.noise.norm_layers import is_norm
from copus_ext.adapters.noise.parameters import counted_parameters
from copus_ext.bench.workbench import Workbench
from copus_ext.core.noise.correction import RunningCorrection
from copus_ext.core.noise.noise_scale import StepEstimate
from copus_ext.core.noise.student import NORMAL_QUANTILE_975

_FULL_EVERY = 16  # as a run measures norm layers

# Name -> estimator and the least number of groups of a step.
VARIANTS = {
    "dp-groups": ("dp-groups", 4),
    "slices": ("slices", 16),
    "sketch": ("sketch", 4),
    "layernorm": ("layernorm", 4),
    "adam": ("adam", 4),
}


class Truth(NamedTuple):
    """|G|^2 and tr(Sigma) of a pool of sequences, unbiased for the text it was drawn from."""

    N: float
    S: float

    @property
    def noise_scale(self) -> float:
        """In sequences."""
        return self.S / self.N


@dataclass(frozen=True)
class Accuracy:
    """Of one estimator at one checkpoint.

    ``noise_scale`` is of averages over ``steps`` steps, ``truth`` of single gradients in the same norm; ``reads`` is
    ``noise_scale`` over that of the plain gradient. ``standard_error`` of ``rel_error`` is what chance would do.
    """

    groups: int
    steps: int
    noise_scale: float
    truth: float
    rel_error: float
    standard_error: float
    reads: float
    steps_to_20pct: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def brute_force(bench: Workbench, job: Job, pool: Sequence[int]) -> dict[str, Truth]:
    """N and S from the gradient of every single sequence: plain, of norm layers, times Adam's factors. Collective."""
    model: Any = job.model[0].module
    params = list(model.parameters())
    factors = _factors(job)
    norms = {id(p) for module in model.modules() if is_norm(module) for p in module.parameters(recurse=False)}
    scales = {
        "plain": torch.ones_like(factors),
        "layernorm": torch.cat([torch.full((p.numel(),), float(id(p) in norms), device=p.device) for p in params]),
        "adam": factors,
    }
    total, squares = torch.zeros_like(factors, dtype=torch.float64), dict.fromkeys(scales, 0.0)
    for number in pool[dist.get_rank() :: dist.get_world_size()]:
        batch = {name: part.to(factors.device) for name, part in bench.text.micro_batch([number]).items()}
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(losses.float().mean(), params)])
        total += gradient
        for name, scale in scales.items():
            squares[name] += float((gradient * scale).double().square().sum())
    return {name: _truth(total, squares[name], scale, len(pool)) for name, scale in scales.items()}


def _truth(total: torch.Tensor, square_sum: float, scale: torch.Tensor, count: int) -> Truth:
    """Products of different sequences are unbiased for |G|^2; what is left of a single square is tr(Sigma)."""
    whole = total.clone()
    dist.all_reduce(whole)
    squares = torch.tensor(square_sum, dtype=torch.float64, device=total.device)
    dist.all_reduce(squares)
    of_sum = float((whole * scale.double()).square().sum())
    signal = (of_sum - float(squares)) / (count * (count - 1))
    return Truth(signal, float(squares) / count - signal)


def _factors(job: Job) -> torch.Tensor:
    adam = AdamFactors(counted_parameters(job.model, job.groups), job.optimizer, job.groups)
    adam.refresh(0)
    return torch.cat([factor.reshape(-1) for factor in adam.factors])


def measure_accuracy(bench: Workbench, job: Job, pool: Sequence[int], shuffles: int) -> dict[str, Accuracy]:
    """Every estimator on the same steps, drawn from the pool without its weights moving. Collective."""
    truths = brute_force(bench, job, pool)
    steps = _estimates(bench, job, pool, shuffles)
    plain = truths["plain"].noise_scale
    groups = {name: noise.grouping.dense_groups for name, noise in _collectors(job).items()}
    found = {
        name: _accuracy(np.array(values)[:, :2], truths.get(name, truths["plain"]), groups[name], plain)
        for name, values in steps.items()
    }
    return found | {"layernorm, corrected": _corrected(steps, groups["layernorm"], plain, job)}


def _collectors(job: Job) -> dict[str, GradientNoise]:
    return {
        name: GradientNoise.of_job(job, estimator, min_groups=least) for name, (estimator, least) in VARIANTS.items()
    }


def _estimates(bench: Workbench, job: Job, pool: Sequence[int], shuffles: int) -> dict[str, list[StepEstimate]]:
    """[steps] by variant: all collectors at once, on partitions of the pool into global batches."""
    collectors = _collectors(job)
    found: dict[str, list[StepEstimate]] = {name: [] for name in collectors}
    for collector in collectors.values():
        collector.attach()
    random, batch = np.random.default_rng(0), job.plan.global_batch
    for _ in range(shuffles):
        order = random.permutation(pool)
        for start in range(0, len(order) - batch + 1, batch):
            norm = bench.gradient(job, [int(number) for number in order[start : start + batch]])
            for name, collector in collectors.items():
                found[name] += collector.step(norm)
    for name, collector in reversed(collectors.items()):
        found[name] += collector.flush()
        collector.detach()
    return found


def _accuracy(steps: np.ndarray[Any, Any], truth: Truth, groups: int, plain: float) -> Accuracy:
    """[steps, 2] N and S against the truth; a ratio's error is that of S - r N over N (delta method)."""
    mean_n, mean_s = steps.mean(axis=0)
    ratio = mean_s / mean_n
    scatter = float(np.std(steps[:, 1] - truth.noise_scale * steps[:, 0], ddof=1)) / truth.S
    return Accuracy(
        groups=groups,
        steps=len(steps),
        noise_scale=float(ratio),
        truth=truth.noise_scale,
        rel_error=abs(float(ratio) / truth.noise_scale - 1.0),
        standard_error=scatter / math.sqrt(len(steps)),
        reads=float(ratio) / plain,
        steps_to_20pct=(NORMAL_QUANTILE_975 * scatter / 0.2) ** 2,
    )


def _corrected(steps: dict[str, list[StepEstimate]], groups: int, plain: float, job: Job) -> Accuracy:
    """Norm layers on all steps, corrected by data-parallel groups on every 16th, as a run does it."""
    tokens, batch = float(job.plan.global_batch * job.args.seq_length), float(job.plan.global_batch)
    correction = RunningCorrection.start(half_life_tokens=1e6 * tokens)
    for number, (cheap, full) in enumerate(zip(steps["layernorm"], steps["dp-groups"], strict=True)):
        correction = correction.update(full if number % _FULL_EVERY == 0 else None, cheap, tokens, batch)
    estimate, count = correction.estimate(), len(steps["layernorm"])
    half_width = (estimate.high - estimate.low) / 2 / plain
    return Accuracy(
        groups=groups,
        steps=count,
        noise_scale=estimate.value,
        truth=plain,
        rel_error=abs(estimate.value / plain - 1.0),
        standard_error=half_width / NORMAL_QUANTILE_975,
        reads=estimate.value / plain,
        steps_to_20pct=count * (half_width / 0.2) ** 2,
    )
