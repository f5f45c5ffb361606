"""Layout alone: the fastest one for the global batch of the flags, which stays.

What Mist does before a run (Zhu et al. 2025, arXiv 2503.19050), with this project's own search and step times:
recompute and ZeRO-1 are chosen, too, unless ``--copus-space`` says which.
"""

from __future__ import annotations

from dataclasses import dataclass

from copus_ext.core.plan import Plan
from copus_ext.core.planner.policy import Options, Policy, PolicySettings
from copus_ext.core.planner.switch_rule import parse_switch_rule
from copus_ext.core.policies.copus import CopusPolicy


@dataclass(frozen=True)
class LayoutOnlyPolicy(CopusPolicy):
    """Goodput at one batch, where it is throughput."""

    opens = ("recompute", "zero1")


def make(settings: PolicySettings, base: Plan, options: Options) -> Policy:
    """It has no options. At one batch all statistical efficiencies are the same, so there is no objective to choose."""
    return LayoutOnlyPolicy(settings.dwell_steps, max_growth=1.0, rule=parse_switch_rule(settings.switch_rule))
