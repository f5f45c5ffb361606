"""``python -m megatron.patches [--record]``: list the patches and their state against the installed Megatron."""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings

from copus_ext.core.errors import UserError
from megatron.patches import all_patches
from megatron.patches.registry import (
    UPSTREAM_VERSION,
    Patch,
    check_installation,
    mismatches,
    record_fingerprints,
)


def _describe(patch: Patch, wrong: list[str]) -> str:
    state = f"DOES NOT FIT: {', '.join(wrong)} changed" if wrong else "fits"
    lines = [("upstream", ", ".join(patch.upstream)), ("why", patch.why), ("issue", patch.issue)]
    lines += [("goes when", patch.remove_when), ("state", state)]
    body = [
        textwrap.fill(text, 110, initial_indent=f"  {key:<10}", subsequent_indent=" " * 12, break_long_words=False)
        for key, text in lines
    ]
    return "\n".join([patch.name, *body])


def main() -> int:
    """Print the list; 0 when every patch fits, 1 when one does not, 2 when there is nothing to fit."""
    parser = argparse.ArgumentParser(prog="python -m megatron.patches", description=__doc__)
    parser.add_argument("--record", action="store_true", help="record fingerprints of what is installed now")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # upstream's, of GPU libraries that are not there
    try:
        check_installation()
    except UserError as error:
        print(f"megatron.patches: {error}", file=sys.stderr)
        return 2
    patches = all_patches()
    if arguments.record:
        record_fingerprints(patches)
    found = {patch.name: mismatches(patch) for patch in patches}
    print(f"megatron-core {UPSTREAM_VERSION}: {len(patches)} patches\n")
    print("\n\n".join(_describe(patch, found[patch.name]) for patch in patches))
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
