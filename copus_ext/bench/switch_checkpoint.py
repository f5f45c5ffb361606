"""The other way to another layout: upstream's distributed checkpoint, written by the old job and read by a new one."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.training import training
from megatron.training.checkpointing import save_checkpoint

from copus_ext.adapters.arguments import arguments_for
from copus_ext.adapters.job import Job
from copus_ext.adapters.optimizer_shards import inner_optimizers
from copus_ext.bench.switch_bench import SwitchBench
from copus_ext.bench.switch_ours import together
from copus_ext.core.plan import Plan

_MEMORY = Path("/dev/shm")
HELP_GIVEN = (
    "megatron-core 0.19.2 can't load the state of torch's own optimizers, which are all there are without Transformer "
    "Engine and Apex: neither Adam's under a distributed optimizer (distrib_optimizer.py, lines 839 and 1223, and the "
    "one 'step' that line 1028 gives to all parameters) nor SGD's momentum (optimizer.py, line 1362, calls None). The "
    "benchmark makes the empty state that is loaded into, leaves 'step' out where it is no part of what was saved, and "
    "gives every parameter its own."
)


@contextlib.contextmanager
def folder_in_memory() -> Iterator[Path]:
    """The same on every rank, and gone afterwards. Collective; a folder on disk where the system has none."""
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        made = [tempfile.mkdtemp(dir=_MEMORY if _MEMORY.is_dir() else None)]
    dist.broadcast_object_list(made)
    try:
        yield Path(made[0])
    finally:
        shutil.rmtree(made[0], ignore_errors=True)


def save(job: Job, folder: Path) -> float:
    """Seconds that upstream takes to save ``job`` into ``folder``. Collective over all ranks."""
    args, kept = job.args, job.args.save
    args.save = str(folder)
    start = together()
    save_checkpoint(
        args.iteration,
        job.model,
        job.optimizer,
        job.scheduler,
        args.num_floating_point_operations_so_far,
        {},
        preprocess_common_state_dict_fn=training.preprocess_common_state_dict,
    )
    seconds = together() - start
    args.save = kept
    return seconds


class Through(NamedTuple):
    """Seconds to save, and to build and load; the loaded job's :func:`fingerprint`."""

    save_s: float
    load_s: float
    fingerprint: list[int]


def through_memory(bench: SwitchBench, job: Job, plan: Plan, folder: Path) -> Through:
    """Save ``job`` to a folder in memory, and build a job of ``plan`` that loads it. ``job`` stays, and in charge."""
    save_s = save(job, folder)
    start = together()
    with _torch_optimizers_load(), _weights_not_drawn():
        loaded = bench.build(plan, arguments_for(bench.raw, plan, load=str(folder)))
    _part_steps(loaded)
    load_s = together() - start
    found = fingerprint(loaded)
    loaded.release()
    bench.take_charge(job)
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()
    return Through(save_s, load_s, found)


def fingerprint(job: Job) -> list[int]:
    """Of every tensor of weights and of optimizer state on this rank, in an order that the layout decides."""
    tensors = [p for chunk in job.model for p in chunk.module.parameters()]
    for wrapper in inner_optimizers(job.optimizer):
        for group in wrapper.optimizer.param_groups:
            for param in group["params"]:
                state = wrapper.optimizer.state[param]
                tensors += [param, *(state[name] for name in sorted(state))]
    return [_crc(tensor) for tensor in tensors]


def _crc(tensor: torch.Tensor) -> int:
    copied = tensor.detach().to("cpu", copy=True)  # torch lets no tensor change its size that numpy has seen
    return zlib.crc32(memoryview(copied.contiguous().view(-1).view(torch.uint8).numpy()))


@contextlib.contextmanager
def _torch_optimizers_load() -> Iterator[None]:
    """Let upstream load what it saved of torch's optimizers: see ``HELP_GIVEN``."""
    with contextlib.ExitStack() as stack:
        for owner, name, around in (
            (DistributedOptimizer, "state_dict", _with_state),
            (DistributedOptimizer, "_set_main_param_and_optimizer_states", _without_step),
            (FP32Optimizer, "sharded_state_dict", _with_momentum),
        ):
            stack.enter_context(mock.patch.object(owner, name, around(getattr(owner, name))))
        yield


@contextlib.contextmanager
def _weights_not_drawn() -> Iterator[None]:
    """Build models without initial weights, which the checkpoint replaces: ours are not drawn either."""
    with mock.patch.object(torch.nn.init, "normal_", lambda tensor, *_, **__: tensor):
        yield


def _with_state(state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """distrib_optimizer.py:839 asserts that there is exactly one step count, and before a step there is none."""

    def wrapper(self: Any) -> Any:
        if not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
        return state_dict(self)

    return wrapper


def _without_step(assign: Callable[..., Any]) -> Callable[..., Any]:
    """distrib_optimizer.py:1223 looks for every tensor of the state in what was loaded; ``step`` came another way."""

    def wrapper(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        assign(self, model_param, {"step": None, **tensors})

    return wrapper


def _with_momentum(sharded_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """optimizer.py:1362 calls the function that makes the state, which upstream leaves out for SGD."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.init_state_fn is None:
            self.init_state_fn = _momentum_of_zeros
        return sharded_state_dict(self, *args, **kwargs)

    return wrapper


def _momentum_of_zeros(optimizer: torch.optim.Optimizer, _: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param].setdefault("momentum_buffer", torch.zeros_like(param))


def _part_steps(job: Job) -> None:
    """distrib_optimizer.py:1028 lets all parameters share one tensor, to which each of them then adds its step."""
    for wrapper in inner_optimizers(job.optimizer):
        for state in wrapper.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
