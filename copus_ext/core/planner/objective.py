"""What a plan is wanted for: ``--copus-objective goodput|paper``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.errors import UserError
from copus_ext.core.planner.learning_rate import learning_rate_factor

_FLAG = "--copus-objective"
GOODPUT, PAPER = "goodput", "paper"


@dataclass(frozen=True)
class Objective:
    """Goodput, throughput x statistical efficiency; times (batch)^``exponent`` in the paper's form.

    The COPUS paper (arXiv 2604.26687) multiplies by the learning rate's factor, sqrt(B) where the rate follows sqrt(B).
    Where the rate was tuned at the first batch that counts the same gain twice, so it is not the default.
    """

    exponent: float = 0.0

    def log_bonus(self, batch_ratio: NDArray[np.float64]) -> NDArray[np.float64]:
        """[n] what is added to ln Goodput at batches of that ratio to the current one."""
        return self.exponent * np.log(batch_ratio)


def parse_objective(text: str, lr_rule: str) -> Objective:
    """Read the flag; ``lr_rule``: that of ``--copus-lr-rule``, of which AdaScale is taken as for a large noise scale.

    Raises:
        UserError: there is no such objective, or rule.
    """
    if text not in (GOODPUT, PAPER):
        raise UserError(f"{_FLAG} {text}: choose from {GOODPUT}, {PAPER}")
    exponent = math.log2(learning_rate_factor(lr_rule, 4, 1)) / 2  # every rule is a power of the batch
    return Objective(exponent) if text == PAPER else Objective()
