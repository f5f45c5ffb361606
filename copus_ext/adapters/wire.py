"""What takes messages from rank to rank: torch's, or, on a CPU, each rank's reading of another's memory.

Between processes of one host that lie on a CPU the fastest wire is memory itself. Linux lets a process read what
another one has (``process_vm_readv``, "cross memory attach"), which is one copy straight into place, where a message
through gloo is packets on a socket. It may be forbidden, by a sandbox or between containers. So it is tried first, and
torch's messages are sent where any rank can't read any other.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from copus_ext.adapters.agreement import largest, of_all_ranks
from copus_ext.adapters.world import whole_world

_PR_SET_PTRACER = 0x59616D61


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
        since, so that they have theirs.

        Raises:
            ReadFailed: on this rank only. What else is raised leaves the ranks out of step.
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


class MemoryWire:
    """Each rank reads what it receives out of the sender's memory. For ranks on one host, and tensors on a CPU."""

    name = "memory"

    def __init__(self, processes: Sequence[int]) -> None:
        """``processes``: process number of each rank.

        Raises:
            OSError: the system can't do it.
        """
        self._processes = processes
        try:
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._libc.process_vm_readv.restype = ctypes.c_ssize_t
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
        addresses = _told(sent, received)
        meanwhile()
        try:
            for (peer, tensor), address in zip(_by_peer(received), addresses, strict=True):
                self.read(peer, address, tensor)
        except OSError as error:
            raise ReadFailed(str(error)) from error

    def read(self, peer: int, address: int, into: torch.Tensor) -> None:
        """Fill ``into`` with what lies at ``address`` on rank ``peer``.

        Raises:
            OSError: it can't be read.
        """
        done, size = 0, into.numel() * into.element_size()
        while done < size:
            here = _Range(into.data_ptr() + done, size - done)
            there = _Range(address + done, size - done)
            one = ctypes.c_ulong(1)
            pid = ctypes.c_int(self._processes[peer])
            got = self._libc.process_vm_readv(pid, ctypes.byref(here), one, ctypes.byref(there), one, ctypes.c_ulong(0))
            if got <= 0:
                why = os.strerror(ctypes.get_errno()) if got else "nothing came"
                raise OSError(f"memory of rank {peer} can't be read: {why}")
            done += got


class _Range(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("first", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def open_wire(device: torch.device) -> Wire:
    """The fastest way between all ranks for tensors on ``device``. Collective, and the same on every rank."""
    wire = _memory_wire() if device.type == "cpu" else None
    return wire or TorchWire()


def _memory_wire() -> MemoryWire | None:
    """Where every rank can read a number that every other one tells it of."""
    secret = torch.tensor([secrets.randbits(62)])
    told = of_all_ranks(torch.tensor([os.getpid(), secret.data_ptr(), int(secret)])).tolist()
    wire = None
    try:
        wire = MemoryWire([process for process, _, _ in told])
        wire.let_read()
    except OSError:
        pass
    largest(0)  # all have given leave
    reads = wire is not None and all(_reads(wire, peer, *where) for peer, (_, *where) in enumerate(told))
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


def _told(sent: Sequence[Parcel], received: Sequence[Parcel]) -> list[int]:
    """Where on its sender each parcel lies, and is by now, that this rank receives: by peer. Collective."""
    mine = torch.tensor([parcel.tensor.data_ptr() for parcel in _by_peer(sent)], dtype=torch.int64)
    places = torch.empty(len(received), dtype=torch.int64)
    dist.all_to_all_single(places, mine, _counts(received), _counts(sent), group=whole_world())
    return places.tolist()


def _by_peer(parcels: Iterable[Parcel]) -> list[Parcel]:
    return sorted(parcels, key=lambda parcel: parcel.peer)


def _counts(parcels: Iterable[Parcel]) -> list[int]:
    counts = [0] * whole_world().size()
    for parcel in parcels:
        counts[parcel.peer] += 1
    return counts
