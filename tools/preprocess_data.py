"""Turn text into the .bin and .idx files that Megatron trains on.

Takes the options of Megatron-LM's tool of the same name. ``--input`` is any mix of files, folders and globs: a .json or
.jsonl file has one JSON document a line, any other file is one document of plain text. Writes PREFIX_KEY_document.bin
and .idx for every key of ``--json-keys``, with the documents in the order of the input.
"""

from __future__ import annotations

import argparse
import glob
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import batched
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from copus_ext.adapters.tokenizer import check_tokenizer_package, make_tokenizer
from copus_ext.core.errors import UserError

_JSON_SUFFIXES = (".json", ".jsonl")
_BATCH = 16  # documents a worker takes at a time


@dataclass(frozen=True)
class Record:
    """A document still to be read: a line of a JSON file, or (``line`` is 0) a whole text file."""

    path: Path
    line: int = 0
    content: bytes = b""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else str(self.path)


@dataclass(frozen=True)
class Encoded:
    """A document's token ids by JSON key, and the bytes they were made from."""

    tokens: dict[str, NDArray[Any]]
    num_bytes: int


@dataclass
class Summary:
    """What has been written so far."""

    documents: int = 0
    num_bytes: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, document: Encoded) -> None:
        """Count one more document."""
        self.documents += 1
        self.num_bytes += document.num_bytes
        self.tokens += sum(len(ids) for ids in document.tokens.values())

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        return (
            f"{self.documents} documents, {self.num_bytes / 1e6:.1f} MB, {self.tokens} tokens, {seconds:.1f} s "
            f"({self.documents / seconds:.0f} documents/s, {self.num_bytes / seconds / 1e6:.1f} MB/s)"
        )


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Our options and upstream's tokenizer options, checked.

    What can be checked without Megatron is checked first, because importing it takes seconds.

    Raises:
        UserError: an option that is missing, unknown or wrong.
    """
    if not {"-h", "--help"} & set(argv):
        _check(_early_parser().parse_known_args(argv)[0])
    _apply_patch()
    from megatron.training.arguments import _add_tokenizer_args

    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    _add_own_options(parser)
    args: argparse.Namespace = _add_tokenizer_args(parser).parse_args(argv)
    # What build_tokenizer expects of a training run; the size it pads to is settled when training starts.
    args.rank, args.tensor_model_parallel_size, args.make_vocab_size_divisible_by = 0, 1, 128
    args.pad_vocab_size = False
    return args


def _early_parser() -> _Parser:
    """The options that :func:`_check` looks at."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    _add_own_options(parser)
    for name in ("--tokenizer-type", "--vocab-file", "--merge-file"):
        parser.add_argument(name, required=name == "--tokenizer-type")
    return parser


def _add_own_options(parser: argparse.ArgumentParser) -> None:
    """Upstream's names and meanings, save that ``--input`` takes more than one."""
    group = parser.add_argument_group("input data")
    group.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs")
    group.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys to take from JSON")
    group = parser.add_argument_group("tokenization process")
    group.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    group = parser.add_argument_group("output data")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX", help="output path without suffix")
    group = parser.add_argument_group("runtime")
    group.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize (default: 1)")
    group.add_argument("--log-interval", type=int, default=1000, metavar="N", help="documents between progress lines")


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for what is wrong with the options."""
    for name in ("workers", "log_interval"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in ("vocab_file", "merge_file"):
        path = getattr(args, name)
        if path and not os.path.isfile(path):
            raise UserError(f"--{name.replace('_', '-')}: {path} is not a file")
    check_tokenizer_package(args)
    paths = find_inputs(args.input)
    if len(args.json_keys) > 1 and any(path.suffix not in _JSON_SUFFIXES for path in paths):
        raise UserError(f"--json-keys: plain text has no keys to choose from, name one, not {len(args.json_keys)}")
    try:
        Path(args.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-prefix: {error.filename} cannot be made: {error.strerror}") from error


def find_inputs(patterns: Iterable[str]) -> list[Path]:
    """The files that ``--input`` means, each pattern's in sorted order; hidden files of a folder are left out.

    Raises:
        UserError: a pattern without a file.
    """
    found: list[Path] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            matches = [p for p in Path(pattern).rglob("*") if not _is_hidden(p.relative_to(pattern))]
        else:
            matches = [Path(p) for p in [pattern] if os.path.exists(p)] or [
                Path(p) for p in glob.glob(pattern, recursive=True)
            ]
        files = sorted(path for path in matches if path.is_file())
        if not files:
            raise UserError(f"--input: no file at {pattern}")
        unreadable = [path for path in files if not os.access(path, os.R_OK)]
        if unreadable:
            raise UserError(f"--input: {unreadable[0]} may not be read")
        found += files
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _apply_patch() -> None:
    """Make the byte-level tokenizer available."""
    from megatron.patches.byte_tokenizer import PATCH
    from megatron.patches.registry import apply_patches

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing Megatron warns of kernels that tokenizing has no use for
        apply_patches([PATCH])


def read_records(paths: Iterable[Path]) -> Iterator[Record]:
    """The documents of the files in order. Text files are left for the workers to read."""
    for path in paths:
        if path.suffix not in _JSON_SUFFIXES:
            yield Record(path)
            continue
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Record(path, number, line)


class Encoder:
    """Documents to token ids, in the smallest integer type that holds the vocabulary."""

    def __init__(self, args: argparse.Namespace) -> None:
        from megatron.core.datasets.indexed_dataset import DType

        _apply_patch()
        self._tokenizer = make_tokenizer(args)
        self._type: str = args.tokenizer_type
        self._keys: list[str] = args.json_keys
        self._ending = self._end_of_document() if args.append_eod else []
        self.dtype: Any = DType.optimal_dtype(self._tokenizer.vocab_size)

    def _end_of_document(self) -> list[int]:
        if self._tokenizer.eod is None:
            raise UserError(f"--append-eod: the tokenizer {self._type} has no end-of-document token")
        return [self._tokenizer.eod]

    def encode(self, record: Record) -> Encoded:
        """Token ids of each key's text.

        Raises:
            UserError: text that cannot be read, or that the tokenizer refuses.
        """
        if record.line:
            content, texts = record.content, self._texts_of_json(record)
        else:
            content = record.path.read_bytes()
            texts = {self._keys[0]: _decode(content, record)}
        return Encoded({key: self._ids(text, record) for key, text in texts.items()}, len(content))

    def _texts_of_json(self, record: Record) -> dict[str, str]:
        try:
            document = json.loads(record.content)
        except ValueError as error:
            raise UserError(f"--input: {record} is not a JSON document: {error}") from error
        if not isinstance(document, dict):
            raise UserError(f"--input: {record} is not a JSON object")
        for key in self._keys:
            if not isinstance(document.get(key), str):
                raise UserError(f"--json-keys: {record} has no text under {key!r}")
        return {key: document[key] for key in self._keys}

    def _ids(self, text: str, record: Record) -> NDArray[Any]:
        try:
            ids = self._tokenizer.tokenize(text)
            tokens = np.array([*ids, *self._ending] if ids else [], dtype=self.dtype)
        except (ValueError, OverflowError) as error:
            raise UserError(f"--tokenizer-type {self._type} cannot encode {record}: {error}") from error
        if len(tokens) and tokens.max() >= self._tokenizer.vocab_size:
            raise UserError(f"--vocab-size {self._tokenizer.vocab_size}: {record} has token {tokens.max()}")
        return tokens


def _decode(content: bytes, record: Record) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--input: {record} is not UTF-8 text (byte {error.start})") from error


@lru_cache(maxsize=1)
def encoder_for(settings: str) -> Encoder:
    """The encoder of these settings (JSON). Made once a process; forked workers inherit their parent's."""
    return Encoder(argparse.Namespace(**json.loads(settings)))


def encode_batch(settings: str, records: Sequence[Record]) -> list[Encoded]:
    """What a worker does."""
    return [encoder_for(settings).encode(record) for record in records]


def encode_all(records: Iterable[Record], settings: str, workers: int) -> Iterator[Encoded]:
    """Encode the records, in order, with a bounded number of them in memory."""
    batches = batched(records, _BATCH)
    if workers == 1:
        for batch in batches:
            yield from encode_batch(settings, batch)
        return
    pending: deque[Future[list[Encoded]]] = deque()
    # Forked, because a fresh process would spend seconds on importing Megatron.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        for batch in batches:
            pending.append(pool.submit(encode_batch, settings, batch))
            if len(pending) > 4 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


@contextmanager
def dataset_builder(prefix: str, dtype: Any) -> Iterator[Any]:
    """Upstream's dataset builder, whose two files get their names only when they are complete."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    partial = f"{prefix}.partial"
    builder = IndexedDatasetBuilder(get_bin_path(partial), dtype=dtype)
    try:
        yield builder
        builder.finalize(get_idx_path(partial))
        for path_of in (get_bin_path, get_idx_path):
            os.replace(path_of(partial), path_of(prefix))
    finally:
        for path_of in (get_bin_path, get_idx_path):
            Path(path_of(partial)).unlink(missing_ok=True)


def preprocess(args: argparse.Namespace) -> Summary:
    """Write the datasets that the options ask for.

    Raises:
        UserError: input that is not what the options say, or that holds no text at all.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are; threads would not survive the fork
    settings = json.dumps({name: value for name, value in vars(args).items() if name != "input"})
    dtype = encoder_for(settings).dtype
    summary = Summary()
    with ExitStack() as stack:
        builders = {
            key: stack.enter_context(dataset_builder(f"{args.output_prefix}_{key}_document", dtype))
            for key in args.json_keys
        }
        for document in encode_all(read_records(find_inputs(args.input)), settings, args.workers):
            for key, ids in document.tokens.items():
                builders[key].add_document(ids, [len(ids)] if len(ids) else [])
            summary.add(document)
            if summary.documents % args.log_interval == 0:
                print(f"Processed {summary}", file=sys.stderr, flush=True)
        if not summary.tokens:
            raise UserError("--input: there is no text in it")
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; 0, or 2 with one line on stderr for bad input."""
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        summary = preprocess(args)
    except UserError as error:
        print(f"preprocess_data.py: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {', '.join(f'{args.output_prefix}_{key}_document' for key in args.json_keys)}: {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
