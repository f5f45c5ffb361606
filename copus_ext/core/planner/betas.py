"""What a change of the batch size does to the averages that Adam keeps."""

from __future__ import annotations

import math

from copus_ext.core.errors import UserError

KEPT, HALF_LIFE = "none", "half-life"
BETA_RULES = (KEPT, HALF_LIFE)


def check_beta_rule(rule: str, optimizer: str) -> None:
    """Check ``--copus-beta-rule`` against upstream's ``--optimizer``.

    Raises:
        UserError: a rule that does not exist, or an optimizer without Adam's betas.
    """
    if rule not in BETA_RULES:
        raise UserError(f"--copus-beta-rule {rule}: there is no such rule; choose one of {', '.join(BETA_RULES)}")
    if rule != KEPT and optimizer != "adam":
        raise UserError(
            f"--copus-beta-rule {rule} is about the betas of Adam, and --optimizer {optimizer} has others or none; "
            f"use --copus-beta-rule {KEPT}, or --optimizer adam"
        )


def beta_at_batch(rule: str, beta: float, batch: int, base_batch: int) -> float:
    """What ``beta``, chosen for ``base_batch``, is under ``batch``, both in sequences; for each of Adam's two alike.

    ``half-life``: beta^(batch / base_batch), so that averages forget half after as many tokens as before. Marek et al.
    2025 (arXiv 2507.07101) propose it for beta2. To first order in 1 - beta it is what Malladi et al. 2022 (arXiv
    2205.10287) do with both betas beside their square root rule: (1 - beta) grows with the batch. ``none``: ``beta``.
    """
    return beta ** (batch / base_batch) if rule == HALF_LIFE else beta


def steps_of_like_age(steps: int, beta: float, new_beta: float) -> int:
    """Steps under ``new_beta`` after which an average has forgotten as much as after ``steps`` under ``beta``.

    Adam divides its averages by 1 - beta^steps, the weight of what they have seen (Kingma and Ba 2015, arXiv 1412.6980,
    section 3). Where beta changes on the way that weight is another one, unless the steps are counted anew:
    ``new_beta^n == beta^steps``. Under a constant half-life n is the tokens that were seen over those of a step. To the
    nearest whole number, as fused optimizers count in these, and at least 1 where a step was made.
    """
    if steps <= 0 or beta == new_beta or not (0 < beta < 1 and 0 < new_beta < 1):
        return steps
    return max(1, round(steps * math.log(beta) / math.log(new_beta)))
