"""The shape of a GPT-like model: what counting parameters, floating-point operations and memory needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer. ``ffn`` is the width behind the gate; ``vocab`` is padded; ``seq`` in tokens."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq: int
    gated: bool = False
    tied: bool = True
    experts: int = 0
    experts_per_token: int = 1
    moe_ffn: int = 0
    param_bytes: int = 4  # bytes of a parameter and of an activation element: 2 for bf16 and fp16
    flash_attention: bool = False  # the scores of attention are never held in memory

    @property
    def attention_params(self) -> int:
        """Weights of one layer's attention: Q, K, V and the output projection."""
        return round(self.hidden * self.hidden * (2 + 2 * self.kv_heads / self.heads))

    @property
    def mlp_params(self) -> int:
        """Weights of one dense MLP, or of one expert."""
        width = self.moe_ffn if self.experts else self.ffn
        return (3 if self.gated else 2) * self.hidden * width

    @property
    def layer_params(self) -> int:
        """Weights of one layer, all experts counted."""
        return self.attention_params + self.mlp_params * max(1, self.experts)

    def layer_share(self, tp: Any, ep: Any) -> tuple[Any, Any]:
        """Weights of one layer on one rank, dense ones and experts'; sizes are numbers or arrays."""
        dense = self.attention_params if self.experts else self.layer_params
        return dense / tp, self.experts * self.mlp_params / (ep * tp)

    @property
    def active_layer_params(self) -> int:
        """Weights of one layer that a token meets."""
        return self.attention_params + self.mlp_params * (self.experts_per_token if self.experts else 1)

    @property
    def embedding_params(self) -> int:
        """Weights of the word embedding (the output layer has as many when it is not tied)."""
        return self.vocab * self.hidden

    @property
    def params(self) -> int:
        """All weights, biases and norms left out."""
        return self.layers * self.layer_params + self.embedding_params * (1 if self.tied else 2)

    def flops_per_sequence(self) -> float:
        """Forward and backward model FLOPs of one sequence (Narayanan et al. 2021, eq. 3 without recompute)."""
        matmul = 6.0 * self.seq * (self.layers * self.active_layer_params + self.embedding_params)
        return matmul + 12.0 * self.layers * self.seq * self.seq * self.hidden
