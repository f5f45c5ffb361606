"""Shapes of well-known models, for planning without a command line of Megatron. Vocabularies are not padded yet."""

from __future__ import annotations

from dataclasses import dataclass

from copus_ext.core.cost.model_shape import ModelShape


@dataclass(frozen=True)
class KnownModel:
    """A model in bf16 with fused attention, at the sequence length that it was pre-trained with.

    ``counted_as_layers``: embedding and loss, where stages can only be filled evenly if they count as layers.
    """

    shape: ModelShape
    source: str
    counted_as_layers: int = 0


def _gpt(layers: int, hidden: int, heads: int, vocab: int, seq: int) -> ModelShape:
    return ModelShape(
        layers, hidden, heads, heads, 4 * hidden, vocab, seq, tied=True, param_bytes=2, flash_attention=True
    )


def llama(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, seq: int, tied: bool = False
) -> ModelShape:
    """A model of that family, in bf16."""
    return ModelShape(
        layers,
        hidden,
        heads,
        kv_heads,
        ffn,
        vocab,
        seq,
        gated=True,
        tied=tied,
        param_bytes=2,
        flash_attention=True,
    )


_GPT2 = "Radford et al. 2019, table 2"
_GPT3 = "Brown et al. 2020, arXiv 2005.14165, table 2.1; learned positions and GPT-2's vocabulary"
_LLAMA2 = "Touvron et al. 2023, arXiv 2307.09288, table 1; sizes of layers: its released configuration"
_LLAMA3 = "Llama Team 2024, arXiv 2407.21783, table 3; sequence length: section 3.4.1"
_MIXTRAL = "Jiang et al. 2024, arXiv 2401.04088, table 1"

KNOWN_MODELS = {
    "gpt2-124m": KnownModel(_gpt(12, 768, 12, 50257, 1024), _GPT2),
    "gpt2-1.5b": KnownModel(_gpt(48, 1600, 25, 50257, 1024), _GPT2),
    "gpt3-175b": KnownModel(_gpt(96, 12288, 96, 50257, 2048), _GPT3),
    "llama2-7b": KnownModel(llama(32, 4096, 32, 32, 11008, 32000, 4096), _LLAMA2),
    "llama2-70b": KnownModel(llama(80, 8192, 64, 8, 28672, 32000, 4096), _LLAMA2),
    "llama3-8b": KnownModel(llama(32, 4096, 32, 8, 14336, 128256, 8192), _LLAMA3),
    "llama3-70b": KnownModel(llama(80, 8192, 64, 8, 28672, 128256, 8192), _LLAMA3),
    # 126 layers and two that count as such make 128: "one layer less on the first and the last stage", section 3.3.2.
    "llama3.1-405b": KnownModel(llama(126, 16384, 128, 8, 53248, 128256, 8192), _LLAMA3, counted_as_layers=2),
    "mixtral-8x7b": KnownModel(
        ModelShape(
            layers=32,
            hidden=4096,
            heads=32,
            kv_heads=8,
            ffn=14336,
            vocab=32000,
            seq=32768,
            gated=True,
            tied=False,
            experts=8,
            experts_per_token=2,
            moe_ffn=14336,
            param_bytes=2,
            flash_attention=True,
        ),
        _MIXTRAL,
    ),
}
