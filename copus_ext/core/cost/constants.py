"""What the closed form cannot know from data sheets: fitted once to published runs, used for every GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from copus_ext.core.cost.hardware import Hardware, Reached

FITTED = Path(__file__).parents[2] / "published" / "fit.json"


@dataclass(frozen=True)
class Constants:
    """``reached`` are shares of the figures on the box; the rest, seconds."""

    latency_s: float
    layer_overhead_s: float
    step_overhead_s: float
    reached: Reached = field(default_factory=Reached)

    def of(self, hardware: Hardware) -> Hardware:
        """The hardware with these constants instead of its own."""
        return replace(hardware, **vars(self))


OVERHEADS = tuple(entry.name for entry in fields(Constants) if entry.name != "reached")  # in seconds


def constants_from_json(values: Mapping[str, Any]) -> Constants:
    """Inverse of ``dataclasses.asdict``."""
    return Constants(**{**values, "reached": Reached(**values["reached"])})


@cache
def fitted_constants() -> Constants:
    """As ``tools/fit_throughput.py`` found them."""
    return constants_from_json(json.loads(FITTED.read_text())["constants"])
