"""The gradient noise scale in a training loop of your own: Megatron-Core alone, no ``megatron.training``, no COPUS run.

    torchrun --nproc-per-node 2 examples/noise_scale_in_your_loop.py
    torchrun --nproc-per-node 4 examples/noise_scale_in_your_loop.py --tp 2 --pp 2 --estimator sketch

A small GPT learns the bytes of Python's own library, on GPUs (nccl) or without any (gloo). The lines that measure are
marked "noise:"; the rest is what a Megatron-Core loop has anyway. A step is ``GLOBAL_BATCH`` sequences in any layout.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from copus_ext.adapters.noise.gradient_noise import GradientNoise  # noise:
from copus_ext.core.noise.grouping import AUTO, ESTIMATORS
from copus_ext.core.noise.noise_scale import NoiseEstimate, NoiseScaleEstimator  # noise:

SEQ_LENGTH, MICRO_BATCH, GLOBAL_BATCH = 64, 2, 16  # tokens, sequences, sequences
LEARNING_RATE = 2e-3
HALF_LIFE_STEPS = 20  # of the average


class Trainer(NamedTuple):
    """What one rank trains with."""

    model: Any
    optimizer: Any
    groups: Any
    num_microbatches: int

    def step(self, batches: Iterator[torch.Tensor]) -> tuple[float | None, float | None]:
        """One step. The loss, known on the last pipeline stage, and the gradient norm; ``None`` if it was skipped."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[self.model],
            num_microbatches=self.num_microbatches,
            seq_length=SEQ_LENGTH,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        updated, grad_norm, _ = self.optimizer.step()
        loss = sum(float(report["loss"]) for report in losses) / len(losses) if losses else None
        return loss, float(grad_norm) if updated else None


def train(
    tp: int, pp: int, steps: int, estimator: str = AUTO, say: Callable[[str], object] = print
) -> tuple[list[float | None], NoiseEstimate]:
    """Train, telling the noise scale every ten steps; the losses, and the noise scale at the end."""
    trainer = build(tp, pp)
    batches = my_batches(trainer.groups.dp.rank(), trainer.groups.dp.size())
    noise = GradientNoise(  # noise:
        [trainer.model],
        trainer.optimizer,
        trainer.groups,
        micro_batch_size=MICRO_BATCH,
        num_microbatches=trainer.num_microbatches,
        estimator=estimator,
    )
    tokens = GLOBAL_BATCH * SEQ_LENGTH
    average = NoiseScaleEstimator(half_life_tokens=HALF_LIFE_STEPS * tokens)  # noise:
    losses = []
    with noise:  # noise:
        for number in range(1, steps + 1):
            loss, grad_norm = trainer.step(batches)
            losses.append(loss)
            for N, S, _ in noise.step(grad_norm):  # noise: of the steps since the last reduction, one in four
                average = average.update(N, S, tokens, noise.batch)  # noise:
            if number % 10 == 0 and dist.get_rank() == dist.get_world_size() - 1:
                say(f"step {number:4d} | loss here {loss:.3f} | {describe(average.estimate())}")
    return losses, average.estimate()


def describe(noise: NoiseEstimate) -> str:
    """The noise scale in sequences with its 95 % interval, and what it is the ratio of."""
    return (
        f"noise scale {noise.value:.3g} [{noise.low:.3g}, {noise.high:.3g}] sequences | "
        f"tr(Sigma) {noise.S:.3g} | |G|^2 {noise.N:.3g}"
    )


def build(tp: int, pp: int) -> Trainer:
    """Groups, model, DDP and optimizer, as Megatron-Core's quick start has them."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(tp, pp)
    torch.manual_seed(1234)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    gpt = make_gpt(tp, pp).cuda()
    config = gpt.config
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), gpt)
    model.broadcast_params()
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=LEARNING_RATE, clip_grad=1.0), [model])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    return Trainer(model, optimizer, groups, GLOBAL_BATCH // (MICRO_BATCH * groups.dp.size()))


def make_gpt(tp: int, pp: int) -> Any:
    """This rank's part of a GPT of four layers over bytes."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=not torch.cuda.is_available(),
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=256,
        max_sequence_length=SEQ_LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
    )


def forward_step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """One micro-batch through this stage; every stage draws the same one."""
    tokens = next(batches).cuda()
    positions = torch.arange(SEQ_LENGTH, device=tokens.device).expand(MICRO_BATCH, -1)
    output = model(tokens[:, :-1], positions, causal_mask(tokens.device), labels=tokens[:, 1:])
    return output, mean_loss


def causal_mask(device: torch.device) -> torch.Tensor:
    """[1, 1, tokens, tokens], true where a token must not look."""
    mask = torch.ones(1, 1, SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool, device=device)
    return mask.triu(1)


def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """[micro-batch, tokens] -> the mean, to be differentiated and to be told."""
    mean = losses.float().mean()
    return mean, {"loss": mean.detach().clone()}  # Megatron divides the other one in place


def my_batches(dp_rank: int, dp_size: int) -> Iterator[torch.Tensor]:
    """[MICRO_BATCH, SEQ_LENGTH + 1] random pieces of Python's library; other ones on each data-parallel rank."""
    library = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    text = torch.frombuffer(bytearray(library), dtype=torch.uint8)
    random = torch.Generator().manual_seed(1000 + dp_rank)
    while True:
        starts = torch.randint(len(text) - SEQ_LENGTH, (MICRO_BATCH,), generator=random).tolist()
        yield torch.stack([text[start : start + SEQ_LENGTH + 1].long() for start in starts])


def main() -> None:
    """Under torchrun."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel size")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--estimator", default=AUTO, choices=ESTIMATORS)
    flags = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    else:
        from megatron.patches import apply_all

        apply_all()  # Megatron without an accelerator
        dist.init_process_group("gloo")
    train(flags.tp, flags.pp, flags.steps, flags.estimator, partial(print, flush=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
