"""When a switch is worth its cost: ``--copus-switch-rule amortised|threshold:0.10``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.errors import UserError

Array = NDArray[np.float64]

_FLAG = "--copus-switch-rule"
AMORTISED, THRESHOLD = "amortised", "threshold"


@dataclass(frozen=True)
class SwitchRule:
    """``threshold`` is the gain that is asked for, whatever a switch costs; None: what repays it in the time left.

    The amortised rule asks that of the lower quartile of the gain; the threshold of the median, as the COPUS paper's
    fixed 10 % does (arXiv 2604.26687), which knows no uncertainty.
    """

    threshold: float | None = None

    def needed(self, switch_cost_s: Array, horizon_s: float) -> Array:
        """[n] gains from which on switches of that cost [s] are made with ``horizon_s`` seconds left.

        Amortised: C / (H - C), infinite where the switch takes all the time left. With it, (H - C) seconds at 1 + gain
        are worth more than H seconds at 1.
        """
        if self.threshold is not None:
            return np.full_like(switch_cost_s, self.threshold)
        left = horizon_s - switch_cost_s
        return np.divide(switch_cost_s, left, out=np.full_like(switch_cost_s, math.inf), where=left > 0)

    def weighed(self, gain: Array, gain_low: Array) -> Array:
        """Of the median and the lower quartile of a gain, the one that has to exceed what is needed."""
        return gain_low if self.threshold is None else gain


def parse_switch_rule(text: str) -> SwitchRule:
    """Read the flag.

    Raises:
        UserError: it is neither.
    """
    name, colon, value = text.partition(":")
    if name == AMORTISED and not colon:
        return SwitchRule()
    try:
        threshold = float(value)
    except ValueError:
        threshold = math.nan
    if name != THRESHOLD or not 0 <= threshold < math.inf:
        raise UserError(f"{_FLAG} {text}: give {AMORTISED}, or {THRESHOLD} with a gain like {THRESHOLD}:0.10")
    return SwitchRule(threshold)
