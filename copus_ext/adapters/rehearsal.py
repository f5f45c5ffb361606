"""A step's forward and backward passes, run by every rank for itself, to see whether there is memory for them.

Where memory runs out on one rank in a real step, the others wait for it in a collective, and nothing wakes them. In a
rehearsal no rank waits for another: communication is replaced (:mod:`copus_ext.adapters.alone`), tokens are made up,
and when all have come to their end or run out, they tell each other. Nothing of it stays.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import traceback
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import random as checkpointing
from megatron.core.transformer.moe import moe_logging
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper, mtp_on_this_rank
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, unwrap_model
from megatron.training.utils import is_first_or_last_pipeline_stage

from copus_ext.adapters.agreement import first_said, largest
from copus_ext.adapters.alone import alone
from copus_ext.adapters.arguments import first_line
from copus_ext.adapters.carry import RngState
from copus_ext.adapters.job import Job
from copus_ext.adapters.measure import forget_peak_memory, peak_memory
from copus_ext.adapters.replaced import replaced
from copus_ext.adapters.world import whole_world
from copus_ext.core.plan import Plan

_MOST = 0.95  # of a device's memory that passes may take
_WELL, _FAILED, _RAN_OUT = range(3)  # how it went on a rank; the worst is how it went
_OF_MEMORY = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")  # in lower case
_NOT_REHEARSED = (  # flags under which ranks talk beside torch.distributed, or a pass leaves more behind than is undone
    "tp_comm_overlap",
    "use_megatron_fsdp",
    "use_torch_fsdp2",
    "reuse_grad_buf_for_mxfp8_param_ag",
    "overlap_moe_expert_parallel_comm",
    "delay_wgrad_compute",
    "defer_embedding_wgrad_compute",
    "fine_grained_activation_offloading",
    "cpu_offloading",
    "hybrid_context_parallel",
    "moe_enable_deepep",
    "moe_enable_routing_replay",
    "moe_paged_stash",
    "mtp_standalone",
    "qk_clip",
    "log_max_attention_logit",
)
_FOR_THE_TIME = {  # in the model's configuration: what training has there, and what needs other ranks
    "grad_scale_func": None,
    "no_sync_func": None,
    "grad_sync_func": None,
    "param_sync_func": None,
    "finalize_model_grads_func": None,
    "timers": None,  # one that is running when memory runs out could not be started again
    "variable_seq_lengths": False,  # or stages would tell each other the length, which is that of the arguments
}


class RehearsalFailed(RuntimeError):
    """A step could not be rehearsed on some rank; the message names it."""


class RanOut(RehearsalFailed):
    """It could not because memory ran out."""


def rehearse(job: Job, plan: Plan | None = None) -> int | None:
    """See whether every rank has the memory for forward and backward passes of a step. Collective over all processes.

    Weights, optimizer state, buffers, random generators, counters and data are as before when it ends, in whatever
    way; gradients are 0. What comes behind the passes (reductions, the optimizer's step) and what communication takes
    by itself are not tried.

    Args:
        job: in charge, and between two steps.
        plan: another one of the job's layout, whose batches to try; the job's own where it is not given.

    Returns:
        Bytes of a device taken at most, on the fullest rank; ``None`` where devices do not tell, and under flags that
        do not let a rank make a step by itself, where nothing was tried.

    Raises:
        RanOut: memory ran out on some rank.
        RehearsalFailed: something else failed on some rank. Both are raised on every rank, with the same words.
    """
    if not can_be_rehearsed(job.args):
        return None
    how, said = _WELL, None
    try:
        if job.has_part:
            _passes(job, plan or job.plan)
            _see_room_is_left()
    except Exception as error:  # whatever it is: the others wait to hear of it
        how = _RAN_OUT if _is_of_memory(error) else _FAILED
        said = f"rank {whole_world().rank()}: {first_line(error)}"
        forget_frames(error)
    peak = peak_memory()
    if said:  # activations are held by what was under way, some of it in circles
        gc.collect()
    _empty_cache()  # communication takes its memory beside the allocator, which could not give any back then
    worst = largest(how)
    if worst != _WELL:
        raise (RanOut if worst == _RAN_OUT else RehearsalFailed)(first_said(said))
    return None if peak is None else largest(peak)


def _see_room_is_left() -> None:
    """Of a device's memory, for what passes do not take: communication, and the optimizer's step.

    Raises:
        torch.OutOfMemoryError: there is too little.
    """
    peak = peak_memory()
    if peak is not None and peak > _MOST * torch.cuda.mem_get_info()[1]:
        raise torch.OutOfMemoryError(f"more than {100 * _MOST:.0f} % of the device were taken, and too little is left")


def can_be_rehearsed(args: argparse.Namespace) -> bool:
    """Whether these arguments let a rank make a step by itself that leaves nothing behind."""
    if args.fp8 and args.fp8_recipe == "delayed":  # scales follow from the largest values that were seen
        return False
    if args.num_experts and args.moe_token_dispatcher_type == "flex":
        return False
    return not any(getattr(args, name, False) for name in _NOT_REHEARSED)


def in_flight(plan: Plan, group: int | None = None) -> int:
    """Micro-batches after which a step has needed all the memory that it ever needs.

    As many as the first pipeline stage has in flight at once, and where stages have several chunks, as many more as
    upstream's schedule wants at least.

    Args:
        plan: says how many a step has.
        group: how many a chunk is given one after the other (``--microbatch-group-size-per-virtual-pipeline-stage``);
            as many as there are stages where it is not given.
    """
    pp, chunks = plan.layout.pp, plan.layout.vpp
    most = pp
    if chunks > 1:
        group = group or pp
        passes = 2 * (pp - 1) + (chunks - 1) * group + 1  # forward, on the first stage, before one goes backward
        most = math.ceil(passes / chunks / group) * group
    return min(plan.num_microbatches, most)


def _passes(job: Job, plan: Plan) -> None:
    """Forward and backward passes on this rank, alone, as upstream's schedule has them."""
    with _undisturbed(job), alone():
        get_forward_backward_func()(
            forward_step_func=partial(_forward_step, job, plan),
            data_iterator=[None] * len(job.model),
            model=job.model,
            num_microbatches=in_flight(plan, job.config.microbatch_group_size_per_vp_stage),
            seq_length=job.args.seq_length,
            micro_batch_size=plan.micro_batch,
            decoder_seq_length=job.args.decoder_seq_length,
            forward_only=False,
        )


@contextlib.contextmanager
def _undisturbed(job: Job) -> Iterator[None]:
    """Take back what passes leave behind. Memory that is cached stays so, but not what was cached before."""
    random = RngState.capture()
    buffers = [(b, b.detach().to("cpu", copy=True)) for chunk in job.model for b in unwrap_model(chunk).buffers()]
    _clear(job)
    _empty_cache()
    forget_peak_memory()
    with contextlib.ExitStack() as inside:
        for chunk in job.model:
            chunk.train()
            inside.enter_context(chunk.no_sync())  # gradients are added up, and not taken for ready to be reduced
        inside.enter_context(replaced(job.config, **_FOR_THE_TIME))
        # Weights that are still to be gathered stay so.
        inside.enter_context(replaced(_ParamAndGradBucketGroup, start_param_sync=_nothing, finish_param_sync=_nothing))
        inside.enter_context(replaced(moe_logging, _MOE_METRICS_TRACKER=moe_logging.MoEMetricsTracker()))
        inside.enter_context(replaced(MTPLossLoggingHelper, tracker={}))
        inside.enter_context(replaced(checkpointing, IS_CHECKPOINTING=False))  # upstream leaves it on when one fails
        try:
            yield
        finally:
            _clear(job)
            for buffer, kept in buffers:
                buffer.copy_(kept)
            random.restore()


def _clear(job: Job) -> None:
    """As upstream begins a step; and no stage keeps what it was given last."""
    for chunk in job.model:
        chunk.zero_grad_buffer()
        get_attr_wrapped_model(chunk, "set_input_tensor")([None])
    job.optimizer.zero_grad()


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _forward_step(job: Job, plan: Plan, _: Any, model: torch.nn.Module) -> tuple[torch.Tensor, partial[Any]]:
    """One micro-batch through a chunk, in place of the function that training gives to upstream's schedules."""
    batch = _made_up(job, plan, model)
    tokens, positions, mask = batch["tokens"], batch["position_ids"], batch["attention_mask"]
    output = model(tokens, positions, mask, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(_loss, batch["loss_mask"])


def _made_up(job: Job, plan: Plan, model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Random tokens in the shapes of a micro-batch, and ``None`` for what is not read on this stage.

    ``tokens``, ``labels``, ``position_ids`` (int64), ``loss_mask`` (float32): [micro batch, sequence / cp];
    ``attention_mask`` (bool), where data loaders make it: [micro batch, 1, sequence / cp, sequence].
    """
    args, stage = job.args, get_attr_wrapped_model(model, "vp_stage")
    shape, device = (plan.micro_batch, args.seq_length), torch.cuda.current_device()
    random = partial(torch.randint, args.padded_vocab_size, shape, device=device)
    mtp = args.mtp_num_layers is not None and mtp_on_this_rank(
        job.config.pipeline_model_parallel_layout, args.mtp_num_layers, ignore_virtual=False, vp_stage=stage
    )
    batch: dict[str, torch.Tensor | None] = dict.fromkeys(
        ("tokens", "labels", "position_ids", "loss_mask", "attention_mask")
    )
    if not (is_first_or_last_pipeline_stage(stage) or mtp):
        return batch
    batch["tokens"], batch["labels"] = random(), random()
    batch["position_ids"] = torch.arange(args.seq_length, device=device).expand(shape).contiguous()
    batch["loss_mask"] = torch.ones(shape, device=device)
    if args.create_attention_mask_in_dataloader:
        square = (plan.micro_batch, 1, args.seq_length, args.seq_length)
        batch["attention_mask"] = torch.ones(square, dtype=torch.bool, device=device).triu_(1)
    split: dict[str, torch.Tensor | None] = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=job.groups.cp)
    return split


def _loss(loss_mask: Any, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """As in training, without its checks: ``output`` [micro batch, sequence / cp] to sum, tokens, nothing to log."""
    mask = loss_mask.view(-1).float()
    return torch.sum(output.view(-1).float() * mask), mask.sum().detach().to(torch.int), {}


def _is_of_memory(error: BaseException) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error).lower() for words in _OF_MEMORY)


def forget_frames(error: BaseException | None) -> None:
    """What was half done when it failed lives on in the frames of the traceback, where memory is wanted back."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
