"""One round of a move: copies within a rank, messages between ranks, straight into place where they can be."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from copus_ext.adapters.wire import Parcel, Wire
from copus_ext.adapters.world import whole_world
from copus_ext.core.reshard.geometry import strides
from copus_ext.core.reshard.transfer import Holding, Transfer

_DIRECT_BYTES = 2**18  # from here on a tensor is a message of its own: packing it would cost more than the message
_ALIGNMENT = 64


class Piece(NamedTuple):
    """Flat range ``[first, first + n)`` of a local tensor of ``shape``, in each of ``tensors`` (1-D, n long)."""

    shape: tuple[int, ...]
    first: int
    tensors: tuple[torch.Tensor, ...]

    def views(self, start: tuple[int, ...], shape: tuple[int, ...]) -> list[torch.Tensor]:
        """The box of ``shape`` that starts at local index ``start``, in each of the tensors, without copying."""
        steps = strides(self.shape)
        first = sum(i * s for i, s in zip(start, steps, strict=True)) - self.first
        return [t.as_strided(shape, steps, t.storage_offset() + first) for t in self.tensors]


class Scratch:
    """Memory for packing that is used again in every round."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Held now."""
        return self._memory.numel()

    def reserve(self, nbytes: int) -> int:
        """Make place for a round that takes ``nbytes``, where what was taken before ends; by how much it grew."""
        self._used, before = 0, self.nbytes
        if nbytes > self._memory.numel():
            self._memory = torch.empty(0, dtype=torch.uint8, device=self.device)  # never both
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self.nbytes - before

    def release(self) -> int:
        """Give all of it back, until the next :meth:`reserve`; the bytes that were freed."""
        freed = self.nbytes
        self._memory = torch.empty(0, dtype=torch.uint8, device=self.device)
        return freed

    def take(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised 1-D tensor."""
        first, size = self._used, elements * dtype.itemsize
        self._used += _aligned(size)
        return self._memory[first : first + size].view(dtype)


class Message(NamedTuple):
    """What goes between this rank and ``peer``: tensors of one dtype, packed, or one alone that needs no packing."""

    peer: int
    views: list[torch.Tensor]

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(view.numel() for view in self.views)

    def is_direct(self, device: torch.device) -> bool:
        """It can go from where it lies, or to it."""
        return len(self.views) == 1 and self.views[0].is_contiguous() and self.views[0].device == device

    @property
    def nbytes(self) -> int:
        """Of all tensors, as packing takes of the scratch memory."""
        return _aligned(self.elements * self.views[0].element_size())


class Exchange:
    """A round of transfers on this rank: first :meth:`prepare`, which may fail for want of memory, then :meth:`run`."""

    def __init__(self, transfers: Iterable[Transfer], old: Sequence[Piece], new: Sequence[Piece]) -> None:
        """``transfers``: of the round, of all ranks, in the order that all ranks have them in."""
        rank = whole_world().rank()
        mine = [t for t in transfers if rank in (t.source, t.target)]
        self.taken = [t.taken for t in mine if t.source == rank]
        self.given = [t.given for t in mine if t.target == rank]
        self._old, self._new = old, new
        self._local = [t for t in mine if not t.on_wire]
        self._out = [(t.target, t.taken) for t in mine if t.on_wire and t.source == rank]
        self._in = [(t.source, t.given) for t in mine if t.on_wire and t.target == rank]

    def prepare(self, scratch: Scratch) -> int:
        """Find where everything lies, and by how much ``scratch`` had to grow for it, in bytes.

        The pieces of both sides must have their memory.
        """
        self._sends = list(_messages((peer, v) for peer, held in self._out for v in _views(self._old, held)))
        self._receives = list(_messages((peer, v) for peer, held in self._in for v in _views(self._new, held)))
        self._scratch = scratch
        messages = (*self._sends, *self._receives)
        return scratch.reserve(sum(m.nbytes for m in messages if not m.is_direct(scratch.device)))

    def run(self, wire: Wire) -> None:
        """Pack, send over ``wire``, copy what stays, receive, unpack. Collective over all ranks."""
        leaving = [(m, self._buffer(m)) for m in self._sends]
        arriving = [(m, self._buffer(m)) for m in self._receives]
        for message, buffer in leaving:
            if not message.is_direct(self._scratch.device):
                _pack(message, buffer)
        wire.carry(_parcels(leaving), _parcels(arriving), self._copy_what_stays)
        for message, buffer in arriving:
            if not message.is_direct(self._scratch.device):
                _unpack(message, buffer)

    def _copy_what_stays(self) -> None:
        for transfer in self._local:
            pairs = zip(_views(self._new, transfer.given), _views(self._old, transfer.taken), strict=True)
            for target, source in pairs:
                target.copy_(source)

    def _buffer(self, message: Message) -> torch.Tensor:
        if message.is_direct(self._scratch.device):
            return message.views[0]
        return self._scratch.take(message.elements, message.views[0].dtype)


def _parcels(messages: Iterable[tuple[Message, torch.Tensor]]) -> list[Parcel]:
    return [Parcel(message.peer, buffer) for message, buffer in messages]


def _messages(views: Iterator[tuple[int, torch.Tensor]]) -> Iterator[Message]:
    """Large tensors alone, others by peer and dtype; both ends sort alike, so that the n-th sent is received n-th."""
    grouped: defaultdict[tuple[int, str], list[torch.Tensor]] = defaultdict(list)
    for peer, view in views:
        if view.numel() * view.element_size() >= _DIRECT_BYTES:
            yield Message(peer, [view])
        else:
            grouped[peer, str(view.dtype)].append(view)
    for peer, dtype in sorted(grouped):
        yield Message(peer, grouped[peer, dtype])


def _views(pieces: Sequence[Piece], holding: Holding) -> list[torch.Tensor]:
    return pieces[holding.piece].views(holding.start, holding.box.shape)


def _pack(message: Message, buffer: torch.Tensor) -> None:
    for part, view in _parts(message, buffer):
        part.copy_(view)


def _unpack(message: Message, buffer: torch.Tensor) -> None:
    for part, view in _parts(message, buffer):
        view.copy_(part)


def _parts(message: Message, buffer: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The buffer's part for each view, in its shape."""
    ends = itertools.accumulate(view.numel() for view in message.views)
    for end, view in zip(ends, message.views, strict=True):
        yield buffer[end - view.numel() : end].view(view.shape), view


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
