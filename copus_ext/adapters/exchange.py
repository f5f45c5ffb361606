"""One round of a move: copies within a rank, messages between ranks, straight into place where they can be."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from copus_ext.adapters.copying import Comparison, copied
from copus_ext.adapters.wire import Parcel, Wire
from copus_ext.adapters.world import whole_world
from copus_ext.core.reshard.geometry import strides
from copus_ext.core.reshard.transfer import Holding, Transfer

_DIRECT_BYTES = 2**18  # from here on a tensor is a message of its own: packing it would cost more than the message
_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Piece:
    """Flat range ``[first, first + n)`` of a local tensor of ``shape``, in each of ``tensors`` (1-D, n long)."""

    shape: tuple[int, ...]
    first: int
    tensors: tuple[torch.Tensor, ...]
    _seen: dict[Any, tuple[torch.Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    def views(self, start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """The box of ``shape`` that starts at local index ``start``, in each of the tensors, without copying.

        What was asked for is kept: a move looks at a box up to three times, and the next one between the same layouts
        again. Tensors that were emptied and filled meanwhile are still seen where they are.
        """
        if (start, shape) not in self._seen:
            steps = strides(self.shape)
            first = sum(i * s for i, s in zip(start, steps, strict=True)) - self.first
            views = tuple(t.as_strided(shape, steps, t.storage_offset() + first) for t in self.tensors)
            self._seen[start, shape] = views
        return self._seen[start, shape]

    def packed_bytes(self, shape: tuple[int, ...], device: torch.device) -> int:
        """What packing a box of ``shape`` takes at most. The tensors may be hollow."""
        within = zip(shape, strides(shape), strides(self.shape), strict=True)
        in_one = all(count == 1 or step == here for count, step, here in within)
        sizes = ((math.prod(shape) * t.element_size(), in_one and t.device == device) for t in self.tensors)
        return sum(_aligned(size) for size, direct in sizes if size < _DIRECT_BYTES or not direct)


class Scratch:
    """Memory for packing that is used again in every round."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = self._bytes(0)
        self._used = 0

    def reserve(self, nbytes: int) -> int:
        """Make place for rounds that take up to ``nbytes``; by how much it grew. Nobody may need what was packed."""
        before = self._memory.numel()
        if nbytes > before:
            self._memory = self._bytes(0)  # never both
            self._memory = self._bytes(nbytes)
        return self._memory.numel() - before

    def release(self) -> int:
        """Give all of it back, until the next :meth:`reserve`; the bytes that were freed."""
        freed = self._memory.numel()
        self._memory = self._bytes(0)
        return freed

    def begin(self) -> None:
        """Of a round: what was taken in the one before is overwritten. All ranks must have received it."""
        self._used = 0

    def take(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised 1-D tensor."""
        first, size = self._used, elements * dtype.itemsize
        self._used += _aligned(size)
        assert self._used <= self._memory.numel(), "a round packs more than was reserved"
        return self._memory[first : first + size].view(dtype)

    def _bytes(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self.device)


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

    def buffer(self, scratch: Scratch) -> torch.Tensor:
        """Where it goes from, or arrives: where it lies, if it can, or else a place to pack it."""
        return self.views[0] if self.is_direct(scratch.device) else scratch.take(self.elements, self.views[0].dtype)


class Exchange:
    """A round of transfers on this rank: first :meth:`prepare`, then :meth:`run`."""

    def __init__(
        self,
        transfers: Iterable[Transfer],
        old: Sequence[Piece],
        new: Sequence[Piece],
        same: Comparison | None = None,
    ) -> None:
        """``transfers``: of the round, of all ranks, in the order that all ranks have them in.

        ``same``: compares each copy within the rank with what it was made of.
        """
        rank = whole_world().rank()
        mine = [t for t in transfers if rank in (t.source, t.target)]
        self.given = [t.given for t in mine if t.target == rank]
        self._old, self._new = old, new
        self._same = same
        self._local = [t for t in mine if not t.on_wire]
        self._uncompared = [] if same else self._local
        self._out = [(t.target, t.taken) for t in mine if t.on_wire and t.source == rank]
        self._in = [(t.source, t.given) for t in mine if t.on_wire and t.target == rank]

    @property
    def unchecked_sources(self) -> list[Holding]:
        """What this rank gives, but for what :meth:`run` compares with what becomes of it."""
        return [*(t.taken for t in self._uncompared), *(held for _, held in self._out)]

    @property
    def unchecked_targets(self) -> list[Holding]:
        """What this rank gets, but for that."""
        return [*(t.given for t in self._uncompared), *(held for _, held in self._in)]

    def packed_bytes(self, device: torch.device) -> int:
        """What :meth:`run` packs and unpacks at most, where packing is on ``device``. No piece need have its memory."""
        leaving = (self._old[held.piece].packed_bytes(held.box.shape, device) for _, held in self._out)
        arriving = (self._new[held.piece].packed_bytes(held.box.shape, device) for _, held in self._in)
        return sum(leaving) + sum(arriving)

    def prepare(self) -> None:
        """Find where everything lies. The pieces of both sides must have their memory."""
        self._sends = list(_messages((peer, v) for peer, held in self._out for v in _views(self._old, held)))
        self._receives = list(_messages((peer, v) for peer, held in self._in for v in _views(self._new, held)))

    def run(self, wire: Wire, scratch: Scratch) -> list[str]:
        """Pack, send over ``wire``, copy what stays, receive, unpack. Collective over all ranks.

        ``scratch`` has place for :meth:`packed_bytes`. What is packed there must stay as long as ``wire`` says.

        Returns:
            Keys of what stays on this rank and is not the same as it was, as far as that is compared.
        """
        damaged: list[str] = []
        scratch.begin()
        leaving = [(m, m.buffer(scratch)) for m in self._sends]
        arriving = [(m, m.buffer(scratch)) for m in self._receives]
        for message, buffer in leaving:
            if not message.is_direct(scratch.device):
                _pack(message, buffer)
        wire.carry(_parcels(leaving), _parcels(arriving), lambda: damaged.extend(self._copy_what_stays()))
        for message, buffer in arriving:
            if not message.is_direct(scratch.device):
                _unpack(message, buffer)
        return damaged

    def _copy_what_stays(self) -> Iterator[str]:
        for transfer in self._local:
            assert transfer.taken.box == transfer.given.box, "what is compared is only whether bits are the same"
            pairs = zip(_views(self._new, transfer.given), _views(self._old, transfer.taken), strict=True)
            if not all(self._copied(target, source) for target, source in pairs):
                yield transfer.given.key

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        if self._same is not None:
            return copied(target, source, self._same)
        target.copy_(source)
        return True


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


def _views(pieces: Sequence[Piece], holding: Holding) -> tuple[torch.Tensor, ...]:
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
