"""One real step of upstream's ``train_step`` on given samples, without ``train()`` around it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Step(NamedTuple):
    """``loss`` is known on the last pipeline stage; ``grad_norm`` everywhere."""

    loss: float | None
    grad_norm: float | None


def one_step(job: Any, first_sample: int) -> Step:
    """Take a step of ``job`` on the global batch that starts at ``first_sample`` (samples of ``random_batches``)."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.training import training

    from copus_ext.run import gpt

    config = job.config
    config.grad_scale_func = job.optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if job.args.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in job.model]
        config.no_sync_func = config.no_sync_func[0] if len(job.model) == 1 else config.no_sync_func
    iterators = [RerunDataIterator(iter(_my_batches(job, first_sample))) for _ in job.model]
    losses, _, _, _, _, grad_norm, *_ = training.train_step(
        gpt.forward_step,
        iterators if len(iterators) > 1 else iterators[0],
        job.model,
        job.optimizer,
        job.scheduler,
        config,
        get_forward_backward_func(),
        iteration=job.args.iteration,
    )
    loss = next((float(value) for value in losses.values()), None)
    return Step(loss, grad_norm)


def pass_thrown_away(job: Any, first_sample: int) -> None:
    """Gradients of a global batch, accumulated and reduced, and no step taken with them."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator, get_rerun_state_machine

    from copus_ext.run import gpt

    iterator = RerunDataIterator(iter(_my_batches(job, first_sample)))
    while get_rerun_state_machine().should_run_forward_backward(iterator):
        for chunk in job.model:
            chunk.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=gpt.forward_step,
            data_iterator=iterator,
            model=job.model,
            num_microbatches=job.plan.num_microbatches,
            seq_length=job.args.seq_length,
            micro_batch_size=job.plan.micro_batch,
            forward_only=False,
        )


def _my_batches(job: Any, first_sample: int) -> list[dict[str, Any]]:
    """This data-parallel rank's micro-batches, dealt as upstream's sampler deals them."""
    from tests.ranks.tiny import random_batches

    plan, args = job.plan, job.args
    everything = random_batches(
        plan.num_microbatches * plan.layout.dp, plan.micro_batch, args.seq_length, args.padded_vocab_size, first_sample
    )
    return everything[job.groups.dp.rank() :: plan.layout.dp]
