"""Context parallelism without Transformer Engine, by torch's own attention.

Upstream deals each sequence to the context-parallel ranks in 2 cp chunks: rank r has chunks r and 2 cp - 1 - r, so that
all have as much to attend to. Here a rank gathers the keys and values of all chunks, as Transformer Engine does with
``--cp-comm-type all_gather``, puts them into their order, and lets upstream's attention work on its own queries.
Gathering adds their gradients up on the way back. Every rank holds scores for the whole sequence of keys, so it is no
way to train on long sequences; it is there so that context parallelism runs, and can be tested, where there is no GPU.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from megatron.patches.registry import Patch


def chunks_of(rank: int, cp: int) -> tuple[int, int]:
    """Which of the 2 ``cp`` chunks of a sequence a context-parallel rank has, in its order."""
    return rank, 2 * cp - 1 - rank


def in_sequence_order(gathered: torch.Tensor, cp: int) -> torch.Tensor:
    """[sequence, ...] as gathered from the ranks, in the order of the sequence."""
    held = [chunk for rank in range(cp) for chunk in chunks_of(rank, cp)]
    chunks = gathered.chunk(2 * cp)
    return torch.cat([chunks[held.index(chunk)] for chunk in range(2 * cp)])


@functools.lru_cache(maxsize=32)  # as upstream's causal mask: every layer asks for the same one
def hidden_from(rank: int, cp: int, length: int, device: torch.device) -> torch.Tensor:
    """[1, 1, length / cp, length] bool: true where a key of the sequence comes behind a query of this rank."""
    positions = torch.arange(length, device=device)
    queries = torch.cat([positions.chunk(2 * cp)[chunk] for chunk in chunks_of(rank, cp)])
    return (positions > queries[:, None])[None, None]


def why_refused(config: Any) -> str | None:
    """Why torch's attention can't do what a configuration, or arguments, ask for; ``None`` where it can."""
    if config.context_parallel_size > 1 and config.window_size is not None:
        return "--window-size with --context-parallel-size > 1 needs Transformer Engine"
    return None


def _allowing_context_parallel(build: Any) -> Any:
    @functools.wraps(build)
    def built(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.context_parallel_size == 1:
            build(self, config, *args, **kwargs)
            return
        if reason := why_refused(config):
            raise ValueError(reason)
        without = copy.copy(config)
        without.context_parallel_size = 1
        without.masked_softmax_fusion = False  # its causal kernel wants as many queries as keys
        build(self, without, *args, **kwargs)
        self.config = config

    return built


def _over_all_keys(attend: Any) -> Any:
    @functools.wraps(attend)
    def attended(
        self: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if self.config.context_parallel_size > 1:
            from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region as gather

            group = self.pg_collection.cp
            key, value = (in_sequence_order(gather(part, group=group), group.size()) for part in (key, value))
            if attention_mask is None:  # else the data loader made it, and it has this rank's rows
                attention_mask = hidden_from(group.rank(), group.size(), key.size(0), key.device)
        result: torch.Tensor = attend(self, query, key, value, attention_mask, *args, **kwargs)
        return result

    return attended


def apply() -> None:
    """Wrap torch's attention."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    DotProductAttention.__init__ = _allowing_context_parallel(DotProductAttention.__init__)
    DotProductAttention.forward = _over_all_keys(DotProductAttention.forward)


PATCH = Patch(
    name="local_context_parallel",
    upstream=(
        "megatron.core.transformer.dot_product_attention.DotProductAttention.__init__",
        "megatron.core.transformer.dot_product_attention.DotProductAttention.forward",
        "megatron.core.utils._get_batch_on_this_cp_rank_per_sequence_balancing",
        "megatron.core.tensor_parallel.mappings.gather_from_sequence_parallel_region",
    ),
    why="context parallelism is refused without Transformer Engine, so that nothing of it could be tested on a CPU",
    issue="none known",
    remove_when="DotProductAttention takes part in context parallelism",
    apply=apply,
)
