"""Square norms of the gradients of independent groups of sequences, read while Megatron accumulates and reduces them.

A group is what one data-parallel rank accumulates in a step; where there are fewer than four such ranks, the
accumulation window of each is cut into equal slices. Gradients are read just before their reduction starts
(``start_grad_sync`` of a bucket group, which serves overlapped and plain reduction, 1F1B and interleaved schedules), so
never after clipping. The square norm of the mean gradient needs no pass of ours: it is the gradient norm that upstream
computes for clipping.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

from copus_ext.adapters.job import Job
from copus_ext.core.grouping import slices_per_rank
from copus_ext.core.noise_scale import StepEstimate, step_estimate

OWN, DUPLICATE, SUM_OVER_TP, MEAN_OVER_TP, TIED = "own", "duplicate", "sum over tp", "mean over tp", "tied"


class GradientNoise:
    """Reads a job's gradients between :meth:`attach` and :meth:`detach`; :meth:`collect` gives a step's N and S."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._slices = slices_per_rank(job.plan)
        self._window = job.plan.num_microbatches // self._slices  # micro-batches in a slice
        self._classes = {
            param: _reduction_class(name, param, job)
            for chunk in job.model
            for name, param in chunk.module.named_parameters()
            if param.requires_grad
        }
        self._device = next(iter(self._classes)).device
        self._square_sum = self._zero()
        self._partial: dict[str, dict[int, list[torch.Tensor]]] = {}  # by kind and slice
        self._seen: dict[torch.nn.Parameter, int] = {}  # micro-batches accumulated in this step
        self._slices_read: dict[torch.nn.Parameter, int] = {}
        self._previous: dict[Any, torch.Tensor] = {}
        self._loss_scale: float | None = None  # of the step under way; None until something of it was read
        self._undo: list[Callable[[], None]] = []

    def _zero(self) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._device)

    def attach(self) -> GradientNoise:
        """Start reading. The job must not have a step under way."""
        self._wrap_zeroing(self._job.model[0])
        for chunk in self._job.model:
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                self._wrap_grad_sync(group)
            if self._slices > 1:
                self._hook_accumulation(chunk)
        return self

    def detach(self) -> None:
        """Stop reading and leave the job as it was."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def collect(self, grad_norm: float | None) -> StepEstimate:
        """N and S of the step that has just been taken. Collective over all ranks: one all-reduce of a scalar.

        Args:
            grad_norm: upstream's norm of the averaged gradient before clipping; ``None`` where the step was skipped.

        Returns:
            Estimates for mean loss per token and per sequence; not finite where a gradient was not.
        """
        scale = self._gradient_scale()
        local = self._square_sum + self._partial_squares()
        dist.all_reduce(local)
        self._reset()
        groups = self._job.plan.layout.dp * self._slices
        mean_square = float(local) * (self._slices * scale) ** 2 / groups
        batch = self._job.plan.global_batch
        norm = float("nan") if grad_norm is None else grad_norm
        return step_estimate([mean_square] * groups, [batch / groups] * groups, norm**2)

    # -- reading

    def _wrap_zeroing(self, chunk: Any) -> None:
        """Begin anew with every forward-backward pass: upstream's rerun state machine may do a step's a second time."""
        zero_grad_buffer = chunk.zero_grad_buffer

        def reset_then_zero() -> None:
            self._reset()
            zero_grad_buffer()

        chunk.zero_grad_buffer = reset_then_zero
        self._undo.append(partial(delattr, chunk, "zero_grad_buffer"))

    def _wrap_grad_sync(self, group: Any) -> None:
        start_grad_sync = group.start_grad_sync

        def read_then_start(*args: Any, **kwargs: Any) -> Any:
            already_started = group.is_first_batch and group.grad_reduce_handle is not None
            if not already_started:
                for bucket in group.buckets:
                    for param in bucket.params_list:
                        self._read(param)
            return start_grad_sync(*args, **kwargs)

        group.start_grad_sync = read_then_start
        self._undo.append(partial(delattr, group, "start_grad_sync"))

    def _hook_accumulation(self, chunk: Any) -> None:
        """Read each parameter at the end of every slice but the last, which ``start_grad_sync`` reads."""
        params = [param for param in chunk.module.parameters() if param.requires_grad]
        for param, accumulator in zip(params, chunk.grad_accs, strict=True):

            def count(*_: Any, param: Any = param) -> None:
                self._seen[param] = seen = self._seen.get(param, 0) + 1
                if seen % self._window == 0 and seen < self._window * self._slices:
                    self._read(param)
                    if param not in self._previous:
                        self._previous[param] = torch.empty_like(param.main_grad)
                    self._previous[param].copy_(param.main_grad)

            # Registered after DDP's own hook, which has added this micro-batch to main_grad when ours runs.
            self._undo.append(accumulator.register_hook(count).remove)

    def _read(self, param: Any) -> None:
        """Take in what ``param`` accumulated since the last reading."""
        if self._loss_scale is None:  # now, since the optimizer may change it before the step is collected
            self._loss_scale = float(self._job.optimizer.get_loss_scale()) if self._job.args.fp16 else 1.0
        kind = self._classes[param]
        number = self._slices_read.get(param, 0)
        self._slices_read[param] = number + 1
        if kind == DUPLICATE:
            return
        gradient = param.main_grad - self._previous[param] if number else param.main_grad
        flat = gradient.detach().reshape(-1)
        if kind == OWN:
            self._square_sum += torch.dot(flat, flat) if flat.dtype == torch.float32 else flat.float().square().sum()
        else:
            self._partial.setdefault(kind, {}).setdefault(number, []).append(flat.float().clone())

    # -- reducing

    def _partial_squares(self) -> torch.Tensor:
        """Squares of gradients that lie in parts on several ranks: summed there first, then counted on one rank."""
        total = self._zero()
        groups = self._job.groups
        for kind, group in ((SUM_OVER_TP, groups.tp), (MEAN_OVER_TP, groups.tp), (TIED, groups.embd)):
            slices = self._partial.get(kind)
            if not slices:
                continue
            flat = torch.cat([part for number in sorted(slices) for part in slices[number]])
            dist.all_reduce(flat, group=group)
            if kind == MEAN_OVER_TP:
                flat /= group.size()
            if dist.get_rank(group) == 0:
                total += torch.dot(flat, flat)
        return total

    def _gradient_scale(self) -> float:
        """What turns an accumulated gradient into that of the mean loss: loss scale and per-token normalisation."""
        scale = 1.0 / (self._loss_scale or 1.0)
        if self._job.config.calculate_per_token_loss:
            # Sums over tokens: a rank's mean is over the tokens it saw, all of which count in pre-training.
            plan = self._job.plan
            scale *= plan.layout.dp / (plan.global_batch * self._job.args.seq_length)
        return scale

    def _reset(self) -> None:
        self._loss_scale = None
        self._square_sum = self._zero()
        for state in (self._partial, self._seen, self._slices_read):
            state.clear()


def _reduction_class(name: str, param: torch.nn.Parameter, job: Job) -> str:
    """How ``finalize_model_grads`` will treat this gradient, and so how it has to be counted."""
    config, groups = job.config, job.groups
    if getattr(param, "shared_embedding", False) and groups.embd is not None and groups.embd.size() > 1:
        return TIED  # the first and the last stage each hold a part
    if groups.tp.size() > 1:
        if getattr(param, "average_gradients_across_tp_domain", False):
            return MEAN_OVER_TP
        norm_of_qk = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        if norm_of_qk or (config.sequence_parallel and getattr(param, "sequence_parallel", False)):
            return SUM_OVER_TP
    return OWN if param_is_not_tensor_parallel_duplicate(param, groups.tp) else DUPLICATE
