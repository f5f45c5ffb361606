"""A plain run: upstream's own ``pretrain()``, with its gradient noise scale where that is asked for."""

from __future__ import annotations

import argparse
import contextlib

from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import validate_args
from megatron.training.global_vars import set_global_variables

from copus_ext.core.errors import UserError
from copus_ext.core.noise.grouping import StepShape, why_unmeasurable_in_a_run
from copus_ext.core.plan import Plan
from copus_ext.run import gpt
from copus_ext.run.config import check_estimator, check_experts
from copus_ext.run.noise_logger import NoiseLogger

# Gradients that autograd's hooks never see, or that are no longer whole where they are read.
_HIDES_GRADIENTS = ("use_torch_fsdp2", "use_megatron_fsdp", "delay_wgrad_compute", "overlap_moe_expert_parallel_comm")


def run_plain(raw: argparse.Namespace, plan: Plan) -> None:
    """Train with nothing of ours but the patches, and the noise scale if it is asked for.

    Args:
        raw: upstream's arguments before validation, with the copus group.
        plan: what they say about batch and layout.

    Raises:
        UserError: the noise scale is asked for and can't be measured.
    """
    logger = _noise_logger(raw, plan)
    validate_args(raw)
    set_global_variables(raw)
    container = pretrain_cfg_container_from_args(raw, gpt_config_from_args(raw))
    with logger:
        pretrain(container, gpt.train_valid_test_datasets, ModelType.encoder_or_decoder, gpt.forward_step)


def _noise_logger(raw: argparse.Namespace, plan: Plan) -> contextlib.AbstractContextManager[object]:
    if not raw.log_gradient_noise_scale:
        return contextlib.nullcontext()
    check_estimator(raw)
    check_experts(raw)
    plan = plan.with_batch(_largest_batch(raw, plan))
    if reason := why_unmeasurable_in_a_run(StepShape.of(plan), raw.copus_gns_estimator):
        raise UserError(f"--log-gradient-noise-scale with --copus-gns-estimator {raw.copus_gns_estimator}: {reason}")
    for name in _HIDES_GRADIENTS:
        if getattr(raw, name, False):
            raise UserError(
                f"--log-gradient-noise-scale can't read gradients with --{name.replace('_', '-')}; leave one out"
            )
    if raw.cuda_graph_impl != "none":
        raise UserError(f"--log-gradient-noise-scale can't read gradients with --cuda-graph-impl {raw.cuda_graph_impl}")
    return NoiseLogger(raw, plan).running()


def _largest_batch(raw: argparse.Namespace, plan: Plan) -> int:
    """The global batch of most steps: the last one of upstream's own schedule, whose batches only grow."""
    if raw.step_batch_size_schedule is None:
        return plan.global_batch
    try:
        schedule = StepBatchsizeNumMicroBatchesCalculator(
            plan.micro_batch, plan.layout.dp, False, -1, raw.step_batch_size_schedule, raw.seq_length
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"--step-batch-size-schedule {raw.step_batch_size_schedule}: {error}") from error
    return int(schedule.global_batch_size)
