"""What a machine can do, as far as the time and memory of a training step depend on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Reached:
    """What a training step makes of the figures on the box; ``tools/fit_throughput.py`` fits them to published runs.

    Shares of the peak where nothing else is said. All ones where the figures of the hardware were measured.
    """

    matmul: float = 1.0  # of a matrix product that is large in every direction
    half_tokens: float = 0.0  # tokens at which a product reaches half of that
    half_width: float = 0.0  # the same, of the smaller side of the weights
    attention: float = 1.0  # of the peak, by a fused kernel
    scores: float = 1.0  # of the peak, where attention is two batches of products with the scores held in between
    memory: float = 1.0  # of the memory's bandwidth, element-wise work
    intra_node: float = 1.0
    inter_node: float = 1.0
    fp8: float = 1.0  # of twice the speed of bf16 that 8-bit products promise
    tensor_exposed: float = 1.0  # of tensor-parallel messages: what does not hide behind computing where it may
    pipeline_exposed: float = 1.0  # of messages between stages
    data_exposed: float = 1.0  # of the gradients' and parameters' messages that may be overlapped


@dataclass(frozen=True)
class Hardware:
    """What the step time depends on: figures of the data sheet, and what of them is ``reached``.

    ``flops`` [FLOP/s] is one device computing alone in bf16, ``fp32_flops`` in fp32 where that is another speed,
    ``node_flops`` all devices of a node at once: devices x flops on GPUs, far less where the "devices" are processes
    that share cores.
    Bandwidths in bytes/s, of one device, one way.
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
    reached: Reached = field(default_factory=Reached)
    fp32_flops: float | None = None

    def peak(self, element_bytes: int) -> float:
        """FLOP/s of one device on numbers of so many bytes: 8-bit products are the business of ``Reached.fp8``."""
        return self.flops if element_bytes < 4 or self.fp32_flops is None else self.fp32_flops

    def __post_init__(self) -> None:
        for name, value in _numbers(self):
            if not (math.isfinite(value) and (value > 0 or (value == 0 and may_be_zero(name)))):
                raise ValueError(f"{name} of the hardware must be a positive number, not {value}")

    def busy_devices(self, world_size: Any) -> Any:
        """How many devices computing alone would do as much as the nodes of this job do together; numbers or arrays."""
        nodes = np.maximum(1.0, world_size / self.devices_per_node)
        return nodes * np.minimum(self.node_flops / self.flops, np.minimum(world_size, self.devices_per_node))


def _numbers(hardware: Hardware) -> list[tuple[str, float]]:
    own = [(entry.name, getattr(hardware, entry.name)) for entry in fields(hardware) if entry.name != "reached"]
    return [(name, value) for name, value in own if value is not None] + list(asdict(hardware.reached).items())


def may_be_zero(name: str) -> bool:
    """Of the figure called ``name``: times and shares may be, speeds and sizes may not."""
    return name.endswith(("_s", "_exposed")) or name.startswith("half_")


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
        layer_overhead_s=6e-3,  # as in a sweep of small models: tests/data/cpu_sweep_4_ranks.csv
    )


def hardware_from_json(values: Mapping[str, Any]) -> Hardware:
    """Inverse of ``dataclasses.asdict``."""
    return Hardware(**{**values, "reached": Reached(**values["reached"])})
