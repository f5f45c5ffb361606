"""One gloo device for all process groups of a process, instead of one for each.

A device of gloo has a thread that looks for traffic a hundred times a second, whether there is any or not. Upstream
makes some twenty groups for a layout, and a job that has been in five layouts has sixty of them on each rank. Where
ranks share cores these threads get in the way of every step and every switch.

All traffic of a process goes through one thread then. That is the right trade where gloo carries small messages beside
NCCL or RCCL, and where ranks share cores; a CPU of its own for each rank and a network of 40 Gbit/s could want more.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megatron.patches.registry import Patch


def apply() -> None:
    """Have every gloo group use the devices that torch has chosen for the first one of the process."""
    from torch.distributed import distributed_c10d

    group: Any = distributed_c10d.ProcessGroupGloo
    group.__init__ = _on_same_devices(group)


def _on_same_devices(group: Any) -> Callable[..., None]:
    """The constructor of a class of groups, for all who bring no options of their own."""
    make = group.__init__
    by_process: dict[int, list[Any]] = {}  # a fork has no thread of what it inherits

    @functools.wraps(make)
    def make_on_same_devices(self: Any, store: Any, rank: int, size: int, *given: Any, **named: Any) -> None:
        devices = by_process.setdefault(os.getpid(), [])
        how = (*given, *named.values())
        usual = named.keys() <= {"timeout"} and len(how) <= 1 and all(isinstance(one, timedelta) for one in how)
        if not (usual and devices):
            make(self, store, rank, size, *given, **named)
            if usual:  # an older torch does not tell, and each group has its own then
                devices.extend(getattr(getattr(self, "options", None), "_devices", ()))
            return
        options = group._Options()
        options._devices, options._threads = devices, 2 * len(devices)
        if how:
            options._timeout = how[0]
        make(self, store, rank, size, options)

    return make_on_same_devices


PATCH = Patch(
    name="gloo_devices",
    upstream=("torch.distributed.distributed_c10d.ProcessGroupGloo.__init__",),
    why="each gloo group has a thread that wakes a hundred times a second, which slows steps and switches on a CPU",
    issue="https://github.com/pytorch/gloo/issues/246",
    remove_when="gloo's event loop sleeps until there is something to do",
    apply=apply,
)
