"""What takes messages from rank to rank: torch's, or, on a CPU, each rank's reading of another's memory.

Between processes of one host that lie on a CPU the fastest wire is memory itself. Linux lets a process read what
another one has (``process_vm_readv``, "cross memory attach"), which is one copy straight into place, where a message
through gloo is packets on a socket. It may be forbidden, by a sandbox or between containers. So it is tried first, and
torch's messages are sent where any rank can't read any other. What ranks agree on while they move goes the same way.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import platform
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from copus_ext.adapters.agreement import added_up, largest, of_all_ranks
from copus_ext.adapters.board import Board
from copus_ext.adapters.world import whole_world

_PR_SET_PTRACER = 0x59616D61
_IN_ORDER = ("x86_64", "i686")


class Parcel(NamedTuple):
    """A contiguous tensor that goes to rank ``peer``, or comes from it."""

    peer: int
    tensor: torch.Tensor


class ReadFailed(RuntimeError):
    """This rank could not read another one's memory, which the others do not know of."""


class Wire(Protocol):
    """A way for messages between all ranks of the world."""

    name: str

    def carry(self, sent: Sequence[Parcel], received: Sequence[Parcel], meanwhile: Callable[[], None]) -> None:
        """Take what is ``sent`` to where it is ``received``, and do ``meanwhile`` beside it. Collective over all ranks.

        The n-th that a rank sends to a peer is the n-th that the peer receives from it. Behind the call this rank has
        all that it receives. What it sent may be overwritten or given back when all ranks have agreed on something
        since, so that they have theirs; only then may there be another call.

        Raises:
            ReadFailed: on this rank only. What else is raised leaves the ranks out of step.
        """

    def added_up(self, numbers: torch.Tensor) -> torch.Tensor:
        """[n] int64 of each rank, added up over ranks: something that all have agreed on. Collective.

        A wire may be let go when ranks have agreed on something since by torch's messages.

        Raises:
            ReadFailed: on this rank, which has told its numbers to the others, and can't tell them of this.
        """


class TorchWire:
    """Messages of the process group's backend: NCCL, RCCL or gloo."""

    name = "torch"

    def carry(self, sent: Sequence[Parcel], received: Sequence[Parcel], meanwhile: Callable[[], None]) -> None:
        """As of :class:`Wire`."""
        world = whole_world()
        operations = [dist.P2POp(dist.isend, tensor, peer, world) for peer, tensor in sent]
        operations += [dist.P2POp(dist.irecv, tensor, peer, world) for peer, tensor in received]
        works = dist.batch_isend_irecv(operations) if operations else []
        try:
            meanwhile()
        finally:
            for work in works:
                work.wait()

    def added_up(self, numbers: torch.Tensor) -> torch.Tensor:
        """As of :class:`Wire`."""
        return added_up(numbers)


class MemoryWire:
    """Each rank reads what it receives out of the sender's memory. For ranks on one host, and tensors on a CPU."""

    name = "memory"

    def __init__(self, board: Board, processes: Sequence[int], boards: Sequence[int]) -> None:
        """This rank's ``board``; of each rank, its process number and the address of its board.

        Raises:
            OSError: the system can't do it.
        """
        self._board, self._processes, self._boards = board, processes, boards
        if platform.machine() not in _IN_ORDER:
            raise OSError("other processors may see what is written in another order")
        try:
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._readv = self._libc.process_vm_readv
            self._readv.argtypes, self._readv.restype = _READV, ctypes.c_ssize_t
        except (OSError, TypeError, AttributeError) as error:
            raise OSError("no process_vm_readv") from error

    def let_read(self) -> None:
        """Where the kernel asks for leave (Yama), let those with the same parent attach to this process.

        There is no leave for reading alone.
        """
        self._allow(os.getppid())

    def let_nobody_read(self) -> None:
        """Take that back."""
        self._allow(0)

    def _allow(self, process: int) -> None:
        self._libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(process), *[ctypes.c_ulong(0)] * 3)

    def carry(self, sent: Sequence[Parcel], received: Sequence[Parcel], meanwhile: Callable[[], None]) -> None:
        """As of :class:`Wire`."""
        self._board.tell(_addresses(sent))
        meanwhile()
        try:
            for peer, address in enumerate(self._boards):  # so that each that is cut off can tell when ranks agree
                self.read(peer, address, torch.empty(1, dtype=torch.int64))
            for peer, parcels in itertools.groupby(_by_peer(received), key=lambda parcel: parcel.peer):
                for parcel, address in zip(parcels, _for_this_rank(self._heard(peer)), strict=True):
                    self.read(peer, address, parcel.tensor)
        except OSError as error:
            raise ReadFailed(str(error)) from error

    def added_up(self, numbers: torch.Tensor) -> torch.Tensor:
        """As of :class:`Wire`."""
        self._board.tell(numbers)
        try:
            heard = [self._heard(peer) for peer in range(len(self._boards)) if peer != whole_world().rank()]
            return torch.stack([numbers, *heard]).sum(0)
        except OSError as error:
            raise ReadFailed(str(error)) from error

    def _heard(self, peer: int) -> torch.Tensor:
        return self._board.heard(functools.partial(self.read, peer), self._boards[peer])

    def read(self, peer: int, address: int, into: torch.Tensor) -> None:
        """Fill ``into`` with what lies at ``address`` on rank ``peer``.

        Raises:
            OSError: it can't be read.
        """
        done, size = 0, into.nbytes
        while done < size:
            here = _Range(into.data_ptr() + done, size - done)
            there = _Range(address + done, size - done)
            got = self._readv(self._processes[peer], here, 1, there, 1, 0)
            if got <= 0:
                why = os.strerror(ctypes.get_errno()) if got else "nothing came"
                raise OSError(f"memory of rank {peer} can't be read: {why}")
            done += got


class _Range(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("first", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


_RANGES = (ctypes.POINTER(_Range), ctypes.c_ulong)  # and how many
_READV = (ctypes.c_int, *_RANGES, *_RANGES, ctypes.c_ulong)


def open_wire(device: torch.device, timeout: timedelta = default_pg_timeout) -> Wire:
    """The fastest way between all ranks for tensors on ``device``. Collective, and the same on every rank.

    ``timeout``: how long a rank waits for another one.
    """
    wire = _memory_wire(timeout) if device.type == "cpu" else None
    return wire or TorchWire()


def _memory_wire(timeout: timedelta) -> MemoryWire | None:
    """Where every rank can read a number that every other one tells it of."""
    board, secret = Board(timeout), torch.tensor([secrets.randbits(62)])
    told = of_all_ranks(torch.tensor([os.getpid(), board.address, secret.data_ptr(), int(secret)])).tolist()
    wire = None
    try:
        wire = MemoryWire(board, [process for process, *_ in told], [address for _, address, *_ in told])
        wire.let_read()
    except OSError:
        pass
    largest(0)  # all have given leave
    reads = wire is not None and all(_reads(wire, peer, *where) for peer, (_, _, *where) in enumerate(told))
    if largest(int(not reads)):
        if wire is not None:
            wire.let_nobody_read()
        return None
    return wire


def _reads(wire: MemoryWire, peer: int, address: int, secret: int) -> bool:
    found = torch.zeros(1, dtype=torch.int64)
    try:
        wire.read(peer, address, found)
    except OSError:
        return False
    return int(found) == secret


def _addresses(sent: Sequence[Parcel]) -> torch.Tensor:
    """Where each parcel lies, by the rank that it is for; before them, where those of each begin and end in this."""
    ranks = whole_world().size()
    counts = Counter(parcel.peer for parcel in sent)
    ends = itertools.accumulate((counts[peer] for peer in range(ranks)), initial=ranks + 1)
    return torch.tensor([*ends, *(parcel.tensor.data_ptr() for parcel in _by_peer(sent))])


def _for_this_rank(told: torch.Tensor) -> list[int]:
    """Of what a rank tells by :func:`_addresses`."""
    rank = whole_world().rank()
    addresses: list[int] = told[told[rank] : told[rank + 1]].tolist()
    return addresses


def _by_peer(parcels: Iterable[Parcel]) -> list[Parcel]:
    return sorted(parcels, key=lambda parcel: parcel.peer)
