"""What a machine can do, as far as the time and memory of a training step depend on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Hardware:
    """What the step time depends on. Speeds are what is reached in practice, not what is printed on the box.

    ``flops`` [FLOP/s] is one device computing alone, ``node_flops`` all devices of a node at once: devices x flops on
    GPUs, far less where the "devices" are processes that share cores. Bandwidths in bytes/s, of one device, one way.
    """

    flops: float
    node_flops: float
    memory_bandwidth: float
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    latency_s: float  # of one message; a collective over n ranks takes 2 log2(n) of them one after another
    devices_per_node: int
    memory_bytes: float  # of one device
    step_overhead_s: float
    layer_overhead_s: float  # launching one layer's forward and backward pass for one micro-batch

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and (value > 0 or (value == 0 and field.name.endswith("_s")))):
                raise ValueError(f"{field.name} of the hardware must be a positive number, not {value}")

    def busy_devices(self, world_size: int) -> float:
        """How many devices computing alone would do as much as the nodes of this job do together."""
        per_node = min(self.node_flops / self.flops, min(world_size, self.devices_per_node))
        return per_node * max(1.0, world_size / self.devices_per_node)


def shared_cpu(cores: int, ranks: int, memory_bytes: float) -> Hardware:
    """Several ranks that share the cores of one machine. Rough figures of a server core; measuring corrects them."""
    flops_per_core, copy_bandwidth = 40e9, 10e9
    return Hardware(
        flops=flops_per_core,
        node_flops=flops_per_core * min(cores, ranks),
        memory_bandwidth=copy_bandwidth,
        intra_node_bandwidth=1e9,  # gloo through the loopback device, both ends on our own cores
        inter_node_bandwidth=1e8,
        latency_s=1e-4,
        devices_per_node=ranks,
        memory_bytes=memory_bytes / ranks,
        step_overhead_s=0.01,
        layer_overhead_s=3e-3,
    )


# Peak dense bf16 FLOP/s, memory bandwidth and link bandwidths of one device, one way, in bytes/s, from the makers' data
# sheets: H100 and H200 SXM (NVLink 4, 400 Gbit/s InfiniBand), A100 SXM (NVLink 3, 200 Gbit/s), MI210 and MI250X (per
# GCD; xGMI). The link between nodes is what such clusters commonly have.
_GPUS = {
    "H200": (989e12, 4.8e12, 450e9, 50e9),
    "H100": (989e12, 3.35e12, 450e9, 50e9),
    "A100": (312e12, 2.0e12, 300e9, 25e9),
    "MI250": (191e12, 1.6e12, 75e9, 12.5e9),
    "MI210": (181e12, 1.6e12, 75e9, 12.5e9),
}
_REACHED = 0.55  # of the peaks, in practice
_UNKNOWN_GPU = "A100"


def gpu_hardware(name: str, devices_per_node: int, memory_bytes: float) -> Hardware:
    """Figures for the GPU that calls itself ``name``; an A100's for one that is not known (measuring corrects them)."""
    kind = next((kind for kind in _GPUS if kind in name), _UNKNOWN_GPU)
    flops, memory, inside, outside = (_REACHED * peak for peak in _GPUS[kind])
    return Hardware(
        flops=flops,
        node_flops=flops * devices_per_node,
        memory_bandwidth=memory,
        intra_node_bandwidth=inside,
        inter_node_bandwidth=outside,
        latency_s=1e-5,
        devices_per_node=devices_per_node,
        memory_bytes=memory_bytes,
        step_overhead_s=0.02,
        layer_overhead_s=3e-4,
    )
