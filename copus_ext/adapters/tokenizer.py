"""Upstream's tokenizer, with one line for what can be wrong with it."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from copus_ext.core.errors import UserError

_PACKAGES = {  # that upstream imports for a type, and says nothing helpful about where they are missing
    "BertWordPieceLowerCase": "transformers",
    "BertWordPieceCase": "transformers",
    "GPT2BPETokenizer": "transformers",
    "HuggingFaceTokenizer": "transformers",
    "SFTTokenizer": "transformers",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "TikTokenizer": "tiktoken",
}


def check_tokenizer_package(args: argparse.Namespace) -> None:
    """The package that ``args.tokenizer_type`` needs must be installed. Imports nothing.

    Raises:
        UserError: it is not.
    """
    package = _PACKAGES.get(args.tokenizer_type)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"--tokenizer-type {args.tokenizer_type} needs the package {package}; "
            "pip install 'copus-megatron[tokenizers]'"
        )


def make_tokenizer(args: argparse.Namespace) -> Any:
    """Upstream's tokenizer for its own flags. The patches must have been applied.

    Raises:
        UserError: the flags do not describe a tokenizer that can be made.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    check_tokenizer_package(args)
    try:
        return build_tokenizer(args)
    except Exception as error:  # upstream raises whatever it comes upon
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--tokenizer-type {args.tokenizer_type}: {reason}") from error
