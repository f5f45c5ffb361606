"""What the ranks of one host tell each other without a message: each writes it down, and the others read its memory.

A message through gloo wakes several threads on both sides, which costs milliseconds where ranks share cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch

_SLOTS = 4
_FIRST_NAP_S, _LONGEST_NAP_S = 1e-4, 1e-3  # between two looks, which cost a few hundredths of a millisecond each


class Board:
    """Numbers that this rank tells the others, each time in the next of four slots, and what they tell.

    All ranks tell as often. What was told four times ago is overwritten, so at least every other time all ranks must
    have heard each other, or agreed on something otherwise. The turn must be seen last that was written last, as it is
    on x86.
    """

    def __init__(self, timeout: timedelta) -> None:
        """``timeout``: how long to wait for what another rank tells."""
        self._timeout = timeout
        self._slots = torch.zeros(_SLOTS, 3, dtype=torch.int64)  # which turn, address and count of what is told
        self._turn = 0
        self._told: list[torch.Tensor | None] = [None] * _SLOTS  # stays until the slot is used again

    @property
    def address(self) -> int:
        """Where others find it."""
        return self._slots.data_ptr()

    def tell(self, numbers: torch.Tensor) -> None:
        """Write ``numbers`` down, int64 of shape [n]. They must not be changed any more."""
        self._turn += 1
        place = self._turn % _SLOTS
        self._told[place] = numbers
        self._slots[place, 1:] = torch.tensor([numbers.data_ptr(), numbers.numel()])
        self._slots[place, 0] = self._turn  # last, for who sees it goes on to read the rest

    def heard(self, read: Callable[[int, torch.Tensor], None], address: int) -> torch.Tensor:
        """What a rank tells this time, when it does. ``address`` is its board's.

        Args:
            read: fills a tensor with what lies at an address of that rank.
            address: of its board.

        Raises:
            OSError: its memory can't be read.
            RuntimeError: it has told nothing until the time-out.
        """
        slot = address + self._turn % _SLOTS * self._slots[0].nbytes
        turn, where = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        nap, deadline = _FIRST_NAP_S, time.monotonic() + self._timeout.total_seconds()
        read(slot, turn)
        while int(turn) != self._turn:
            if time.monotonic() > deadline:
                raise RuntimeError(f"a rank has told nothing for {self._timeout}")
            time.sleep(nap)
            nap = min(1.5 * nap, _LONGEST_NAP_S)
            read(slot, turn)
        read(slot + turn.nbytes, where)
        first, count = where.tolist()
        numbers = torch.empty(count, dtype=torch.int64)
        read(first, numbers)
        return numbers
