"""How a job is run, as far as the time and memory of a step depend on it and no plan says it: Megatron's flags."""

from __future__ import annotations

from dataclasses import dataclass

# What a process holds of a GPU beside tensors. The CUDA context alone took 1.65e9 with PyTorch on an A100 (BigScience,
# 176B chronicles-prequel.md); buffers of NCCL come on top.
CUDA_CONTEXT_BYTES = 1.65e9

FUSED = ("fused_accumulation", "fused_adam")  # what upstream has no kernels for on a CPU


@dataclass(frozen=True)
class RunOptions:
    """Named after the flags they come from; what upstream does where none of them is given."""

    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    overlap_p2p: bool = True  # --overlap-p2p-communication: upstream's default, and it counts under vpp > 1 only
    tp_comm_overlap: bool = False
    gradient_bytes: int = 4  # of a gradient on its way; 2 with --grad-reduce-in-bf16
    dropout: bool = False
    fp8: bool = False
    scatter_gather: bool = False  # Megatron before its core library: a tensor-parallel group shares what it sends on
    context_bytes: float = 0.0  # what a process holds of its device beside tensors
    fused_accumulation: bool = True  # products add up gradients themselves; not with --no-gradient-accumulation-fusion
    fused_adam: bool = True  # in one pass over memory, by Transformer Engine or apex; torch's takes one an operation
