"""The policy of a plain run: the plan never changes."""

from __future__ import annotations

from dataclasses import dataclass

from copus_ext.core.decision import Decision, Situation


@dataclass(frozen=True)
class StaticPolicy:
    """Keeps the plan it is given."""

    @property
    def searches(self) -> bool:
        """It needs no candidates."""
        return False

    def next_change(self, consumed_samples: int) -> int | None:
        """Nothing is known to change."""
        return None

    def decide(self, situation: Situation) -> Decision:
        """Stay."""
        return Decision(situation.current, situation.current, "stay: the policy is static")
