"""The GPT job: batches, loss and datasets, as Megatron-LM's ``pretrain_gpt.py`` gives them to ``pretrain()``.

Everything comes from the installed package; this module only puts it together.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers, get_tokenizer, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

SPIKY_LOSS_FACTOR = 10.0  # upstream's: a loss is spiky when it exceeds ten times the largest one seen
_BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def get_batch(data_iterator: Any, model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """This rank's part of the next micro-batch; all ``None`` on a stage that is neither first nor last.

    Returns:
        ``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (float32), each of shape
        [micro batch, sequence / context parallel], and ``attention_mask`` where the data loader makes one.
    """
    args = get_args()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    mtp = args.mtp_num_layers is not None and mtp_on_this_rank(
        get_attr_wrapped_model(model, "config").pipeline_model_parallel_layout,
        args.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )
    if not (is_first_or_last_pipeline_stage(vp_stage) or mtp):
        return dict.fromkeys(_BATCH_KEYS)
    batch = get_batch_on_this_tp_rank(
        _load(data_iterator),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size if model.training else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    return {key: batch.get(key) for key in _BATCH_KEYS}


def _load(data_iterator: Any) -> dict[str, torch.Tensor | None]:
    """The next micro-batch on the device, on the tensor-parallel rank that reads the data; empty on the others."""
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return {}
    loaded = next(data_iterator)
    return {key: value.cuda(non_blocking=True) for key, value in loaded.items() if value is not None}


def loss_func(
    loss_mask: Any, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Masked cross entropy summed over a micro-batch.

    Args:
        loss_mask: [micro batch, sequence], 1 where a token counts.
        output_tensor: losses of the same shape.

    Returns:
        The summed loss, the number of tokens that count, and the pair for upstream's log line.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    _validate_loss(loss)
    report = torch.cat([loss.detach().view(1), num_tokens.view(1).to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}


def _validate_loss(loss: torch.Tensor) -> None:
    """Upstream's checks on a local loss, through its rerun state machine."""
    args = get_args()
    machine = get_rerun_state_machine()
    checks: list[tuple[Any, str, bool]] = []
    if args.check_for_nan_in_loss_and_grad:
        checks = [(torch.isnan, "found NaN in local forward loss calculation", True)]
        checks += [(torch.isinf, "found Inf in local forward loss calculation", True)]
    if args.check_for_spiky_loss:
        spiky = partial(machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss")
        checks += [(spiky, "Spiky loss", False)]
    for rejected, message, fatal in checks:
        machine.validate_result(result=loss, rejection_func=rejected, message=message, tolerance=0.0, fatal=fatal)


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, partial[Any]]:
    """One micro-batch through this stage: what upstream's pipeline schedules call."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, model)
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Upstream's dataset configuration from its own flags."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
    )


def _built_on_this_rank(vp_stage: int | None) -> bool:
    return is_first_or_last_pipeline_stage(vp_stage) and parallel_state.get_tensor_model_parallel_rank() == 0


def build_datasets(num_samples: list[int], on_every_rank: bool, vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Training, validation and test sets.

    Args:
        num_samples: sequences wanted of each.
        on_every_rank: build them on ranks that read no data in the current layout as well; else they get ``None``.
        vp_stage: the model chunk, under interleaved pipelining.
    """
    args = get_args()
    kind = MockGPTDataset if args.mock_data else GPTDataset
    wanted = (lambda: True) if on_every_rank else partial(_built_on_this_rank, vp_stage=vp_stage)
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    built = BlendedMegatronDatasetBuilder(kind, num_samples, wanted, dataset_config(args)).build()
    print_rank_0("> finished creating GPT datasets ...")
    return built[0], built[1], built[2]


def train_valid_test_datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """The datasets of a plain run, where this rank reads any."""
    return build_datasets(num_samples, on_every_rank=False, vp_stage=vp_stage)


# Upstream reads this attribute: the builder itself sees to which ranks build, so every rank must call it.
train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]
