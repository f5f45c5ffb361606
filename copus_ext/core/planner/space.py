"""Which plans a run may choose from: ``--copus-space "tp=1,2,4 pp=1,2 recompute=none,full gbs=16..2048"``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from copus_ext.core.cost.candidates import Candidates
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.search import SearchSpace, allowed_plans
from copus_ext.core.errors import UserError
from copus_ext.core.plan import RECOMPUTE_CHOICES, Plan

_FLAG = "--copus-space"
_EXAMPLE = "write it like tp=1,2 pp=1,2,4 mbs=1,2 recompute=none,full zero1=any gbs=16..512"
_BATCH_SPAN = 16  # how far the global batch may go from the first one, either way, where the flag does not say
_SWITCHES = {"on": True, "off": False}

ANY = None  # whatever the ranks and the model allow
GIVEN = ()  # what the flags of the run say

Sizes = tuple[int, ...] | None


@dataclass(frozen=True)
class Space:
    """Allowed values by dimension, in sequences where they are batches.

    ``mbs``, where it is given, defaults to the flags' micro-batch and its halves: larger ones may not fit in memory.
    ``vpp`` to the flags' and 1. ``gbs`` has lowest and highest; between them lie the flags' global batch times powers
    of two, and whole batches that ``batches`` names.
    """

    tp: Sizes = ANY
    pp: Sizes = ANY
    vpp: Sizes = GIVEN
    cp: Sizes = GIVEN
    ep: Sizes = GIVEN
    mbs: Sizes = GIVEN
    gbs: tuple[int, int] | None = None
    batches: tuple[int, ...] = ()
    recompute: tuple[str, ...] | None = GIVEN
    zero1: tuple[bool, ...] | None = GIVEN
    sp: tuple[bool, ...] | None = GIVEN

    def opened(self, names: tuple[str, ...]) -> Space:
        """With these dimensions open, where nothing is said of them."""
        unnamed: dict[str, Any] = {name: ANY for name in names if getattr(self, name) == GIVEN}
        return replace(self, **unnamed)

    def global_batches(self, base: Plan) -> list[int]:
        """Those that are named, or the flags' times powers of two within the bounds; the flags' among them."""
        if self.batches:
            return sorted({base.global_batch, *self.batches})
        low, high = self.gbs or (max(1, base.global_batch // _BATCH_SPAN), base.global_batch * _BATCH_SPAN)
        grown = [base.global_batch << k for k in range(64) if base.global_batch << k <= high]
        shrunk = [base.global_batch >> k for k in range(1, 64) if base.global_batch >> k >= low]
        whole = [batch for batch in shrunk if base.global_batch % batch == 0]
        return sorted({base.global_batch, *whole, *(batch for batch in grown if batch >= low)})

    def candidates(self, base: Plan, model: ModelShape) -> Candidates:
        """What a run that begins with ``base`` chooses from: :meth:`plans`, with ``base`` first.

        Raises:
            UserError: there is nothing else.
        """
        found = self.plans(base, model).with_first(base)
        if len(found) < 2:
            ranks = base.layout.world_size
            raise UserError(
                f"{_FLAG} leaves nothing to choose from but {base} on {ranks} ranks; widen it, or use a policy that "
                "chooses nothing, such as static"
            )
        return found

    def plans(self, base: Plan, model: ModelShape) -> Candidates:
        """Every plan of this space on the ranks of ``base`` that the model allows, each once, always in one order."""
        layout = base.layout
        halves = tuple(base.micro_batch >> k for k in range(base.micro_batch.bit_length()))
        asked = SearchSpace(
            global_batches=tuple(self.global_batches(base)),
            tp=self.tp,
            pp=self.pp,
            vpp=_or_given(self.vpp, tuple({1, layout.vpp})),
            cp=_or_given(self.cp, (layout.cp,)),
            ep=_or_given(self.ep, (layout.ep,)),
            micro_batches=_or_given(self.mbs, halves),
            recompute=_all_if_any(_or_given(self.recompute, (layout.recompute,)), RECOMPUTE_CHOICES),
            sequence_parallel=_all_if_any(_or_given(self.sp, (layout.sequence_parallel,)), (False, True)),
            distributed_optimizer=_all_if_any(_or_given(self.zero1, (layout.distributed_optimizer,)), (False, True)),
        )
        table = allowed_plans(model, layout.world_size, asked)
        # At tp 1 the wish for sequence parallelism says nothing, but there the flags' own plan has to be found again.
        sp = np.where(table.tp > 1, table.sequence_parallel, layout.sequence_parallel)
        return Candidates.of_table(replace(table, sequence_parallel=sp))


def tensor_sizes(space: Space, base: Plan, heads: int) -> list[int]:
    """Tensor parallel sizes that plans of the space may have, for a vocabulary that all of them divide."""
    ranks = base.layout.world_size
    wanted = space.tp or range(1, heads + 1)
    return [base.layout.tp, *(tp for tp in wanted if heads % tp == 0 and ranks % tp == 0)]


def _or_given[Values](values: Values, given: Values) -> Values:
    return given if values == GIVEN else values


def _all_if_any[Value](values: tuple[Value, ...] | None, every: tuple[Value, ...]) -> tuple[Value, ...]:
    return every if values is None else values


def parse_space(text: str) -> Space:
    """Read the flag: words ``name=values``. Values are ``1,2,4``; ``any``; for gbs ``low..high``, too; for recompute
    its names; for zero1 and sp ``on`` and ``off``.

    Raises:
        UserError: a word that is not understood.
    """
    values: dict[str, Any] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in _READERS or name in values:
            raise UserError(f"{_FLAG}: {word!r} is not understood; {_EXAMPLE}")
        try:
            values[name] = ANY if value == "any" and name != "gbs" else _READERS[name](value)
        except UserError:
            raise
        except (ValueError, KeyError):
            raise UserError(f"{_FLAG}: {value!r} are no values for {name}; {_EXAMPLE}") from None
    if isinstance(values.get("gbs"), list):
        values["batches"] = tuple(values.pop("gbs"))
    return Space(**values)


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise ValueError
    return numbers


def _batches(text: str) -> tuple[int, int] | list[int]:
    """Bounds, or a list of batches."""
    low, dots, high = text.partition("..")
    if not dots:
        return list(_numbers(text))
    bounds = (int(low), int(high))
    if not 1 <= bounds[0] <= bounds[1]:
        raise UserError(f"{_FLAG}: gbs={text} are no bounds; give the lower one first, 1 at least")
    return bounds


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(RECOMPUTE_CHOICES):
        raise ValueError
    return names


def _switches(text: str) -> tuple[bool, ...]:
    return tuple(_SWITCHES[word] for word in text.split(","))


_READERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("tp", "pp", "vpp", "cp", "ep", "mbs"), _numbers),
    "gbs": _batches,
    "recompute": _names,
    "zero1": _switches,
    "sp": _switches,
}
