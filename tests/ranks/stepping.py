"""One real step of upstream's ``train_step`` on given samples, without ``train()`` around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copus_ext.bench.workbench import Step


def one_step(job: Any, first_sample: int) -> Step:
    """Take a step of ``job`` on the global batch that starts at ``first_sample`` (samples of ``random_batches``)."""
    from copus_ext.bench.workbench import take_step

    return take_step(job, _my_batches(job, first_sample))


def pass_thrown_away(job: Any, first_sample: int) -> None:
    """Gradients of a global batch, accumulated and reduced, and no step taken with them."""
    from copus_ext.bench.workbench import accumulate

    accumulate(job, _my_batches(job, first_sample))


def _my_batches(job: Any, first_sample: int) -> list[dict[str, Any]]:
    """This data-parallel rank's micro-batches, dealt as upstream's sampler deals them."""
    import torch

    from tests.ranks.tiny import random_batches

    plan, args = job.plan, job.args
    everything = random_batches(
        plan.num_microbatches * plan.layout.dp, plan.micro_batch, args.seq_length, args.padded_vocab_size, first_sample
    )
    if args.create_attention_mask_in_dataloader:
        hidden = torch.ones(args.seq_length, args.seq_length).triu(1).bool()
        for batch in everything:
            batch["attention_mask"] = hidden.expand(plan.micro_batch, 1, -1, -1).contiguous()
    return everything[job.groups.dp.rank() :: plan.layout.dp]
