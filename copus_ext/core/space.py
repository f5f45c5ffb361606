"""Which plans a run may choose from: ``--copus-space "tp=1,2,4 pp=1,2 mbs=1,2,4 gbs=16..2048"``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from copus_ext.core.candidates import candidate_plans
from copus_ext.core.errors import UserError
from copus_ext.core.model_shape import ModelShape
from copus_ext.core.plan import Plan

_FLAG = "--copus-space"
_BATCH_SPAN = 16  # how far the global batch may go from the first one, either way, where the flag does not say


@dataclass(frozen=True)
class Space:
    """Allowed values by dimension; ``None`` allows what the ranks and the model allow.

    ``mbs`` defaults to the first plan's micro-batch and its halves: larger ones may not fit in memory.
    """

    tp: tuple[int, ...] | None = None
    pp: tuple[int, ...] | None = None
    mbs: tuple[int, ...] | None = None
    gbs: tuple[int, int] | None = None

    def global_batches(self, base: Plan) -> list[int]:
        """The first global batch times powers of two, within the bounds."""
        low, high = self.gbs or (max(1, base.global_batch // _BATCH_SPAN), base.global_batch * _BATCH_SPAN)
        grown = [base.global_batch << k for k in range(64) if base.global_batch << k <= high]
        shrunk = [base.global_batch >> k for k in range(1, 64) if base.global_batch >> k >= low]
        whole = [batch for batch in shrunk if base.global_batch % batch == 0]
        return sorted({base.global_batch, *whole, *(batch for batch in grown if batch >= low)})

    def plans(self, base: Plan, model: ModelShape) -> list[Plan]:
        """Every plan of this space that the model allows, in a fixed order."""
        halves = [base.micro_batch >> k for k in range(base.micro_batch.bit_length())]
        found = candidate_plans(base, model, self.global_batches(base), self.mbs or halves)
        return [plan for plan in found if self._allows(plan)]

    def _allows(self, plan: Plan) -> bool:
        wanted = ((self.tp, plan.layout.tp), (self.pp, plan.layout.pp))
        return all(allowed is None or value in allowed for allowed, value in wanted)


def parse_space(text: str) -> Space:
    """Read the flag: words ``name=values``, where values are ``1,2,4``, or ``low..high`` for gbs.

    Raises:
        UserError: a word that is not understood.
    """
    readers: dict[str, Callable[[str], Any]] = {"tp": _numbers, "pp": _numbers, "mbs": _numbers, "gbs": _bounds}
    values: dict[str, Any] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in readers or name in values:
            raise UserError(f"{_FLAG}: {word!r} is not understood; write it like tp=1,2 pp=1,2,4 mbs=1,2 gbs=16..512")
        try:
            values[name] = readers[name](value)
        except ValueError:
            raise UserError(f"{_FLAG}: {value!r} are no values for {name}; write tp=1,2,4 or gbs=16..512") from None
    return Space(**values)


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise ValueError
    return numbers


def _bounds(text: str) -> tuple[int, int]:
    low, dots, high = text.partition("..")
    bounds = (int(low), int(high if dots else low))
    if not 1 <= bounds[0] <= bounds[1]:
        raise ValueError
    return bounds
