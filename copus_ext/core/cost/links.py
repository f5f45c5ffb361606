"""Seconds that messages take: what every collective of a step is made of. Arrays in, arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np

from copus_ext.core.cost.hardware import Hardware


def all_reduce_s(size: Any, ranks: Any, stride: Any, hardware: Hardware) -> Any:
    """Seconds to all-reduce ``size`` bytes over ranks that are ``stride`` apart: 2 (n - 1) / n of them cross a link."""
    traffic = 2 * (ranks - 1) / ranks * size
    hops = 2 * np.log2(ranks) * hardware.latency_s
    return np.where(ranks > 1, traffic / bandwidth(ranks * stride, stride, hardware) + hops, 0.0)


def bandwidth(span: Any, stride: Any, hardware: Hardware) -> Any:
    """Bytes/s of a ring over ranks ``stride`` apart, ``span`` in all: those of a node share its ways out."""
    inside = hardware.intra_node_bandwidth * hardware.reached.intra_node
    members = np.maximum(1.0, hardware.devices_per_node // stride)
    outside = members * hardware.inter_node_bandwidth * hardware.reached.inter_node
    return np.where(span <= hardware.devices_per_node, inside, np.minimum(inside, outside))
