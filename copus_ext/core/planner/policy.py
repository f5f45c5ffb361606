"""What a policy is, and what the flags tell it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from copus_ext.core.errors import UserError
from copus_ext.core.plan import Plan
from copus_ext.core.planner.decision import Decision, Situation

FLAG = "--copus-policy"


class Policy:
    """Chooses plans. A pure function of what it is shown: the same situation gives the same decision.

    ``searches``: it chooses among the candidates of ``--copus-space``; else there need be none. ``opens``: dimensions
    of that space that are open where the flag does not name them, and not as the flags of the run say.
    ``needs_whole_gradient``: N and S have to be those of the gradient, not of norm layers or of a preconditioned one.
    ``needs_inner_products``: the statistic of the inner product test is to be measured with the noise scale.
    """

    searches: bool = False
    needs_whole_gradient: bool = False
    opens: tuple[str, ...] = ()
    needs_inner_products: bool = False

    def named_plans(self, base: Plan) -> tuple[Plan, ...]:
        """Plans that are known to come, checked before training starts; ``base``: of the flags."""
        return (base,)

    def plan_at(self, consumed_samples: int) -> Plan | None:
        """The plan of the step that starts there, where it is known beforehand."""
        return None

    def next_change(self, consumed_samples: int) -> int | None:
        """Samples at which a change is already known to come, so that a step must end there; None if there is none."""
        return None

    def decide(self, situation: Situation) -> Decision:
        """The plan to go on with from here, and why."""
        raise NotImplementedError


@dataclass(frozen=True)
class PolicySettings:
    """What the flags say of a policy: plain values, logged with the run so that its decisions can be made again.

    ``policy`` is ``name`` or ``name:option=value,option=value``. ``rampup`` and ``step_schedule`` are upstream's
    ``--rampup-batch-size`` and ``--step-batch-size-schedule``, whose thresholds are tokens: so ``seq_length``, tokens
    in a sequence. ``probe_budget`` is a share of the run's time.
    """

    policy: str = "copus"
    schedule: str | None = None
    objective: str = "goodput"
    switch_rule: str = "amortised"
    dwell_steps: int = 10
    max_growth: float = 2.0
    lr_rule: str = "sqrt"
    probe_budget: float = 0.01
    train_samples: int = 0
    rampup: tuple[int, ...] | None = None
    step_schedule: str | None = None
    seq_length: int = 1

    @property
    def name(self) -> str:
        """The policy's name alone."""
        return self.policy.partition(":")[0]

    def check(self) -> None:
        """Check the numbers, which mean the same to every policy.

        Raises:
            UserError: one that can't be.
        """
        for flag, number, least in (
            ("--copus-dwell-steps", self.dwell_steps, 0),
            ("--copus-max-growth", self.max_growth, 1),
        ):
            if not number >= least:  # nan is none of them
                raise UserError(f"{flag} {number:g} is too small; give at least {least}")
        if not 0 <= self.probe_budget < 1:
            raise UserError(f"--copus-probe-budget {self.probe_budget:g} is a share of the run: give 0 to below 1")

    def to_json(self) -> dict[str, Any]:
        """Plain values for the event log."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> PolicySettings:
        """Inverse of :meth:`to_json`."""
        rampup, growth = values["rampup"], values["max_growth"]
        return PolicySettings(
            **{
                **values,
                "rampup": None if rampup is None else tuple(rampup),
                "max_growth": math.inf if growth is None else growth,  # JSON has no infinities
            }
        )


class Options:
    """``name=value`` pairs behind a policy's name. Each is read once; :meth:`check_all_read` refuses the others."""

    def __init__(self, text: str) -> None:
        """``text``: the whole value of the flag.

        Raises:
            UserError: something that is no pair.
        """
        self.policy, _, rest = text.partition(":")
        self._values: dict[str, str] = {}
        self._known: list[str] = []
        for word in filter(None, rest.split(",")):
            name, equals, value = word.partition("=")
            if not (equals and value) or name in self._values:
                raise UserError(f"{FLAG} {text}: {word!r} is no option; write {self.policy}:name=value,name=value")
            self._values[name] = value

    def text(self, name: str) -> str | None:
        """The value as it stands; None where it was not given."""
        self._known.append(name)
        return self._values.pop(name, None)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """One of ``choices``, the first by default."""
        value = self.text(name) or choices[0]
        if value not in choices:
            raise UserError(f"{FLAG} {self.policy}:{name}={value}: choose from {', '.join(choices)}")
        return value

    def positive(self, name: str, default: float) -> float:
        """A number above 0."""
        value = self.text(name)
        if value is None:
            return default
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 < number < float("inf"):
            raise UserError(f"{FLAG} {self.policy}:{name}={value}: give a number above 0")
        return number

    def check_all_read(self) -> None:
        """Refuse what nobody asked for.

        Raises:
            UserError: there is something left.
        """
        for name in self._values:
            has = f"only {', '.join(self._known)}" if self._known else "it has none"
            raise UserError(f"{FLAG} {self.policy}: there is no option {name!r} here; {has}")
