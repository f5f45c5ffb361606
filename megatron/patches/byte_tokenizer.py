"""``--tokenizer-type ByteLevelTokenizer``: text as its UTF-8 bytes, with nothing to download or train.

Token ids are 0-255 for the bytes, 256 for the end of a document and 257 for padding, so ``vocab_size`` is 258. Padding
has an id of its own because a dataset refuses to mask one that doubles as another special token.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron.patches.registry import Patch

TOKENIZER_TYPE = "ByteLevelTokenizer"
END_OF_DOCUMENT = 256
PADDING = 257
_BYTES = 256
_SPECIAL_TOKENS = ("<pad>", "<eod>")  # the library counts down from the end of the vocabulary


def apply() -> None:
    """Teach the option its new value, and everyone who builds a tokenizer what to do with it."""
    import megatron.core.tokenizers.utils.build_tokenizer as tokenizers
    import megatron.training.arguments as arguments
    import megatron.training.global_vars as global_vars

    build = _knowing_bytes(tokenizers.build_tokenizer, tokenizers._set_padded_vocab_size)
    tokenizers.build_tokenizer = build
    global_vars.build_tokenizer = build  # it has imported the function by name
    arguments._add_tokenizer_args = _offering_bytes(arguments._add_tokenizer_args)


def _knowing_bytes(upstream: Callable[..., Any], set_padded_vocab_size: Callable[..., None]) -> Callable[..., Any]:
    """``build_tokenizer`` that also knows our type."""

    @wraps(upstream)
    def build_tokenizer(args: Namespace, **kwargs: Any) -> Any:
        if args.tokenizer_type != TOKENIZER_TYPE:
            return upstream(args, **kwargs)
        tokenizer = _byte_tokenizer()
        if args.pad_vocab_size:
            set_padded_vocab_size(args, tokenizer)
        return tokenizer

    return build_tokenizer


def _byte_tokenizer() -> Any:
    """Upstream's own byte-level library in upstream's own wrapper."""
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(
        metadata_path={"library": "byte-level"},
        vocab_size=_BYTES,
        special_tokens=list(_SPECIAL_TOKENS),
        _eos_id=END_OF_DOCUMENT,
        _pad_id=PADDING,
    )


def _offering_bytes(upstream: Callable[[ArgumentParser], ArgumentParser]) -> Callable[[ArgumentParser], ArgumentParser]:
    """``_add_tokenizer_args`` with one more choice."""

    @wraps(upstream)
    def add_tokenizer_args(parser: ArgumentParser) -> ArgumentParser:
        parser = upstream(parser)
        option = parser._option_string_actions["--tokenizer-type"]
        option.choices = [*(option.choices or ()), TOKENIZER_TYPE]
        return parser

    return add_tokenizer_args


PATCH = Patch(
    name="byte_tokenizer",
    upstream=(
        "megatron.core.tokenizers.utils.build_tokenizer.build_tokenizer",
        "megatron.core.tokenizers.text.libraries.bytelevel_tokenizer.ByteLevelTokenizer",
        "megatron.training.arguments._add_tokenizer_args",
        "megatron.training.global_vars._build_tokenizer",
    ),
    why="upstream has a byte-level tokenizer that no --tokenizer-type reaches",
    issue="none known",
    remove_when="upstream's --tokenizer-type offers its byte-level library",
    apply=apply,
)
