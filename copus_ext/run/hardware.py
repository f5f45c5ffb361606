"""What the machine is taken to be before any step has been measured."""

from __future__ import annotations

import argparse
import os

import torch

from copus_ext.adapters.measure import measure_shared_cpu
from copus_ext.core.cost.hardware import Hardware, shared_cpu
from copus_ext.core.cost.hardware_file import MEASURED, hardware_of_gpu, in_nodes_of, load_hardware
from copus_ext.core.errors import UserError
from copus_ext.run.config import HARDWARE_FLAG


def describe_hardware(raw: argparse.Namespace) -> Hardware:
    """Figures for the device this rank runs on, which measured step times correct.

    What ``--copus-hardware`` names; without it data sheets for GPUs, and for ranks that share the cores of one machine,
    what they reach together, measured in a second or two. Collective over all ranks.

    Raises:
        UserError: CPU cores are to be measured where the ranks have GPUs.
    """
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", raw.world_size))
    choice = raw.copus_hardware
    if choice is not None and choice.lower() != MEASURED:
        return in_nodes_of(load_hardware(choice, flag=HARDWARE_FLAG), ranks_per_node)
    if torch.cuda.is_available():
        if choice is not None:
            raise UserError(f"{HARDWARE_FLAG} {choice}: the ranks run on GPUs; leave the flag out, or name these")
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return hardware_of_gpu(properties.name, ranks_per_node, properties.total_memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rough = shared_cpu(len(os.sched_getaffinity(0)), ranks_per_node, memory)
    return measure_shared_cpu(rough) if ranks_per_node == raw.world_size else rough
