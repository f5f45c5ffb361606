"""One communicator per (ranks, backend, role), however many layouts ask for it."""

from __future__ import annotations

import functools
from typing import Any

from megatron.patches.registry import Patch


def apply() -> None:
    """Make ``parallel_state.create_group`` give the group it already made when asked for the same one again."""
    from megatron.core import parallel_state

    create_group = parallel_state.create_group
    made: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(create_group)
    def create_or_reuse(ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        role = (tuple(ranks or ()), args, kwargs.get("backend"), kwargs.get("group_desc"))
        if role not in made:
            made[role] = create_group(ranks, *args, **kwargs)
        return made[role]

    parallel_state.create_group = create_or_reuse


PATCH = Patch(
    name="process_groups",
    upstream=("megatron.core.parallel_state.create_group",),
    why="making the groups of a layout again leaks communicators, threads and descriptors on every switch",
    issue="https://github.com/NVIDIA/Megatron-LM/issues/6897",
    remove_when="destroy_model_parallel() really destroys, or groups can be passed in everywhere",
    apply=apply,
)
