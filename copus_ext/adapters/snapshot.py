"""A job as it stands between two steps, copied into host memory, and put back bit for bit.

A switch moves state from one job to another; a snapshot takes one job back in time, on the layout that it has.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from copus_ext.adapters.carry import RngState
from copus_ext.adapters.job import Job
from copus_ext.adapters.optimizer_shards import inner_optimizers
from copus_ext.core.plan import Plan

_State = dict[str, Any]


@dataclass(frozen=True)
class _OptimizerCopy:
    """What one of upstream's optimizers keeps: per group all but the parameters, per parameter its state."""

    groups: list[_State]
    state: list[tuple[torch.Tensor, _State]]
    scaler: _State | None


@dataclass(frozen=True)
class Snapshot:
    """Everything that a job carries from step to step on this rank.

    That is: parameters, main parameters and buffers; the optimizer's state and what stands in its groups (learning
    rates and their bounds); loss scale, place in the learning-rate schedule, random generators, plan, and arguments,
    which count samples, iterations and operations. The data are found again by the samples consumed. Left out are
    Transformer Engine's scaling histories (fp8) and the largest losses seen (``--check-for-spiky-loss``).

    A snapshot takes as much host memory as the rank's weights and optimizer state take on the device.
    """

    plan: Plan
    args: argparse.Namespace
    values: _State
    tensors: list[tuple[torch.Tensor, torch.Tensor]]
    optimizers: list[_OptimizerCopy]
    scheduler: _State
    rng: RngState

    @classmethod
    def take(cls, job: Job) -> Snapshot:
        """Copy ``job`` between two steps; it is not changed.

        With ``--overlap-param-gather`` parameters are whole after ``train()`` has ended, and before it begins.
        """
        return cls(
            plan=job.plan,
            args=job.args,
            values=dict(vars(job.args)),
            tensors=[(tensor, _copied(tensor)) for tensor in _tensors(job)],
            optimizers=[_copy_of(wrapper) for wrapper in inner_optimizers(job.optimizer)],
            scheduler={name: value for name, value in vars(job.scheduler).items() if name != "optimizer"},
            rng=RngState.capture(),
        )

    def restore(self, job: Job) -> None:
        """Take ``job``, of which this was taken and whose layout has not changed since, back between two steps.

        Upstream's globals have to be pointed to it afterwards (``put_in_charge``).
        """
        vars(self.args).clear()
        vars(self.args).update(self.values)
        job.plan, job.args = self.plan, self.args
        for tensor, kept in self.tensors:
            tensor.detach().copy_(kept)
        for wrapper, kept_optimizer in zip(inner_optimizers(job.optimizer), self.optimizers, strict=True):
            _restore_optimizer(wrapper, kept_optimizer)
        vars(job.scheduler).update(self.scheduler)
        self.rng.restore()


def _tensors(job: Job) -> Iterator[torch.Tensor]:
    """Parameters, buffers and what the optimizers keep as parameters, each place in memory once."""
    seen: set[tuple[int, int]] = set()
    for tensor in _all_tensors(job):
        place = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and place not in seen:
            seen.add(place)
            yield tensor


def _all_tensors(job: Job) -> Iterator[torch.Tensor]:
    for chunk in map(unwrap_model, job.model):  # upstream's wrapper has another kind of buffers
        yield from chunk.parameters()
        yield from chunk.buffers()
    for wrapper in inner_optimizers(job.optimizer):
        for group in wrapper.optimizer.param_groups:
            yield from group["params"]


def _copy_of(wrapper: Any) -> _OptimizerCopy:
    inner, scaler = wrapper.optimizer, getattr(wrapper, "grad_scaler", None)
    return _OptimizerCopy(
        groups=[{k: _copied(v) for k, v in group.items() if k != "params"} for group in inner.param_groups],
        state=[(p, {name: _copied(v) for name, v in kept.items()}) for p, kept in inner.state.items()],
        scaler=copy.deepcopy(scaler.state_dict()) if scaler else None,
    )


def _restore_optimizer(wrapper: Any, kept: _OptimizerCopy) -> None:
    inner = wrapper.optimizer
    for group, values in zip(inner.param_groups, kept.groups, strict=True):
        _restore_values(group, values)
    then = {id(parameter) for parameter, _ in kept.state}
    for parameter in [p for p in inner.state if id(p) not in then]:  # made by the first step, which came later
        del inner.state[parameter]
    for parameter, values in kept.state:
        _restore_values(inner.state[parameter], values)
    if kept.scaler is not None:
        wrapper.grad_scaler.load_state_dict(copy.deepcopy(kept.scaler))


def _restore_values(now: _State, then: _State) -> None:
    """Tensors in place, since upstream may hold views of them; the rest by assignment."""
    for name, value in then.items():
        if isinstance(value, torch.Tensor):
            now[name].detach().copy_(value)
        else:
            now[name] = _copied(value)


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else copy.deepcopy(value)
