"""What can go wrong in one round of a move, as context managers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any
from unittest import mock


def no_memory(at: int) -> Any:
    """Rank 2 has no memory for what arrives in round ``at``."""
    import torch.distributed as dist

    from copus_ext.adapters.exchange import Exchange

    calls = []

    def failing(self: Any) -> None:
        calls.append(1)
        if dist.get_rank() == 2 and len(calls) == at + 1:
            raise RuntimeError("out of memory")
        prepare(self)

    prepare = Exchange.prepare
    return mock.patch.object(Exchange, "prepare", failing)


def no_memory_for_packing(_: int) -> Any:
    """Rank 2 has no memory for packing, which is taken before the first round."""
    import torch.distributed as dist

    from copus_ext.adapters.exchange import Scratch

    calls: list[int] = []

    def failing(self: Any, nbytes: int) -> int:
        calls.append(1)
        if dist.get_rank() == 2 and len(calls) == 1:
            raise RuntimeError("out of memory")
        return int(reserve(self, nbytes))

    reserve = Scratch.reserve
    return mock.patch.object(Scratch, "reserve", failing)


def no_memory_behind(_: int) -> Any:
    """Rank 2 has no memory for what comes behind the last round, when next to nothing is left of the old job."""
    import torch.distributed as dist

    from copus_ext.adapters.move import Ledger

    def failing(self: Any, storages: Any, numbers: Any = None) -> None:
        if dist.get_rank() == 2 and numbers is None:
            raise RuntimeError("out of memory")
        take(self, storages, numbers)

    take = Ledger.take
    return mock.patch.object(Ledger, "take", failing)


def damage(at: int) -> Any:
    """One bit of one element arrives flipped on rank 1, in the first round from ``at`` on that takes any there."""
    import torch
    import torch.distributed as dist

    from copus_ext.adapters.exchange import Exchange

    calls: list[int] = []
    done: list[int] = []

    def damaging(self: Any, wire: Any, scratch: Any) -> list[str]:
        differing = run(self, wire, scratch)
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) > at and self.unchecked_targets and not done:
            held = self.unchecked_targets[-1]
            view = self._new[held.piece].views(held.start, held.box.shape)[-1]
            view.copy_((view.clone().view(torch.int32) ^ 1).view(view.dtype))
            done.append(1)
        return differing

    run = Exchange.run
    return mock.patch.object(Exchange, "run", damaging)


def miscopy(at: int) -> Any:
    """One bit flips on rank 1 while something is copied that stays there, the first time behind ``at`` others."""
    import torch
    import torch.distributed as dist

    from copus_ext.adapters import move

    calls: list[int] = []

    def damaging(target: Any, source: Any) -> bool:
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) == at + 1:
            target.copy_((target.clone().view(torch.int32) ^ 1).view(target.dtype))
        return same_bits(target, source)

    same_bits = move.same_bits
    return mock.patch.object(move, "same_bits", damaging)


def slow_reader() -> Any:
    """Rank 1 takes its time to read what others send it. That is no fault, and they have to wait for it."""
    import torch.distributed as dist

    from copus_ext.adapters.wire import MemoryWire

    def late(self: Any, *where: Any) -> None:
        if dist.get_rank() == 1:
            time.sleep(0.003)
        read(self, *where)

    read = MemoryWire.read
    return mock.patch.object(MemoryWire, "read", late)


def blind(at: int) -> Any:
    """From round ``at`` on rank 1 is cut off from what the others have and tell, also if it receives nothing there."""
    import torch.distributed as dist

    from copus_ext.adapters.wire import MemoryWire

    calls: list[int] = []
    cut_off: list[int] = []

    def failing(self: Any, sent: Any, received: Any, meanwhile: Any) -> None:
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) > at:
            cut_off.append(1)
        carry(self, sent, received, meanwhile)

    def reading(self: Any, *where: Any) -> None:
        if cut_off:
            raise OSError("not permitted")
        read(self, *where)

    carry, read = MemoryWire.carry, MemoryWire.read
    return mock.patch.multiple(MemoryWire, carry=failing, read=reading)


def cut_off_since_the_last_move(_: int) -> Any:
    """No rank may read any other from the start, which could be read when the wire was opened."""
    from copus_ext.adapters.wire import MemoryWire

    return mock.patch.object(MemoryWire, "read", side_effect=OSError("not permitted"))


def unreadable_weights() -> Any:
    """Rank 1 may not read the half-precision weights that the others have made behind the move."""
    import torch

    return _unreadable(lambda received: any(parcel.tensor.dtype == torch.bfloat16 for parcel in received))


def unreadable(at: int) -> Any:
    """From round ``at`` on rank 1 may not read what the others send it, also where the move is undone."""
    rounds = itertools.count()
    return _unreadable(lambda received: next(rounds) >= at and bool(received))


def _unreadable(when: Callable[[Any], bool]) -> Any:
    """Rank 1 may not read what it receives in a round, where that is so of the parcels."""
    import torch.distributed as dist

    from copus_ext.adapters.wire import MemoryWire

    def failing(self: Any, sent: Any, received: Any, meanwhile: Any) -> None:
        if dist.get_rank() == 1 and when(received):
            with mock.patch.object(MemoryWire, "read", side_effect=OSError("not permitted")):
                return carry(self, sent, received, meanwhile)
        return carry(self, sent, received, meanwhile)

    carry = MemoryWire.carry
    return mock.patch.object(MemoryWire, "carry", failing)
