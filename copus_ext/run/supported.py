"""Which of upstream's flags this entry point does not serve: refused at once, in one line, not found out in mid-run."""

from __future__ import annotations

import argparse

from copus_ext.adapters.job_state import uncovered
from copus_ext.core.errors import UserError
from megatron.patches import local_context_parallel

_NOT_SERVED = {  # jobs that take other batches or losses than GPT pre-training, by argument name
    "sft": "--sft",
    "fim_data": "--fim-data",
    "perform_rl_step": "--perform-rl-step",
    "vision_pretraining": "--vision-pretraining",
    "hybrid_layer_pattern": "--hybrid-layer-pattern",
    "hybrid_context_parallel": "--hybrid-context-parallel",
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking",
    "phase_transition_iterations": "--phase-transition-iterations",
    "multiple_validation_sets": "--multiple-validation-sets",
}
_NOT_WITH_COPUS = {  # what ties a job to the layout it was built with, or its samples to an order of its own
    "use_torch_fsdp2": "--use-torch-fsdp2",
    "use_megatron_fsdp": "--use-megatron-fsdp",
    "decoder_first_pipeline_num_layers": "--decoder-first-pipeline-num-layers",
    "decoder_last_pipeline_num_layers": "--decoder-last-pipeline-num-layers",
    "pipeline_model_parallel_layout": "--pipeline-model-parallel-layout",
    "skip_train": "--skip-train",
    "tensor_parallel_num_weight_shards": "--tensor-parallel-num-weight-shards",
    "moe_use_upcycling": "--moe-use-upcycling",
    "decrease_batch_size_if_needed": "--decrease-batch-size-if-needed",
    "iterations_to_skip": "--iterations-to-skip",
    "optimizer_cuda_graph": "--optimizer-cuda-graph",
    "delay_wgrad_compute": "--delay-wgrad-compute",  # gradients that autograd's hooks never see
    "overlap_moe_expert_parallel_comm": "--overlap-moe-expert-parallel-comm",
}


def why_not_under(args: argparse.Namespace) -> str | None:
    """What is not known to upstream's validation and keeps a run from going on under a plan; ``None`` where nothing is.

    Args:
        args: validated, of the plan.
    """
    return _window_over_context(args) or (uncovered(args) if _may_move(args) else None)


def _may_move(args: argparse.Namespace) -> bool:
    return not args.no_copus and args.copus_policy.partition(":")[0] != "static"


def _window_over_context(args: argparse.Namespace) -> str | None:
    return local_context_parallel.why_refused(args) if args.transformer_impl == "local" else None


def check_supported(raw: argparse.Namespace) -> None:
    """Refuse flags that this program does not serve, or that COPUS can't be combined with.

    Args:
        raw: upstream's arguments before validation, with the copus group.

    Raises:
        UserError: the first of them, with what to do.
    """
    for name, flag in _NOT_SERVED.items():
        if getattr(raw, name, None):
            raise UserError(f"{flag} is not served by this program; use Megatron-LM's own entry point for it")
    if raw.num_experts and raw.add_bias_linear and raw.transformer_impl == "local":
        raise UserError("--num-experts with biases fails in Megatron's local layers; add --disable-bias-linear")
    if reason := _window_over_context(raw):
        raise UserError(f"{reason}; leave one of them out")
    if raw.no_copus:
        return
    for name, flag in _NOT_WITH_COPUS.items():
        if getattr(raw, name, None):
            raise UserError(f"{flag} can't be combined with COPUS yet; leave it out, or add --no-copus")
    if raw.dataloader_type not in (None, "single"):
        raise UserError(
            f"--dataloader-type {raw.dataloader_type} deals samples by layout; use single, or add --no-copus"
        )
    if raw.cuda_graph_impl != "none":
        raise UserError(f"--cuda-graph-impl {raw.cuda_graph_impl} can't be combined with COPUS yet; leave it out")
    if _may_move(raw) and (reason := uncovered(raw)):
        raise UserError(f"--copus-policy {raw.copus_policy}: {reason}; use --copus-policy static, or add --no-copus")
