"""One gloo device for all process groups of a process, instead of one for each.

A device of gloo has a thread that looks for traffic a hundred times a second, whether there is any or not. Upstream
makes some twenty groups for a layout, and a job that has been in five layouts has sixty of them on each rank. Where
ranks share cores these threads get in the way of every step and every switch.

All traffic of a process goes through one thread then. That is the right trade where gloo carries small messages beside
NCCL or RCCL, and where ranks share cores; a CPU of its own for each rank and a network of 40 Gbit/s could want more.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

from megatron.patches.registry import Patch


def apply() -> None:
    """Have every gloo group use the devices that torch has chosen for the first one of the process."""
    from torch.distributed import distributed_c10d
    from torch.distributed.constants import default_pg_timeout

    group: Any = distributed_c10d.ProcessGroupGloo
    make = group.__init__
    devices: list[Any] = []

    @functools.wraps(make)
    def make_on_same_devices(
        self: Any, store: Any, rank: int, size: int, how: timedelta | Any = default_pg_timeout, **named: Any
    ) -> None:
        timeout = named.get("timeout", how)
        if not isinstance(timeout, timedelta):  # options of the caller's own
            make(self, store, rank, size, timeout)
        elif devices:
            options = group._Options()
            options._devices, options._threads, options._timeout = devices, 2 * len(devices), timeout
            make(self, store, rank, size, options)
        else:
            make(self, store, rank, size, timeout)
            devices.extend(self.options._devices)

    group.__init__ = make_on_same_devices


PATCH = Patch(
    name="gloo_devices",
    upstream=("torch.distributed.distributed_c10d.ProcessGroupGloo.__init__",),
    why="each gloo group has a thread that wakes a hundred times a second, which slows steps and switches on a CPU",
    issue="https://github.com/pytorch/gloo/issues/246",
    remove_when="gloo's event loop sleeps until there is something to do",
    apply=apply,
)
