"""A GPT small enough for a test, as command-line flags, and the steps that bring it up on this rank."""

from __future__ import annotations

import argparse
import sys
from typing import Any
from unittest import mock

from copus_ext.core.plan import Plan

_MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --seq-length 32 --max-position-embeddings 32 "
    "--position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 "
    "--tokenizer-type NullTokenizer --vocab-size 126 --make-vocab-size-divisible-by 32 --mock-data --split 90,5,5 "
)
_TRAINING = (
    "--train-samples 4096 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --micro-batch-size 1 --global-batch-size 8 "
    "--eval-interval 100000 --eval-iters 1 --log-interval 1 --seed 1234 "
)
_CPU = (
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion "
    "--no-bias-dropout-fusion --no-persist-layer-norm --no-rope-fusion --transformer-impl local "
    "--distributed-backend gloo --use-cpu-initialization --attention-backend unfused "
    "--no-create-attention-mask-in-dataloader "
)


def raw_arguments(extra: str = "") -> argparse.Namespace:
    """Upstream's arguments before validation: the tiny model with ``extra`` flags behind."""
    from megatron.training.arguments import parse_args

    with mock.patch.object(sys, "argv", ["pretrain_gpt_copus.py", *(_MODEL + _TRAINING + _CPU + extra).split()]):
        return parse_args()


def start_upstream(raw: argparse.Namespace, plan: Plan) -> tuple[argparse.Namespace, Any, Any]:
    """Initialise upstream for ``plan`` once per process.

    Returns:
        The validated arguments, the :class:`LayoutGroups`, and the process groups of ``plan``.
    """
    from megatron.training import training
    from megatron.training.global_vars import set_global_variables

    from copus_ext.adapters.arguments import arguments_for
    from copus_ext.adapters.layouts import LayoutGroups

    layouts = LayoutGroups()
    args = arguments_for(raw, plan)
    set_global_variables(args)
    training.initialize_megatron()
    return args, layouts, layouts.adopt(plan.layout)


def random_batches(count: int, micro_batch: int, seq: int, vocab: int, first_sample: int = 0) -> list[dict[str, Any]]:
    """``count`` micro-batches whose sample i is the same in every layout: a random walk seeded by its index."""
    import torch

    def sample(index: int) -> Any:
        generator = torch.Generator().manual_seed(777 + index)
        return torch.randint(0, 8, (seq + 1,), generator=generator).cumsum(0) % vocab

    batches = []
    for number in range(count):
        first = first_sample + number * micro_batch
        tokens = torch.stack([sample(first + i) for i in range(micro_batch)])
        batches.append(
            {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "loss_mask": torch.ones(micro_batch, seq),
                "position_ids": torch.arange(seq).expand(micro_batch, -1).contiguous(),
            }
        )
    return batches
