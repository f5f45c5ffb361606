"""What of a job's state is not a tensor of the model: step counts, loss scale, schedule position, random numbers.

Ranks that had no part in the old job are told what they need to go on in the new one, by rank 0, which has a part in
every job.
"""

from __future__ import annotations

import argparse
import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import Adam
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.training.initialize import _set_random_seed

from copus_ext.adapters.agreement import of_first_rank
from copus_ext.adapters.job import Job
from copus_ext.adapters.optimizer_shards import inner_optimizers
from copus_ext.adapters.world import whole_world
from copus_ext.core.planner.betas import steps_of_like_age

_NEVER_STEPPED = -1
_PLAIN = (bool, int, float, str, type(None))
_OWN = frozenset({"rank", "local_rank"})  # of each rank
_SEED_RANGE = 2**31 - 2**20  # upstream adds small numbers per rank, and numpy's seeds end at 2^32


def optimizer_step(job: Job) -> int:
    """Steps that this rank's optimizer has made; -1 when it has no state yet.

    torch keeps the count with each parameter, fused Adam keeps it in the parameter group, others keep none (0).
    """
    counts = [_NEVER_STEPPED]
    for wrapper in inner_optimizers(job.optimizer):
        inner = wrapper.optimizer
        counts += [int(state.get("step", 0)) for state in inner.state.values() if state]
        counts += [int(group["step"]) for group in inner.param_groups if "step" in group]
    return max(counts)


def set_optimizer_step(job: Job, step: int) -> None:
    """Set the count of steps where the job's optimizer keeps one."""
    for wrapper in inner_optimizers(job.optimizer):
        inner = wrapper.optimizer
        for group in inner.param_groups:
            if isinstance(inner, torch.optim.Adam):  # and AdamW
                on_device = group.get("capturable") or group.get("fused")
                for parameter in group["params"]:
                    device = parameter.device if on_device else "cpu"
                    inner.state[parameter]["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
            elif isinstance(inner, Adam):  # the fused one
                group["step"] = step


def recount_steps(job: Job, before: argparse.Namespace) -> None:
    """Count the steps of Adam anew where its beta2 is not what it was under the arguments ``before``.

    Adam takes from the count how much its averages have seen
    (:func:`~copus_ext.core.planner.betas.steps_of_like_age`). For beta1 the same count is right where both betas change
    by one rule.
    """
    old, new = before.adam_beta2, job.args.adam_beta2
    if job.args.optimizer == "adam" and old != new and (steps := optimizer_step(job)) > 0:
        set_optimizer_step(job, steps_of_like_age(steps, old, new))


def tell_where_it_stands(job: Job) -> None:
    """Tell ranks that have no part in ``job`` how far it has come, so that they can go on from there in another one.

    Their ``job.args`` are as rank 0's then, and ``job.scheduler`` is where that one's is. Collective over all
    processes; nothing happens where all of them have a part.
    """
    if job.plan.layout.world_size == whole_world().size():
        return
    plain = {name: value for name, value in vars(job.args).items() if isinstance(value, _PLAIN) and name not in _OWN}
    said, steps = of_first_rank((plain, job.scheduler.num_steps))
    if not job.has_part:
        vars(job.args).update(said)
        job.scheduler.num_steps = steps


def carry_grad_scaler(old: Job, new: Job) -> None:
    """The loss scale and its counters, where there is a loss scale (fp16). Collective over all processes."""
    scalers = [s for o in inner_optimizers(old.optimizer) if (s := getattr(o, "grad_scaler", None))]
    state = copy.deepcopy(scalers[0].state_dict()) if scalers else None
    if old.plan.layout.world_size < new.plan.layout.world_size:
        state = of_first_rank(state)
    for wrapper in inner_optimizers(new.optimizer):
        if state and getattr(wrapper, "grad_scaler", None):
            wrapper.grad_scaler.load_state_dict(copy.deepcopy(state))


def carry_scheduler(old: Job, new: Job) -> None:
    """Put the new job's learning-rate schedule where the old one's is.

    Learning rate, its bounds and weight decay then follow from the new job's own arguments.
    """
    new.scheduler.num_steps = old.scheduler.num_steps
    new.scheduler.step(0)


@dataclass(frozen=True)
class RngState:
    """This rank's random generators. Building a job draws from them: capture before that."""

    places: tuple[int, ...]
    python: Any
    numpy: Any
    cpu: torch.Tensor
    device: torch.Tensor
    trackers: dict[str, Any]

    @classmethod
    def capture(cls) -> RngState:
        """A copy of every generator that training draws from, and of the sizes of the layout that is active."""
        trackers = {name: _copy(state) for name, state in get_cuda_rng_tracker().get_states().items()}
        host = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        return cls(_places(), *host, torch.cuda.get_rng_state(), trackers)

    def restore(self) -> None:
        """Every generator goes on exactly where it was: for going back to the job that was captured."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        torch.cuda.set_rng_state(self.device)
        get_cuda_rng_tracker().set_states({name: _copy(state) for name, state in self.trackers.items()})

    def restore_for(self, job: Job, iteration: int) -> None:
        """Go on in ``job``, whose layout must be active, from step ``iteration``, which all ranks must give alike.

        With the same ranks in the same places every generator goes on exactly where it was. In another layout there is
        no such place: a tensor-parallel rank's stream has no meaning with another number of them. There the generators
        are seeded anew by upstream's rule for that layout, from a seed made of ``--seed``, ``iteration`` and the
        data-parallel rank, so that dropout masks of earlier steps do not come again, and replicas, which upstream
        starts with the same masks, do not share them.
        """
        if _places() == self.places or not job.has_part:
            self.restore()
        else:
            _seed(job.args, iteration)


def _places() -> tuple[int, ...]:
    """Sizes of the active layout: they decide which rank stands where. None on a rank that it leaves idle."""
    if not parallel_state.model_parallel_is_initialized():
        return ()
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )


def _copy(state: Any) -> Any:
    """Of a tensor, or of a generator where CUDA graphs need one."""
    return state.clone() if isinstance(state, torch.Tensor) else state.clone_state()


def _seed(args: argparse.Namespace, iteration: int) -> None:
    # Multiplicative hashing (Knuth, TAOCP 6.4): consecutive iterations end far apart, while ranks' seeds stay together.
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    mixed = (args.seed + iteration * 2_654_435_761 + replica * 1_640_531_527) % _SEED_RANGE or 1
    _set_random_seed(
        mixed,
        args.data_parallel_random_init,
        args.te_rng_tracker,
        args.inference_rng_tracker,
        use_cudagraphable_rng=args.cuda_graph_impl != "none",
    )
