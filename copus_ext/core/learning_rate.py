"""What a change of the batch size does to the learning rate."""

from __future__ import annotations

import math

from copus_ext.core.errors import UserError

LR_RULES = ("sqrt", "linear", "none")


def learning_rate_factor(rule: str, batch: int, base_batch: int) -> float:
    """Factor on the learning rate that was chosen for ``base_batch``, both batches in sequences.

    ``sqrt``: for Adam, noise of the update kept equal (Malladi et al. 2022, arXiv 2205.10287). ``linear``: for SGD
    (Goyal et al. 2017, arXiv 1706.02677). ``none``: 1.

    Raises:
        UserError: a rule that does not exist.
    """
    if rule not in LR_RULES:
        raise UserError(f"--copus-lr-rule {rule}: there is no such rule; choose one of {', '.join(LR_RULES)}")
    if rule == "none":
        return 1.0
    ratio = batch / base_batch
    return math.sqrt(ratio) if rule == "sqrt" else ratio
