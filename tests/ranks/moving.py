"""Jobs of the tiny model taken from layout to layout by the library, and what they hold before and after."""

from __future__ import annotations

import gc
from typing import Any
from unittest import mock

from copus_ext.core.plan import Layout, Plan


def start(flags: str, plan: Plan) -> tuple[Any, Any]:
    """Upstream up, and random numbers the same for every job that is built."""
    import torch

    from tests.ranks.tiny import raw_arguments, start_upstream

    torch.compiler.set_stance("force_eager")
    gc.freeze()
    raw = raw_arguments(flags)
    _, layouts, _ = start_upstream(raw, plan)
    return raw, layouts


def seeded(layouts: Any, raw: Any, plan: Plan) -> Any:
    import torch

    from tests.ranks.steps import build

    torch.manual_seed(raw.seed)
    return build(layouts, raw, plan)


def moved(job: Any, plan: Plan, raw: Any, layouts: Any, left: dict[Layout, Any], **options: Any) -> tuple[Any, Any]:
    """The job under ``plan``, in one that was ``left`` in its layout where there is one, and how it got there.

    Its small tensors go as large ones do: their pages change places, and those that lie in one piece are not packed.
    """
    from copus_ext.adapters import exchange, pages
    from copus_ext.adapters.carry import carry_scheduler
    from copus_ext.adapters.reshard import reshard
    from tests.ranks.steps import build

    new = left.pop(plan.layout, None) or build(layouts, raw, plan, initialise_weights=False)
    layouts.activate(plan.layout, new.args)
    with mock.patch.object(pages, "_LEAST", pages.PAGESIZE), mock.patch.object(exchange, "_DIRECT_BYTES", 2**12):
        report = reshard(job, new, **options)
    carry_scheduler(job, new)
    return new, report


def finish_gathers(job: Any) -> None:
    if job.args.overlap_param_gather:
        for chunk in job.model:
            chunk.start_param_sync(force_sync=True)


def on_this_rank(job: Any) -> list[Any]:
    """Copies of all that a job keeps, without gathering."""
    from copus_ext.adapters.carry import optimizer_step
    from copus_ext.adapters.job_state import job_state

    tensors = [t for piece in job_state(job, with_moments=optimizer_step(job) >= 0).pieces for t in piece.tensors]
    tensors += [parameter for chunk in job.model for parameter in chunk.parameters()]
    return [tensor.detach().clone() for tensor in tensors]


def equal(left: list[Any], right: list[Any]) -> bool:
    import torch

    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def is_hollow(job: Any) -> bool:
    from copus_ext.adapters.hollow import is_hollow

    return all(is_hollow(parameter) for chunk in job.model for parameter in chunk.parameters())
