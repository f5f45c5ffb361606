"""The dataset index builder is already compiled in the wheel, which carries no Makefile to compile it with."""

from __future__ import annotations

import importlib.util

from megatron.patches.registry import Patch


def apply() -> None:
    """Skip compiling where the compiled extension can be found."""
    import megatron.core.datasets.utils as datasets

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        datasets.compile_helpers = lambda: None


PATCH = Patch(
    name="data_helpers",
    upstream=("megatron.core.datasets.utils.compile_helpers",),
    why="initialize_megatron runs `make` in a folder of the wheel that has no Makefile and exits",
    issue="none known",
    remove_when="upstream compiles only where helpers_cpp is missing",
    apply=apply,
)
