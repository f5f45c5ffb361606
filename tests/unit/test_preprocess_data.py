"""Text to Megatron's dataset files: nothing lost, nothing added, the same for any number of workers."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import make_demo_data
import preprocess_data

TEXTS = ["first document\n", "zweites: äöü €", "", "第三", "x" * 1000]
BYTE_LEVEL = ["--tokenizer-type", "ByteLevelTokenizer"]
EOD = 256


def write_jsonl(path: Path, texts: list[str], **more: str) -> Path:
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return path


def run(*argv: Any) -> int:
    return preprocess_data.main([str(word) for word in argv])


def documents(prefix: Path) -> list[list[int]]:
    """The token ids of every document of a dataset, read with upstream's reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    ends = dataset.document_indices
    return [[int(token) for sequence in dataset[first:last] for token in sequence] for first, last in pairwise(ends)]


def byte_tokens(text: str) -> list[int]:
    return [*text.encode(), EOD] if text else []


def byte_tokenizer_args(**changes: Any) -> Namespace:
    """What a training run's arguments say about a byte-level tokenizer."""
    argv = ["--input", __file__, "--output-prefix", "unused", *BYTE_LEVEL]
    args = preprocess_data.parse_arguments(argv)
    return Namespace(**{**vars(args), "pad_vocab_size": True, **changes})


def build(args: Namespace) -> Any:
    from megatron.training import global_vars

    return global_vars.build_tokenizer(args)  # the reference that training uses


@pytest.mark.parametrize("workers", [1, 3])
def test_jsonl_documents_come_back_as_their_bytes(tmp_path: Path, workers: int) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    out = tmp_path / "new" / "out"
    assert run("--input", source, "--output-prefix", out, "--append-eod", "--workers", workers, *BYTE_LEVEL) == 0
    assert documents(Path(f"{out}_text_document")) == [byte_tokens(text) for text in TEXTS]


def test_files_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "corpus.json", [f"document {n} " * (n % 7) for n in range(300)])
    for workers in (1, 2):
        assert (
            run("--input", source, "--output-prefix", tmp_path / str(workers), "--workers", workers, *BYTE_LEVEL) == 0
        )
    for suffix in ("bin", "idx"):
        one, two = ((tmp_path / f"{workers}_text_document.{suffix}").read_bytes() for workers in (1, 2))
        assert one == two


def test_without_append_eod_there_is_no_end_token(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", ["ab"])
    assert run("--input", source, "--output-prefix", tmp_path / "out", *BYTE_LEVEL) == 0
    assert documents(tmp_path / "out_text_document") == [[97, 98]]


def test_every_json_key_gets_a_dataset(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", ["body"], title="head")
    assert run("--input", source, "--json-keys", "text", "title", "--output-prefix", tmp_path / "o", *BYTE_LEVEL) == 0
    assert documents(tmp_path / "o_text_document") == [list(b"body")]
    assert documents(tmp_path / "o_title_document") == [list(b"head")]


def test_folders_globs_and_files_are_documents_in_order(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for name in ("b.txt", "sub/a.md", ".git/config", "a.txt", "lines.jsonl"):
        path = corpus / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'{"text": "in json"}\n' if path.suffix == ".jsonl" else f"{name}\r\n".encode())
    inputs = [corpus, corpus / "*.txt", corpus / "a.txt"]
    assert run("--input", *inputs, "--output-prefix", tmp_path / "out", *BYTE_LEVEL) == 0
    expected = ["a.txt\r\n", "b.txt\r\n", "in json", "sub/a.md\r\n", "a.txt\r\n", "b.txt\r\n", "a.txt\r\n"]
    assert documents(tmp_path / "out_text_document") == [list(text.encode()) for text in expected]


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"--input": "nowhere/*.txt"}, "--input"),
        ({"--output-prefix": "/dev/null/out"}, "--output-prefix"),
        ({"--output-prefix": None}, "--output-prefix"),
        ({"--workers": "0"}, "--workers"),
        ({"--workers": "two"}, "--workers"),
        ({"--log-interval": "0"}, "--log-interval"),
        ({"--tokenizer-type": None}, "--tokenizer-type"),
        ({"--vocab-file": "nowhere.json"}, "--vocab-file"),
        ({"--json-keys": "text title"}, "--json-keys"),
    ],
)
def test_wrong_options_are_told_in_one_line_before_megatron_is_imported(
    tmp_path: Path, change: dict[str, str | None], flag: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    options = {"--input": "a.txt", "--output-prefix": "out", "--tokenizer-type": "ByteLevelTokenizer", **change}
    argv = [word for name, value in options.items() if value is not None for word in (name, *value.split())]
    script = "import sys, preprocess_data as p; status = p.main(sys.argv[1:]); print(status, 'torch' in sys.modules)"
    root = Path(preprocess_data.__file__).parent
    environment = {"PYTHONPATH": f"{root}:{root.parent}"}
    command = [sys.executable, "-c", script, *argv]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert done.stderr.count("\n") == 1
    assert flag in done.stderr


@pytest.mark.parametrize(
    ("content", "name", "flag"),
    [
        (b'{"text": "fine"}\n{"text": \n', "c.jsonl", "c.jsonl:2"),
        (b'["text"]\n', "c.jsonl", "--input"),
        (b'{"title": "no text"}\n', "c.jsonl", "--json-keys"),
        (b'{"text": ["a", "list"]}\n', "c.jsonl", "--json-keys"),
        (b"latin \xe4", "c.txt", "--input"),
        (b"", "c.txt", "--input"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_one_line_and_leaves_the_old_dataset(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, name: str, flag: str, workers: int
) -> None:
    old = tmp_path / "out_text_document.bin"
    old.write_bytes(b"old")
    (tmp_path / name).write_bytes(content)
    argv = ["--input", tmp_path / name, "--output-prefix", tmp_path / "out", "--workers", workers]
    assert run(*argv, *BYTE_LEVEL) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("preprocess_data.py: ")]
    assert len(lines) == 1
    assert flag in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == {name, old.name}
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (["--tokenizer-type", "NullTokenizer"], "--tokenizer-type"),  # it needs --vocab-size
        (["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"], "--tokenizer-type"),  # text is not numbers
        (["--tokenizer-type", "NoSuchTokenizer"], "--tokenizer-type"),
        ([*BYTE_LEVEL, "--no-such-option"], "--no-such-option"),
    ],
)
def test_what_upstream_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], flag: str
) -> None:
    (tmp_path / "a.txt").write_text("no numbers")
    assert run("--input", tmp_path / "a.txt", "--output-prefix", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert flag in error


def test_upstream_tokenizers_still_work_and_ids_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--output-prefix", tmp_path / "out", "--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
    (tmp_path / "good.txt").write_text("1 2 98")
    assert run("--input", tmp_path / "good.txt", "--append-eod", *argv) == 0
    assert documents(tmp_path / "out_text_document") == [[1, 2, 98, 99]]
    (tmp_path / "bad.txt").write_text("1 2 100")
    assert run("--input", tmp_path / "bad.txt", *argv) == 2
    assert "--vocab-size" in capsys.readouterr().err


def test_byte_tokenizer_has_distinct_special_tokens_and_pads_the_vocabulary() -> None:
    args = byte_tokenizer_args()
    tokenizer = build(args)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.eos, tokenizer.pad) == (258, 256, 256, 257)
    assert args.padded_vocab_size == 384
    args = byte_tokenizer_args(tensor_model_parallel_size=4)
    build(args)
    assert args.padded_vocab_size == 512
    args = byte_tokenizer_args(padded_vocab_size=1024)
    build(args)
    assert args.padded_vocab_size == 1024  # a size that was asked for stays


def test_byte_tokenizer_round_trip() -> None:
    tokenizer = build(byte_tokenizer_args())
    text = "naïve 漢字 \x00 end"
    assert tokenizer.tokenize(text) == list(text.encode())
    assert tokenizer.detokenize([*tokenizer.tokenize(text), tokenizer.eod, tokenizer.pad]) == text


def test_gpt_dataset_reads_byte_level_documents(tmp_path: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    source = write_jsonl(tmp_path / "corpus.jsonl", ["abcd", "efg", "hijkl"])
    assert run("--input", source, "--output-prefix", tmp_path / "out", "--append-eod", *BYTE_LEVEL) == 0
    prefix = str(tmp_path / "out_text_document")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=7,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=build(byte_tokenizer_args()),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
    )
    low_level = IndexedDataset(prefix)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pad token.*")
        dataset = GPTDataset(low_level, prefix, low_level.document_indices[:-1], 2, Split.train, config)
    seen = [token for index in range(2) for token in dataset[index]["tokens"].tolist()]
    assert set(seen) <= {*b"abcdefghijkl", EOD}
    assert seen.count(EOD) >= 2
    sample = dataset[0]
    assert sample["loss_mask"].tolist() == [float(token != EOD) for token in sample["tokens"].tolist()]


def test_local_hugging_face_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # training below would start threads before the fork
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["the quick brown fox", "jumps over the lazy dog"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    model.train_from_iterator(words, trainer)
    folder = tmp_path / "tokenizer"
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>").save_pretrained(folder)

    source = write_jsonl(tmp_path / "corpus.jsonl", words)
    argv = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder, "--append-eod", "--workers", 2]
    assert run("--input", source, "--output-prefix", tmp_path / "out", *argv) == 0
    for tokens, text in zip(documents(tmp_path / "out_text_document"), words, strict=True):
        assert tokens[-1] == model.token_to_id("<eos>")
        assert model.decode(tokens[:-1]) == text


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder like a standard library: text, a file that is wrong on purpose, an empty one, and foreign packages."""
    folder = tmp_path / "lib"
    for name in [f"package{n % 5}/module{n}.py" for n in range(200)] + [
        "site-packages/foreign.py",
        "bad.py",
        "empty.py",
    ]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"print({name!r})\n")
    (folder / "bad.py").write_bytes(b"# \xff\n")
    (folder / "empty.py").write_bytes(b"")
    return folder


def test_demo_data_has_every_source_once_and_is_made_once(
    tmp_path: Path, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--out", str(tmp_path / "out"), "--source", str(sources), "--workers", "1"]
    assert make_demo_data.main(argv) == 0
    assert capsys.readouterr().out.count("\n") == 1
    train, valid = (documents(tmp_path / "out" / f"{part}_text_document") for part in ("train", "valid"))
    expected = [byte_tokens(path.read_text()) for path in sources.glob("package*/*.py")]
    assert sorted(train + valid) == sorted(expected)
    assert 0 < len(valid) < 0.2 * len(expected)

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert make_demo_data.main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == made


def test_incomplete_demo_data_is_made_again(tmp_path: Path, sources: Path) -> None:
    argv = ["--out", str(tmp_path / "out"), "--source", str(sources), "--workers", "1"]
    assert make_demo_data.main(argv) == 0
    data = tmp_path / "out" / "train_text_document.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:100])
    assert make_demo_data.main(argv) == 0
    assert data.read_bytes() == whole


def test_demo_data_needs_enough_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_demo_data.main(["--out", str(tmp_path / "out"), "--source", str(tmp_path)]) == 2
    assert "--source" in capsys.readouterr().err
