"""Real text for the demo without a download: the source code of this Python's own standard library.

Writes ``train_text_document`` and ``valid_text_document`` (.bin and .idx, byte-level tokens) under ``--out``. A file is
in one of the two by a hash of its path, so the split is the same every time. Does nothing when all of it is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from copus_ext.core.errors import UserError
from preprocess_data import Summary, parse_arguments, preprocess

_VALID_PERCENT = 5
_PARTS = ("train", "valid")
_MANIFEST = "demo_data.json"
_FOREIGN = {"site-packages", "dist-packages"}


def part_of(relative_path: str) -> str:
    """``train`` or ``valid``, from nothing but the path of a file below the source folder."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return "valid" if int.from_bytes(digest[:4]) % 100 < _VALID_PERCENT else "train"


def find_sources(folder: Path) -> dict[str, list[Path]]:
    """The .py files of each part in sorted order: those that are UTF-8 text and not from installed packages.

    Raises:
        UserError: too few files for two parts.
    """
    found: dict[str, list[Path]] = {part: [] for part in _PARTS}
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if not _FOREIGN & set(relative.parts) and _is_text(path):
            found[part_of(relative.as_posix())].append(path)
    for part, files in found.items():
        if not files:
            raise UserError(f"--source: {folder} has too few .py files, none is left for {part}")
    return found


def _is_text(path: Path) -> bool:
    """Whether it is UTF-8; the standard library's tests hold files that are wrong on purpose."""
    try:
        return bool(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, OSError):
        return False


def is_complete(out: Path, source: Path) -> bool:
    """Whether the manifest, written last, agrees with what was asked for and with the files there are."""
    try:
        manifest = json.loads((out / _MANIFEST).read_text())
        return bool(manifest == _manifest(out, source))
    except (OSError, ValueError):
        return False


def _manifest(out: Path, source: Path) -> dict[str, Any]:
    names = [f"{part}_text_document.{suffix}" for part in _PARTS for suffix in ("bin", "idx")]
    return {"source": str(source), "sizes": {name: (out / name).stat().st_size for name in names}}


def write_part(part: str, files: Sequence[Path], out: Path, workers: int) -> Summary:
    """Tokenize the files of one part."""
    options = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod", "--workers", str(workers)]
    options += ["--output-prefix", str(out / part), "--input", *map(str, files)]
    return preprocess(parse_arguments(options))


def make_demo_data(out: Path, source: Path, workers: int) -> str:
    """Write both parts unless they are there, and say in a line what was done."""
    if is_complete(out, source):
        return f"Demo data: {out} is complete, nothing to do"
    (out / _MANIFEST).unlink(missing_ok=True)
    sources = find_sources(source)
    written = [f"{part}: {write_part(part, sources[part], out, workers)}" for part in _PARTS]
    (out / _MANIFEST).write_text(json.dumps(_manifest(out, source), indent=2) + "\n")
    return f"Demo data in {out} from {source}; {'; '.join(written)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; 0, or 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the data goes")
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        metavar="DIR",
        help="a folder of .py files (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N")
    args = parser.parse_args(argv)
    try:
        print(make_demo_data(args.out, args.source, args.workers))
    except UserError as error:
        print(f"make_demo_data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
