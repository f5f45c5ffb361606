"""Jobs in several layouts of one process, and real steps of theirs on real text, without ``train()`` around them."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunDataIterator, get_rerun_state_machine
from megatron.training import training
from megatron.training.arguments import parse_args
from megatron.training.global_vars import set_global_variables

from copus_ext.adapters.arguments import arguments_for
from copus_ext.adapters.job import Job, build_job
from copus_ext.adapters.layouts import LayoutGroups
from copus_ext.adapters.optimizer_shards import inner_optimizers
from copus_ext.core.plan import Plan
from copus_ext.run import gpt
from copus_ext.run.start import set_cpu_flags
from copus_ext.run.switch import put_in_charge

_TEXT_BYTES = 32 * 2**20
_VOCABULARY = 256


class Text:
    """The source text of this Python's standard library as bytes, cut into sequences by number."""

    def __init__(self, seq_length: int) -> None:
        self._seq_length = seq_length
        folder = Path(sysconfig.get_path("stdlib"))
        parts, size = [], 0
        for path in sorted(folder.rglob("*.py")):
            if "site-packages" in path.parts or size > _TEXT_BYTES:
                continue
            parts.append(path.read_bytes())
            size += len(parts[-1])
        self._bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def micro_batch(self, samples: Sequence[int]) -> dict[str, torch.Tensor]:
        """Sequences by number, the same on every rank: ``tokens``, ``labels``, ... of shape [samples, sequence]."""
        rows = np.stack([self._sequence(number) for number in samples]).astype(np.int64)
        tokens = torch.from_numpy(rows)
        count = len(samples)
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(count, self._seq_length),
            "position_ids": torch.arange(self._seq_length).expand(count, -1).contiguous(),
        }

    def _sequence(self, number: int) -> Any:
        # Multiplicative hashing (Knuth, TAOCP 6.4) spreads neighbouring numbers over the text.
        start = number * 2_654_435_761 % (len(self._bytes) - self._seq_length - 1)
        return self._bytes[start : start + self._seq_length + 1]


class Step(NamedTuple):
    """``loss`` is known on the last pipeline stage; ``grad_norm`` everywhere."""

    loss: float | None
    grad_norm: float | None


def take_step(job: Job, micro_batches: Sequence[dict[str, torch.Tensor]]) -> Step:
    """One step of ``job``, which must be in charge, on this rank's micro-batches: upstream's ``train_step``."""
    _set_functions(job)
    losses, _, _, _, _, grad_norm, *_ = training.train_step(
        gpt.forward_step,
        _iterators(job, micro_batches),
        job.model,
        job.optimizer,
        job.scheduler,
        job.config,
        get_forward_backward_func(),
        iteration=job.args.iteration,
    )
    return Step(next((float(loss) for loss in losses.values()), None), grad_norm)


def accumulate(job: Job, micro_batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """Gradients of a step, accumulated and reduced, and none taken with them."""
    _set_functions(job)
    iterators = _iterators(job, micro_batches)
    while get_rerun_state_machine().should_run_forward_backward(iterators):
        for chunk in job.model:
            chunk.zero_grad_buffer()
        job.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=gpt.forward_step,
            data_iterator=iterators,
            model=job.model,
            num_microbatches=job.plan.num_microbatches,
            seq_length=job.args.seq_length,
            micro_batch_size=job.plan.micro_batch,
            forward_only=False,
        )


def _set_functions(job: Job) -> None:
    """What ``train()`` puts into the configuration."""
    config = job.config
    config.grad_scale_func = job.optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if job.args.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in job.model]
        config.no_sync_func = config.no_sync_func[0] if len(job.model) == 1 else config.no_sync_func


def _iterators(job: Job, micro_batches: Sequence[dict[str, torch.Tensor]]) -> Any:
    """One for each model chunk, as upstream wants them."""
    iterators = [RerunDataIterator(iter(micro_batches)) for _ in job.model]
    return iterators if len(iterators) > 1 else iterators[0]


class Workbench:
    """Upstream, brought up once for several plans. Making one and its jobs is collective over all ranks."""

    def __init__(self, flags: Sequence[str], first: Plan) -> None:
        """``flags``: upstream's, of model and training."""
        sys.argv[1:] = [
            *flags,
            "--tokenizer-type",
            "NullTokenizer",
            "--vocab-size",
            str(_VOCABULARY - 1),
            "--mock-data",
        ]
        self.raw = parse_args()
        set_cpu_flags(self.raw)
        self.text = Text(self.raw.seq_length)
        self._layouts = LayoutGroups()
        args = arguments_for(self.raw, first)
        self.raw.padded_vocab_size = args.padded_vocab_size
        set_global_variables(args)
        training.initialize_megatron()
        self._layouts.adopt(first.layout)

    def job(self, plan: Plan) -> Job:
        """A job with initial weights, in charge."""
        args = arguments_for(self.raw, plan)
        job = build_job(plan, args, self._layouts.activate(plan.layout, args))
        put_in_charge(job, self._layouts)
        return job

    def step(self, job: Job, samples: Sequence[int]) -> Step:
        """One step of training on a global batch of these sequences."""
        return take_step(job, self._micro_batches(job, samples))

    def gradient(self, job: Job, samples: Sequence[int]) -> float:
        """Gradients of a global batch, accumulated and reduced, and their norm. Weights and optimizer stay."""
        accumulate(job, self._micro_batches(job, samples))
        job.optimizer.prepare_grads()
        return float(job.optimizer.get_grad_norm())

    def _micro_batches(self, job: Job, samples: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """This rank's, dealt round the data-parallel ranks as upstream's sampler deals them."""
        size, dp = job.plan.micro_batch, job.groups.dp
        starts = range(dp.rank() * size, len(samples), size * dp.size())
        return [self.text.micro_batch(samples[start : start + size]) for start in starts]


def state_tensors(job: Job) -> list[torch.Tensor]:
    """This rank's weights, gradients and optimizer state."""
    tensors: list[torch.Tensor] = [p for chunk in job.model for p in chunk.module.parameters()]
    tensors += [b.grad_data for chunk in job.model for b in chunk.buffers + chunk.expert_parallel_buffers]
    for one in inner_optimizers(job.optimizer):
        for param, state in one.optimizer.state.items():
            tensors += [param, *(value for value in state.values() if isinstance(value, torch.Tensor))]
    return tensors


def memory_of_state(job: Job) -> int:
    """Bytes of :func:`state_tensors`, each storage once."""
    storages = [t.untyped_storage() for t in state_tensors(job)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
