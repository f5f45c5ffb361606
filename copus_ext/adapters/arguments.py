"""A plan as flags of Megatron, and upstream's own validation as the first judge of it."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER
from megatron.core.transformer.enums import AttnBackend
from megatron.training import arguments as upstream

from copus_ext.adapters.replaced import replaced
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import CUDA_CONTEXT_BYTES, RunOptions
from copus_ext.core.errors import UserError
from copus_ext.core.plan import Layout, Plan


def plan_overrides(raw: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """Attributes of upstream's *unvalidated* arguments ``raw`` that put ``plan`` into force."""
    layout = plan.layout
    recompute: dict[str, Any] = {"recompute_activations": False}
    if layout.recompute != (raw.recompute_granularity or "none"):
        recompute |= {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
        if layout.recompute != "none":
            recompute["recompute_granularity"] = layout.recompute
        if layout.recompute == "full":  # every layer, as --recompute-method uniform --recompute-num-layers 1
            recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    return {
        "world_size": layout.world_size,  # a job may be on part of the world
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "num_virtual_stages_per_pipeline_rank": layout.vpp if layout.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": None,  # the other way to say the same
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "sequence_parallel": layout.sequence_parallel,
        "use_distributed_optimizer": layout.distributed_optimizer,
        "micro_batch_size": plan.micro_batch,
        "global_batch_size": plan.global_batch,
        "rampup_batch_size": None,  # every step of a plan has its batch
        "step_batch_size_schedule": None,
        **recompute,
    }


def plan_of(raw: argparse.Namespace) -> Plan:
    """The plan that a command line describes, judged by upstream's validation.

    Args:
        raw: upstream's arguments before validation; not changed.

    Raises:
        UserError: flags that do not go together, with what upstream or the plan itself says of them.
    """
    _check_flags(raw)
    args = _copied(raw)
    try:
        with _unannounced():
            upstream.validate_args(args)
        return _plan_of_validated(args, bool(raw.sequence_parallel))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"the flags do not go together: {first_line(error)}") from error


def _check_flags(raw: argparse.Namespace) -> None:
    """What upstream finds out later, and then says nothing of, or says of other flags."""
    if raw.micro_batch_size is None:
        raise UserError("--micro-batch-size is missing; say how many sequences a rank takes at a time")
    model_ranks = raw.tensor_model_parallel_size * raw.pipeline_model_parallel_size * raw.context_parallel_size
    per_step = raw.micro_batch_size * max(1, raw.world_size // model_ranks)
    if raw.save and not raw.save_interval:
        raise UserError(f"--save {raw.save} needs --save-interval; say after how many steps to save")
    if raw.train_samples and raw.train_samples < (raw.global_batch_size or per_step):
        raise UserError(f"--train-samples {raw.train_samples} is less than one global batch; train on more")
    if raw.global_batch_size and raw.global_batch_size % per_step:
        raise UserError(
            f"--global-batch-size {raw.global_batch_size} is not divisible by --micro-batch-size "
            f"{raw.micro_batch_size} x {per_step // raw.micro_batch_size} data-parallel ranks; "
            f"give a multiple of {per_step}"
        )


def first_line(error: BaseException) -> str:
    """What an error says, in one line; for one that says nothing, the line of source that failed."""
    said = str(error).strip().splitlines()
    if said:
        return said[0]
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {frames[-1].line}" if frames else type(error).__name__


def _plan_of_validated(args: argparse.Namespace, sequence_parallel: bool) -> Plan:
    layout = Layout(
        dp=args.data_parallel_size,
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        vpp=args.virtual_pipeline_model_parallel_size or 1,
        cp=args.context_parallel_size,
        ep=args.expert_model_parallel_size,
        sequence_parallel=sequence_parallel,
        # Validation puts the second in place of the first for Muon and its like.
        distributed_optimizer=args.use_distributed_optimizer or args.use_layer_wise_distributed_optimizer,
        recompute=args.recompute_granularity or "none",
    )
    return Plan(layout, args.micro_batch_size, args.global_batch_size)


def arguments_for(raw: argparse.Namespace, plan: Plan, *, announce: bool = False, **more: Any) -> argparse.Namespace:
    """Upstream's complete, validated arguments for ``plan``.

    Args:
        raw: as ``parse_args`` gave them, before validation; not changed.
        plan: what to put into force.
        announce: let upstream print the list of all arguments, as it does when a run starts.
        more: further attributes to set before validation.

    Raises:
        AssertionError, ValueError, RuntimeError: upstream's validation refuses the plan.
    """
    args = _copied(raw)
    for name, value in {**plan_overrides(raw, plan), **more}.items():
        setattr(args, name, value)
    # Evaluation must read the same samples whatever the plan: its batch is the run's, only its micro-batch follows.
    if args.eval_global_batch_size:
        wanted = args.eval_micro_batch_size or plan.micro_batch
        args.eval_micro_batch_size = _eval_micro_batch(plan.layout, args.eval_global_batch_size, wanted)
    with contextlib.nullcontext() if announce else _unannounced():
        upstream.validate_args(args)
    return args


def _copied(raw: argparse.Namespace) -> argparse.Namespace:
    """A deep copy. Nearly all of the 800 arguments are plain values, which ``copy.deepcopy`` is slow to find out."""
    plain = (str, int, float, type(None))
    values = {name: v if isinstance(v, plain) else copy.deepcopy(v) for name, v in vars(raw).items()}
    return argparse.Namespace(**values)


@contextlib.contextmanager
def _unannounced() -> Iterator[None]:
    """Without upstream's list of all arguments, which takes it longer to lay out than to validate them."""
    with contextlib.redirect_stdout(io.StringIO()), replaced(upstream, _print_args=lambda *_: None):
        yield


def _eval_micro_batch(layout: Layout, global_batch: int, wanted: int) -> int:
    """The largest micro-batch up to ``wanted`` with which ``layout`` can evaluate on ``global_batch`` sequences.

    Raises:
        ValueError: there is none.
    """
    per_rank, uneven = divmod(global_batch, layout.dp)
    together = layout.pp if layout.vpp > 1 else 1  # interleaved schedules take micro-batches in multiples of the stages
    fitting = [m for m in range(1, wanted + 1) if per_rank % m == 0 and per_rank // m % together == 0]
    if uneven or not fitting:
        raise ValueError(f"--eval-global-batch-size {global_batch} can't be shared out under {layout}")
    return fitting[-1]


def model_shape(args: argparse.Namespace) -> ModelShape:
    """The model's shape from validated arguments (vocabulary padded)."""
    return ModelShape(
        layers=args.num_layers,
        hidden=args.hidden_size,
        heads=args.num_attention_heads,
        kv_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        ffn=args.ffn_hidden_size,
        vocab=args.padded_vocab_size,
        seq=args.seq_length,
        gated=bool(args.swiglu),
        tied=not args.untie_embeddings_and_output_weights,
        experts=args.num_experts or 0,
        experts_per_token=args.moe_router_topk if args.num_experts else 1,
        moe_ffn=(args.moe_ffn_hidden_size or args.ffn_hidden_size) if args.num_experts else 0,
        flash_attention=args.transformer_impl == "transformer_engine" and args.attention_backend != AttnBackend.unfused,
        param_bytes=2 if args.bf16 or args.fp16 else 4,
    )


def run_options(raw: argparse.Namespace) -> RunOptions:
    """What of the way a job is run its step time and memory depend on, from arguments as they were given.

    Not from validated ones: upstream's validation turns off what the plan of the moment has no use for.
    """
    return RunOptions(
        overlap_grad_reduce=raw.overlap_grad_reduce,
        overlap_param_gather=raw.overlap_param_gather,
        overlap_p2p=raw.overlap_p2p_comm,
        tp_comm_overlap=raw.tp_comm_overlap,
        gradient_bytes=2 if raw.grad_reduce_in_bf16 else 4,
        dropout=max(raw.hidden_dropout, raw.attention_dropout) > 0,
        fp8=raw.fp8 is not None,
        context_bytes=CUDA_CONTEXT_BYTES if torch.cuda.is_available() else 0.0,
        fused_accumulation=raw.gradient_accumulation_fusion,
        fused_adam=not USING_PYTORCH_OPTIMIZER,
    )
