"""What the machine is taken to be before any step has been measured."""

from __future__ import annotations

import argparse
import os

import torch

from copus_ext.adapters.measure import measure_shared_cpu
from copus_ext.core.hardware import Hardware, gpu_hardware, shared_cpu


def describe_hardware(raw: argparse.Namespace) -> Hardware:
    """Figures for the device this rank runs on, which measured step times correct.

    Data sheets for GPUs; for ranks that share the cores of one machine, what they reach together, measured in a second
    or two. Collective over all ranks.
    """
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", raw.world_size))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return gpu_hardware(properties.name, ranks_per_node, properties.total_memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rough = shared_cpu(len(os.sched_getaffinity(0)), ranks_per_node, memory)
    return measure_shared_cpu(rough) if ranks_per_node == raw.world_size else rough
