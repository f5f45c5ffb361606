"""Seesaw: where the schedule halves the learning rate, double the batch, and the rate falls by 1 / sqrt(2) only.

Meterez et al. 2025 (arXiv 2510.14717): "whenever a standard scheduler would halve the learning rate, Seesaw instead
multiplies it by 1/sqrt(2) and doubles the batch size". The batch is the flags' times 2^k with k the halvings that the
schedule has made, and ``--copus-lr-rule sqrt`` multiplies the schedule by sqrt(2^k). So right behind a cut the rate is
1 / sqrt(2) of what it was behind the one before. Between cuts it follows the schedule on; theirs, as
far as we know, stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from copus_ext.core.errors import UserError
from copus_ext.core.plan import Plan
from copus_ext.core.planner.batch_change import batches_here, grown_to, stay
from copus_ext.core.planner.decision import Decision, Situation
from copus_ext.core.planner.policy import FLAG, Options, Policy, PolicySettings

_ROUNDING = 1e-9  # of the number of cuts: a rate that is 1/8 up to rounding is three halvings


@dataclass(frozen=True)
class SeesawPolicy(Policy):
    """The batch is ``base_batch`` x ``factor``^k, k the cuts by ``factor`` that the schedule has made; layout fixed."""

    searches = True

    base_batch: int
    factor: float = 2.0

    def cuts(self, rate_share: float) -> float:
        """How many times the rate was cut by ``factor``; infinite where it is 0."""
        if rate_share <= 0:
            return math.inf
        return max(0, math.floor(math.log(1 / rate_share) / math.log(self.factor) + _ROUNDING))

    def decide(self, situation: Situation) -> Decision:
        """Count the cuts."""
        current, largest = situation.current.global_batch, batches_here(situation)[-1]
        cuts = self.cuts(situation.rate_share)
        exponent = min(cuts, math.log(largest / self.base_batch, self.factor) + 1)  # beyond the largest anyway
        wanted = round(self.base_batch * self.factor**exponent)
        rate = f"{situation.rate_share:.4g} of its peak"
        said = f"the learning rate is scheduled at {rate}, {cuts:g} cuts by {self.factor:g}"
        if wanted <= current:
            return stay(situation, f"{said}, for which batch {current} is enough")
        return grown_to(situation, wanted, said)


def make(settings: PolicySettings, base: Plan, options: Options) -> Policy:
    """Option ``factor``, above 1.

    Raises:
        UserError: a factor or a rule of the learning rate that is not theirs.
    """
    factor = options.positive("factor", 2.0)
    if factor <= 1:
        raise UserError(f"{FLAG} seesaw:factor={factor:g}: give a number above 1")
    if settings.lr_rule != "sqrt":
        raise UserError(f"{FLAG} seesaw needs --copus-lr-rule sqrt, not {settings.lr_rule}: the rate falls by its root")
    return SeesawPolicy(base.global_batch, factor)
